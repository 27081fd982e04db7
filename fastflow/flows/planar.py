"""Planar and radial flows: one direction, or the distance from one point, is bent."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.flows.amortised import Amortised, vectors

__all__ = ["Planar", "Radial", "bent", "log_slope", "unbent"]

UNIT = math.log(math.e - 1.0)  # softplus(UNIT) = 1


def bent(a, slope):
    """a + (slope - 1) tanh(a), increasing for slope > 0, which is its slope at 0."""
    return a + (slope - 1.0) * torch.tanh(a)


def log_slope(a, slope):
    """log of the derivative of :func:`bent`, tanh^2 a + slope sech^2 a, a sum of what is not negative."""
    squared = torch.tanh(a).square()
    return torch.log(squared + slope * (1.0 - squared))


def unbent(c, slope):
    """The a with bent(a, slope) = c, element by element, by bisection; differentiable by the implicit function theorem.

    Args:
        c: any shape.
        slope: positive, broadcasting with c.
    """
    return _Unbent.apply(*torch.broadcast_tensors(c, slope))


class _Unbent(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(c, slope):
        # |tanh| < 1 brackets the root; halving goes on until the bracket is down to rounding, then Newton's steps, kept
        # inside it, remove what is left of it where the slope is steep.
        half = (slope - 1.0).abs()
        low, high = c - half, c + half
        for _ in range(60 if c.dtype == torch.float64 else 30):
            middle = 0.5 * (low + high)
            below = bent(middle, slope) < c
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        a = 0.5 * (low + high)
        for _ in range(3):
            # A bound may have been reached by rounding: the root may lie a few units in the last place outside.
            slack = 4.0 * torch.finfo(a.dtype).eps * (half + a.abs())
            step = (bent(a, slope) - c) * torch.exp(-log_slope(a, slope))
            a = torch.clamp(a - torch.where(torch.isinf(step), 0.0, step), low - slack, high + slack)
        return torch.where(torch.isinf(c), c, a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], output)
        ctx.save_for_forward(inputs[1], output)

    @staticmethod
    def backward(ctx, gradient):
        slope, a = ctx.saved_tensors
        by_c = gradient * torch.exp(-log_slope(a, slope))
        return by_c, -by_c * torch.tanh(a)

    @staticmethod
    def jvp(ctx, c, slope_tangent):
        slope, a = ctx.saved_tensors
        return (c - torch.tanh(a) * slope_tangent) * torch.exp(-log_slope(a, slope))


class Planar(nn.Module):
    """z = x + u tanh(w'x + b), with log|det| = log(1 + w'u (1 - tanh^2)).

    It is invertible for w'u > -1, which u -> u + (softplus(w'u) - 1 - w'u) w / w'w ensures. The inverse finds w'x + b,
    the root of a + w'u tanh(a) = w'z + b, by bisection. It starts as the identity.

    Args:
        features: D >= 1; x and z are (B, D).
        context_features: size of a context (B, context_features) of which u, w and b are made, or None.
        hidden: sizes of the hidden layers of the network that makes them.

    References:
        Rezende and Mohamed, "Variational inference with normalizing flows", 2015, arXiv:1505.05770, appendix A.1.
    """

    def __init__(self, features, *, context_features=None, hidden=(64,)):
        super().__init__()
        self.features = checks.count("features", features, 1)
        w = torch.randn(features) / features**0.5
        u = UNIT * w / w.square().sum()
        self.parameters_of = Amortised([u, w, torch.zeros(1)], context_features, hidden)

    def forward(self, x, context=None):
        """(z, logdet) of x (B, D), logdet (B,) in nats."""
        u, w, b, slope = self._constants("x", x, context)
        a = (w * x).sum(1, keepdim=True) + b
        return x + u * torch.tanh(a), log_slope(a, slope)[:, 0]

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, D)."""
        u, w, b, slope = self._constants("z", z, context)
        a = unbent((w * z).sum(1, keepdim=True) + b, slope)
        return z - u * torch.tanh(a), -log_slope(a, slope)[:, 0]

    def extra_repr(self):
        return f"{self.features}"

    def _constants(self, name, x, context):
        vectors(name, x, self.features, self.parameters_of.start)
        u, w, b = self.parameters_of(x, context)
        dot = (w * u).sum(1, keepdim=True)
        slope = F.softplus(dot)
        return u + (slope - 1.0 - dot) * w / w.square().sum(1, keepdim=True), w, b, slope


class Radial(nn.Module):
    """z = x + beta (x - x0) / (alpha + r) with r = |x - x0|, alpha > 0 and beta > -alpha.

    log|det| = (D - 1) log(1 + beta h) + log(1 + alpha beta h^2) with h = 1/(alpha + r). With alpha = softplus and
    alpha + beta = softplus both are logarithms of sums of positive terms. The inverse is closed: r solves
    r^2 + r (alpha + beta - |z - x0|) = alpha |z - x0|. It starts as the identity.

    Args:
        features: D >= 1; x and z are (B, D).
        context_features: size of a context (B, context_features) of which x0, alpha and beta are made, or None.
        hidden: sizes of the hidden layers of the network that makes them.

    References:
        Rezende and Mohamed, "Variational inference with normalizing flows", 2015, arXiv:1505.05770, appendix A.2.
    """

    def __init__(self, features, *, context_features=None, hidden=(64,)):
        super().__init__()
        self.features = checks.count("features", features, 1)
        start = torch.full((1,), UNIT)
        self.parameters_of = Amortised([torch.randn(features), start, start], context_features, hidden)

    def forward(self, x, context=None):
        """(z, logdet) of x (B, D), logdet (B,) in nats."""
        centre, alpha, total = self._constants("x", x, context)
        offset = x - centre
        r = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        return x + (total - alpha) * offset / (alpha + r), self._logdet(r, alpha, total)

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, D)."""
        centre, alpha, total = self._constants("z", z, context)
        offset = z - centre
        distance = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
        # The positive root, written without cancellation for either sign of the linear term.
        linear = total - distance
        q = torch.sqrt(linear.square() + 4.0 * alpha * distance) + linear.abs()
        r = torch.where(linear > 0, 2.0 * alpha * distance / q, 0.5 * q)
        return centre + offset * (alpha + r) / (total + r), -self._logdet(r, alpha, total)

    def extra_repr(self):
        return f"{self.features}"

    def _constants(self, name, x, context):
        """(x0, alpha, alpha + beta)."""
        vectors(name, x, self.features, self.parameters_of.start)
        centre, alpha, total = self.parameters_of(x, context)
        return centre, F.softplus(alpha), F.softplus(total)

    def _logdet(self, r, alpha, total):
        tangential = torch.log(total + r) - torch.log(alpha + r)
        radial = torch.log(r.square() + 2.0 * alpha * r + alpha * total) - 2.0 * torch.log(alpha + r)
        return ((self.features - 1) * tangential + radial)[:, 0]
