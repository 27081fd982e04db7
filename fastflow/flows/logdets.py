"""Log-determinants (B,), which are float32 or better whatever the dtype of x."""

import torch

__all__ = ["sum_event", "zero_logdet"]


def zero_logdet(x):
    """(B,) zeros: what a transform that keeps volume gives for x (B, ...)."""
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def sum_event(values):
    """Sum over all but the first dimension."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values
