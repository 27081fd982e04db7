"""Glow's conditioner for images."""

import torch.nn.functional as F
from torch import nn

from fastflow import backends, functional

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Convolutions 3x3, 1x1 and 3x3 with ReLU between, and plain biases; the last one starts at zero, so that a
    coupling starts simple. It answers in the memory format of its input. Where functional.conv_net has a kernel for
    them (on a CPU, hidden channels in multiples of 16) the three run in it, unless one of them is hooked or replaced.

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
        if all(map(_plain, layers)):
            operands = (x, *(p for layer in layers for p in (layer.weight, layer.bias)))
            if backends.serves("conv_net", *operands):
                return functional.conv_net(*operands)
        h = F.relu(self.conv1(x), inplace=True)  # a convolution does not keep its own output
        return self.conv3(F.relu(self.conv2(h), inplace=True))


def _plain(module):
    """Whether a call of ``module`` is that of a convolution and nothing more."""
    return (type(module) is nn.Conv2d and "forward" not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks))
