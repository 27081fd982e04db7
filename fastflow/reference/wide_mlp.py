"""A fully connected network, in eager PyTorch."""

import torch.nn.functional as F

__all__ = ["wide_mlp"]


def wide_mlp(x, weights, biases, *, activation="silu"):
    """Linear layers with an activation between two of them; see functional.wide_mlp."""
    rectify = F.relu if activation == "relu" else F.silu
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(rectify(x) if index else x, weight, bias)
    return x
