"""Sylvester flows: several directions are bent at once."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.flows.amortised import Amortised, vectors
from fastflow.flows.planar import UNIT, log_slope, unbent

__all__ = ["Sylvester"]


class Sylvester(nn.Module):
    """z = x + Q R tanh(R~ Q'x + b): Q (D, M) with orthonormal columns, R and R~ upper triangular (M, M).

    log|det| = sum_i log(1 + R_ii R~_ii (1 - tanh_i^2)). Q is the first M columns of a product of Householder
    reflections; with ``n_reflections=0`` those of the identity, the triangular variant, which takes turns with
    :class:`Reverse` between layers. It is invertible for R_ii R~_ii > -1: R~_ii = exp(.), to which signs lose no
    generality, and R_ii R~_ii = softplus(.) - 1. The inverse finds a = R~ Q'x + b from R~ Q'z + b = a + R~ R tanh(a),
    which is triangular: from the last element to the first, each by bisection. It starts close to the identity.

    Args:
        features: D >= 1; x and z are (B, D).
        rank: M from 1 to D; None for D.
        n_reflections: number of reflections, None for M.
        context_features: size of a context (B, context_features) of which everything is made, or None.
        hidden: sizes of the hidden layers of the network that makes it.

    References:
        van den Berg et al., "Sylvester normalizing flows for variational inference", 2018, arXiv:1803.05649.
    """

    def __init__(self, features, rank=None, *, n_reflections=None, context_features=None, hidden=(64,)):
        super().__init__()
        features = checks.count("features", features, 1)
        rank = features if rank is None else rank
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= features:
            raise ValueError(f"rank: expected an int from 1 to {features}, got {rank!r}")
        count = rank if n_reflections is None else n_reflections
        count = checks.count("n_reflections", count)
        self.features, self.rank = features, rank
        small = 0.01 * torch.randn(2, rank, rank)
        self.parameters_of = Amortised(
            [torch.randn(count, features), *small, torch.full((rank,), UNIT), torch.zeros(rank), torch.zeros(rank)],
            context_features, hidden)

    def forward(self, x, context=None):
        """(z, logdet) of x (B, D), logdet (B,) in nats."""
        mirrors, r, r_tilde, slope, b = self._constants("x", x, context)
        a = _apply(r_tilde, _reflect(mirrors, x)[:, :self.rank]) + b
        return x + self._back(mirrors, _apply(r, torch.tanh(a))), log_slope(a, slope).sum(1)

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, D)."""
        mirrors, r, r_tilde, slope, b = self._constants("z", z, context)
        c = _apply(r_tilde, _reflect(mirrors, z)[:, :self.rank]) + b
        product = r_tilde @ r
        found, heights = [], z.new_zeros(z.shape[0], 0, dtype=c.dtype)  # from the last element to the first
        for i in reversed(range(self.rank)):
            a = unbent(c[:, i] - (product[:, i, i + 1:] * heights).sum(1), slope[:, i])
            found.insert(0, a)
            heights = torch.cat([torch.tanh(a)[:, None], heights], 1)
        return z - self._back(mirrors, _apply(r, heights)), -log_slope(torch.stack(found, 1), slope).sum(1)

    def extra_repr(self):
        return f"{self.features}, rank={self.rank}"

    def _constants(self, name, x, context):
        vectors(name, x, self.features, self.parameters_of.start)
        mirrors, upper, upper_tilde, raw, log_diagonal, b = self.parameters_of(x, context)
        slope, diagonal = F.softplus(raw), torch.exp(log_diagonal)
        mirrors = mirrors / torch.linalg.vector_norm(mirrors, dim=2, keepdim=True)
        return (mirrors, upper.triu(1) + torch.diag_embed((slope - 1.0) / diagonal),
                upper_tilde.triu(1) + torch.diag_embed(diagonal), slope, b)

    def _back(self, mirrors, y):
        """Q y of y (B, M)."""
        return _reflect(mirrors.flip(1), F.pad(y, (0, self.features - self.rank)))


def _reflect(mirrors, x):
    """H_k ... H_1 x for each row of x, with unit vectors (1 or B, k, D)."""
    for v in mirrors.unbind(1):
        x = x - 2.0 * (v * x).sum(1, keepdim=True) * v
    return x


def _apply(matrix, x):
    """matrix @ x for each row of x (B, M), matrix (1 or B, M, M)."""
    if matrix.shape[0] == 1:
        return F.linear(x, matrix[0])
    return torch.bmm(matrix, x[..., None])[..., 0]
