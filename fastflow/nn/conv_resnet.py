"""The residual conditioner of RealNVP for images."""

import torch.nn.functional as F
from torch import nn

from fastflow.nn.context import ContextShift
from fastflow.nn.precision import taken

__all__ = ["ConvResNet"]


class ConvResNet(nn.Module):
    """A 3x3 convolution, ``n_blocks`` residual blocks ReLU, 3x3, ReLU, 3x3, and after a last ReLU a 1x1 convolution.

    The second convolution of each block and the last one start at zero, so that depth does not change the scale and a
    coupling starts simple. No batch statistics: what an image gets does not depend on its neighbours.

    Args:
        in_channels, out_channels: channels of input and output.
        hidden_channels: channels between.
        n_blocks: residual blocks.
        context: keyword arguments of a ContextShift, which adds what the context says to the first convolution's
            answer; none for a network without a context.

    Raises:
        ValueError: on a call, a context of another shape than the network was built for.
    """

    def __init__(self, in_channels, out_channels, hidden_channels=64, n_blocks=8, **context):
        super().__init__()
        self.first = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Conv2d(hidden_channels, hidden_channels, 3, padding=1)
                                                  for _ in range(2)) for _ in range(n_blocks))
        self.last = nn.Conv2d(hidden_channels, out_channels, 1)
        for layer in (*(second for _, second in self.blocks), self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.context = ContextShift(hidden_channels, **context)

    def forward(self, x, context=None):
        x = taken(x, self.first.weight)
        shift = self.context(x, context)
        h = self.first(x) if shift is None else self.first(x) + shift
        for first, second in self.blocks:
            h = h + second(F.relu(first(F.relu(h))))
        return self.last(F.relu(h))
