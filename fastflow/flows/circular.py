"""Rotations of angles."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.flows.logdets import zero_logdet
from fastflow.nn.outputs import in_format_of
from fastflow.reference import wrapped
from fastflow.reference.rounding import just_below

__all__ = ["PeriodicShift"]


class PeriodicShift(nn.Module):
    """z = x + shift modulo 2*bound, with one learned shift per channel, 0 at first: x (B, C, *S) are angles, z lies in
    [-bound, bound), the log-determinant is 0.

    Args:
        channels: C.
        bound: half the period, positive.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    References:
        Rezende et al., "Normalizing flows on tori and spheres", 2020, arXiv:2002.02428, section 2.1.
    """

    def __init__(self, channels, bound=math.pi):
        super().__init__()
        self.channels = checks.count("channels", channels, 1)
        checks.number("bound", bound)
        if not 0.0 < bound < math.inf:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        self.bound = float(bound)
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x, context=None):
        """(z, logdet) of x (B, C, *S), logdet (B,) zeros; ``context`` is ignored."""
        return self._turn("x", x, 1.0)

    def inverse(self, z, context=None):
        """(x, logdet) of z; x lies in [-bound, bound)."""
        return self._turn("z", z, -1.0)

    def _turn(self, name, x, sign):
        checks.tensor(name, x)
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"{name}: expected shape (B, {self.channels}, *S), got {tuple(x.shape)}")
        checks.goes_with(name, x, "shift", self.shift)
        dtype = torch.promote_types(self.shift.dtype, torch.float32)
        shift = self.shift.to(dtype).view(1, -1, *(1,) * (x.dim() - 2))
        # Each wrapped by itself, the sum keeps the digits of x.
        z = wrapped(wrapped(x.to(dtype), self.bound) + sign * shift, self.bound)
        z = z + (z.clamp(max=just_below(self.bound, x.dtype)) - z).detach()  # which half precision may round up
        return in_format_of(x, z.to(x.dtype)), zero_logdet(x)

    def extra_repr(self):
        return f"{self.channels}, bound={self.bound}"
