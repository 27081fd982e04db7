"""What the peers' models share where a library leaves it to its user: conditioners, the end of a density."""

import math

import torch
from torch import nn


def zero_conv(in_channels, out_channels):
    """The 3x3 convolution of a split's prior, zero at the start."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


def conv_net(in_channels, out_channels, hidden_channels):
    """Glow's conditioner: convolutions 3x3, 1x1, 3x3 with ReLU in place, the last one zero at the start."""
    return nn.Sequential(nn.Conv2d(in_channels, hidden_channels, 3, padding=1), nn.ReLU(inplace=True),
                         nn.Conv2d(hidden_channels, hidden_channels, 1), nn.ReLU(inplace=True),
                         zero_conv(hidden_channels, out_channels))


def mlp(in_features, out_features, hidden):
    """Fully connected layers with ReLU between, the last one zero at the start."""
    layers = []
    for size in hidden:
        layers += [nn.Linear(in_features, size), nn.ReLU(inplace=True)]
        in_features = size
    last = nn.Linear(in_features, out_features)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)


def standard_normal(z):
    """log N(z; 0, I) (B,) of z (B, ...)."""
    z = z.flatten(1)
    return -0.5 * (z * z).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def linears(module):
    """The convolutions or fully connected layers of a conditioner, whatever their class, in order."""
    return [layer for layer in module.modules() if isinstance(getattr(layer, "weight", None), nn.Parameter)]


@torch.no_grad()
def copy_layers(mine, theirs, rows=None, signs=None):
    """Give the layers of a conditioner the weights of another; those of the last with its output rows taken in the
    order ``rows`` (result row i is row rows[i]) and multiplied by ``signs``."""
    mine, theirs = linears(mine), linears(theirs)
    for layer, source in zip(mine, theirs, strict=True):
        weight, bias = source.weight, source.bias
        if layer is mine[-1] and rows is not None:
            weight, bias = weight[rows], bias[rows]
        if layer is mine[-1] and signs is not None:
            weight, bias = weight * signs.view(-1, *(1,) * (weight.dim() - 1)), bias * signs
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


def interleaved(half):
    """Rows that turn [first half, second half] into first, second alternating."""
    return torch.arange(2 * half).view(2, half).t().flatten()


def swapped(size):
    """Rows that exchange the halves."""
    return torch.arange(size).roll(size // 2)
