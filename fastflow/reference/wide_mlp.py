"""A fully connected network whose matrix products are torch's, in eager PyTorch."""

import torch.nn.functional as F

from fastflow.reference.mlp import mlp

__all__ = ["wide_mlp"]


def wide_mlp(x, weights, biases, *, activation="silu", hidden=False):
    """The output (B, O) of the network for x (B, I), or with ``hidden`` (output, activations of the hidden layers); see
    functional.wide_mlp."""
    if not hidden:
        return mlp(x, weights, biases, activation=activation)
    values = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        values.append(getattr(F, activation)(mlp(values[-1], [weight], [bias])))
    return mlp(values[-1], weights[-1:], biases[-1:]), tuple(values[1:])
