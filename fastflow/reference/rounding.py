"""Numbers next to an edge, in the dtype of what must not pass it."""

import math

import torch

__all__ = ["just_below", "nearest"]


def nearest(edge, dtype):
    """The number of ``dtype`` that ``edge`` is rounded to."""
    step = _step(edge, dtype)
    return round(edge / step) * step


def just_below(edge, dtype):
    """A number of ``dtype`` just below ``edge``."""
    step = _step(edge, dtype)
    return nearest(edge, dtype) - (0.5 * step if math.frexp(edge)[0] == 0.5 else step)


def _step(edge, dtype):
    """The distance between numbers of ``dtype`` from the power of 2 at or below ``edge`` on."""
    info = torch.finfo(dtype)
    return max(info.eps * 2.0**(math.frexp(edge)[1] - 1) if edge else 0.0, info.smallest_normal * info.eps)
