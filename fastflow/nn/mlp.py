"""A fully connected network for the conditioners of couplings."""

import torch
from torch import nn

from fastflow import checks
from fastflow.nn.precision import taken

__all__ = ["MLP"]


class MLP(nn.Module):
    """Fully connected network on (B, in_features), optionally with a context (B, context_features) beside the input.

    The last layer starts at zero, so that a coupling starts simple.

    Args:
        in_features, out_features: sizes of input and output; in_features may be 0.
        hidden: sizes of the hidden layers.
        context_features: size of the context, or None for a network without one.
        activation: constructor of the activation module.

    Raises:
        ValueError, TypeError: a size is no int that fits; the message names it.
    """

    def __init__(self, in_features, out_features, hidden=(64, 64), *, context_features=None, activation=nn.ReLU):
        super().__init__()
        self.in_features = in_features = checks.count("in_features", in_features)
        self.out_features = out_features = checks.count("out_features", out_features)
        if context_features is not None:
            context_features = checks.count("context_features", context_features, 1)
        self.context_features, self.takes_context = context_features, context_features is not None
        width = in_features + (context_features or 0)
        layers = []
        for size in checks.counts("hidden", hidden, 1):
            layers += [_linear(width, size), activation()]
            width = size
        last = _linear(width, out_features)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x, context=None):
        checks.tensor("x", x)
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x: expected shape (B, {self.in_features}), got {tuple(x.shape)}")
        checks.goes_with("x", x, "weight", self.layers[0].weight)
        x = taken(x, self.layers[0].weight)
        if self.context_features is None:
            if context is not None:
                raise ValueError(f"context: expected None, because the network was built without context_features, "
                                 f"got shape {tuple(context.shape)}")
            return self.layers(x)
        expected = (x.shape[0], self.context_features)
        if context is None or tuple(context.shape) != expected:
            got = None if context is None else tuple(context.shape)
            raise ValueError(f"context: expected shape {expected}, got {got}")
        checks.goes_with("context", context, "x", x)
        return self.layers(torch.cat([x, context.to(x.dtype)], 1))


def _linear(in_features, out_features):
    """nn.Linear; without inputs it is its bias, about whose empty weight torch's initialisation would warn."""
    layer = nn.Linear(max(in_features, 1), out_features)
    if in_features == 0:
        layer.in_features = 0
        layer.weight = nn.Parameter(layer.weight.new_empty(out_features, 0))
    return layer
