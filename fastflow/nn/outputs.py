"""What layers return that treat all positions and samples alike."""

import math

from fastflow.reference.layout import memory_format_of

__all__ = ["in_format_of", "over_positions"]


def over_positions(each, x):
    """(B,) for x (B, C, *S): S times the log-determinant ``each``, 0-d, of one position."""
    return each.expand(x.shape[0]) * math.prod(x.shape[2:])  # in this order one launch makes a tensor of its own


def in_format_of(x, y):
    """``y`` in the memory format that x's strides suggest."""
    return y if x.is_contiguous() and y.is_contiguous() else y.contiguous(memory_format=memory_format_of(x))
