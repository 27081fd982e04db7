"""A fully connected network, plain or residual, in eager PyTorch."""

import torch.nn.functional as F

from fastflow.reference.mlp_flow import FUNCTIONS

__all__ = ["mlp"]


def mlp(x, weights, biases, *, activation="relu", residual=False):
    """The output (B, O) of the network for x (B, I); see functional.mlp."""
    act, last = FUNCTIONS[activation], len(weights) - 1
    h, total = x, None
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if index and not (residual and index == last):
            h = act(h)
        h = F.linear(h, weight, bias)
        if residual and index % 2 == 0:
            h = total = h if total is None else total + h
    return h
