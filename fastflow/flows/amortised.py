"""Parameters of a transform that are free, or that a network makes of the context."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.nn import MLP

__all__ = ["Amortised", "vectors"]


class Amortised(nn.Module):
    """Several tensors as one parameter vector, to which, with a context, an MLP of the context adds.

    The MLP starts at zero, so that every context starts with the same values.

    Args:
        starts: the tensors' first values.
        context_features: size of the context (B, context_features), or None.
        hidden: sizes of the MLP's hidden layers.
    """

    def __init__(self, starts, context_features=None, hidden=(64,)):
        super().__init__()
        self.shapes = [tuple(start.shape) for start in starts]
        self.start = nn.Parameter(torch.cat([start.reshape(-1) for start in starts]))
        self.network = None
        if context_features is not None:
            context_features = checks.count("context_features", context_features, 1)
            self.network = MLP(0, len(self.start), hidden, context_features=context_features)

    def forward(self, x, context=None):
        """The tensors for a batch x (B, ...), each (B, *shape), or (1, *shape) without a context."""
        values = self.start[None]
        if self.network is not None:
            values = values + self.network(x.new_empty(x.shape[0], 0, dtype=self.start.dtype), context)
        elif context is not None:
            raise ValueError(f"context: expected None, because the transform was built without context_features, got "
                             f"shape {tuple(context.shape)}")
        pieces = values.split([math.prod(shape) for shape in self.shapes], 1)
        return [piece.unflatten(1, shape) if shape else piece[:, 0] for piece, shape
                in zip(pieces, self.shapes, strict=True)]


def vectors(name, x, features, parameter):
    """x is (B, features), and not of another precision than the parameter if either is float64."""
    checks.tensor(name, x)
    checks.events(name, x, (features,))
    checks.goes_with(name, x, "start", parameter)
