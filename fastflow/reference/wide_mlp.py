"""A fully connected network whose matrix products are torch's, in eager PyTorch."""

from fastflow.reference.mlp import mlp

__all__ = ["wide_mlp"]


def wide_mlp(x, weights, biases, *, activation="silu"):
    """The output (B, O) of the network for x (B, I); see functional.wide_mlp."""
    return mlp(x, weights, biases, activation=activation)
