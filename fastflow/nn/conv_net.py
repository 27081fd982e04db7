"""Glow's conditioner for images."""

from torch import nn

from fastflow import functional

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Convolutions 3x3, 1x1 and 3x3 with ReLU between, and plain biases; the last one starts at zero, so that a
    coupling starts simple. It answers in the memory format of its input.

    Args:
        in_channels, out_channels: channels of input and output.
        hidden_channels: channels between.
    """

    def __init__(self, in_channels, out_channels, hidden_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)

    def forward(self, x, context=None):
        layers = self.conv1, self.conv2, self.conv3
        return functional.conv_net(x, *(p for layer in layers for p in (layer.weight, layer.bias)))
