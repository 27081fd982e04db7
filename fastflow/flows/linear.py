"""Linear maps along dim 1, each with its log|det A|, inverse and covariance; on images they are 1x1 convolutions."""

import torch
from torch import nn

from fastflow import checks, functional
from fastflow.functional import full_precision
from fastflow.nn import InvertibleConv1x1
from fastflow.nn.channel_affine import channel_affine
from fastflow.nn.outputs import in_format_of, over_positions

__all__ = ["PLU", "QR", "Dense", "Householder", "LinearMap", "LowRank", "Orthogonal", "Triangular"]


class LinearMap(nn.Module):
    """z = A x + bias at every position of x (B, C, *S), S possibly empty; log|det| = S * log|det A| for S positions.

    Subclasses give ``matrix()``, and ``inverse_matrix()`` and ``log_abs_det()`` where there is a better way than an LU
    factorisation. Everything runs in float32 or better, also under autocast.

    Args:
        channels: C >= 1.
        bias: whether to add a learned bias (C,), zero at first.
    """

    def __init__(self, channels, bias=True):
        super().__init__()
        channels = checks.count("channels", channels, 1)
        self.channels = channels
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def matrix(self):
        """A (C, C)."""
        raise NotImplementedError

    def inverse_matrix(self):
        """A^-1 (C, C)."""
        return functional.slogdet_inverse(self.matrix())[2]

    def log_abs_det(self):
        """log|det A|, 0-d, in nats."""
        return functional.slogdet(self.matrix())[1]

    def covariance(self):
        """A A' (C, C), the covariance of z for x ~ N(0, I)."""
        matrix = self.matrix()
        return matrix @ matrix.mT

    def forward(self, x, context=None):
        """(z, logdet) of x (B, C, *S), logdet (B,) in nats; ``context`` is ignored."""
        x = self._operand("x", x)
        with full_precision(x.device.type):
            return in_format_of(x, self._direct(x, self.bias)), over_positions(self.log_abs_det(), x)

    def inverse(self, z, context=None):
        """(x, logdet) of z."""
        z = self._operand("z", z)
        with full_precision(z.device.type):
            centred = z if self.bias is None else z - self.bias.view(1, -1, *(1,) * (z.dim() - 2))
            return in_format_of(z, self._reverse(centred)), over_positions(-self.log_abs_det(), z)

    def extra_repr(self):
        return f"{self.channels}"

    def _direct(self, x, offset):
        return channel_affine(x, self.matrix(), offset)

    def _reverse(self, z):
        return channel_affine(z, self.inverse_matrix(), None)

    def _operand(self, name, x):
        checks.tensor(name, x)
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"{name}: expected shape (B, {self.channels}, *S), got {tuple(x.shape)}")
        parameter = next(self.parameters())
        checks.goes_with(name, x, "A", parameter)
        return x.to(torch.promote_types(x.dtype, parameter.dtype))


class Dense(LinearMap):
    """A is a free matrix, a random rotation at first; one LU factorisation gives its determinant and inverse."""

    def __init__(self, channels, bias=True):
        super().__init__(channels, bias)
        self.conv = InvertibleConv1x1(channels, "plain")

    def matrix(self):
        return self.conv.weight


class PLU(LinearMap):
    """A = P L U, permutation and signs of the diagonal fixed, a random rotation at first; log|det A| = sum(log_s).

    References:
        Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039, section 3.2.
    """

    def __init__(self, channels, bias=True):
        super().__init__(channels, bias)
        self.conv = InvertibleConv1x1(channels, "plu")

    def matrix(self):
        c = self.conv
        return functional.plu_weight(c.lower[None], c.upper[None], c.log_s[None], c.sign_s[None], c.perm[None])[0]

    def log_abs_det(self):
        return self.conv.log_s.sum()


def _rank(name, value, channels):
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= channels:
        raise ValueError(f"{name}: expected an int from 1 to {channels}, got {value!r}")
    return value


class Householder(LinearMap):
    """A = H_1 H_2 ... H_k, a product of reflections H = I - 2 v v'/(v'v): orthogonal, log|det A| = 0.

    Args:
        n_reflections: k; None for C of them, which reach every orthogonal matrix with determinant (-1)^k.

    References:
        Tomczak and Welling, "Improving variational auto-encoders using Householder flow", 2016, arXiv:1611.09630.
    """

    def __init__(self, channels, bias=True, *, n_reflections=None):
        super().__init__(channels, bias)
        count = channels if n_reflections is None else _rank("n_reflections", n_reflections, channels)
        self.vectors = nn.Parameter(torch.randn(count, channels))

    def matrix(self):
        return reflections(self.vectors)

    def inverse_matrix(self):
        return self.matrix().mT

    def log_abs_det(self):
        return self.vectors.new_zeros(())


def reflections(vectors):
    """H_1 ... H_k of vectors (k, C)."""
    product = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    for v in vectors / torch.linalg.vector_norm(vectors, dim=1, keepdim=True):
        product = product - 2.0 * torch.outer(product @ v, v)
    return product


class QR(LinearMap):
    """A = Q R: Q a product of C reflections, R upper triangular with diagonal exp(log_r); log|det A| = sum(log_r).

    References:
        Hoogeboom et al., "Emerging convolutions for generative normalizing flows", 2019, arXiv:1901.11137.
    """

    def __init__(self, channels, bias=True):
        super().__init__(channels, bias)
        self.vectors = nn.Parameter(torch.randn(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))
        self.log_r = nn.Parameter(torch.zeros(channels))

    def _upper(self):
        return torch.triu(self.upper, 1) + torch.diag(torch.exp(self.log_r))

    def matrix(self):
        return reflections(self.vectors) @ self._upper()

    def inverse_matrix(self):
        return torch.linalg.solve_triangular(self._upper(), reflections(self.vectors).mT, upper=True)

    def log_abs_det(self):
        return self.log_r.sum()


class Orthogonal(LinearMap):
    """A rotation, log|det A| = 0, from a skew-symmetric S = M - M': Cayley's (I - S)^-1 (I + S), or exp(S).

    Args:
        method: "cayley" (no eigenvalue -1 is reached) or "exp" (every rotation is).

    References:
        Golinski et al., "Improving normalizing flows via better orthogonal parameterizations", 2019.
    """

    def __init__(self, channels, bias=True, *, method="cayley"):
        super().__init__(channels, bias)
        checks.choice("method", method, ("cayley", "exp"))
        self.method = method
        self.raw = nn.Parameter(torch.randn(channels, channels) / channels**0.5)

    def matrix(self):
        lower = torch.tril(self.raw, -1)
        skew = lower - lower.mT
        if self.method == "exp":
            return torch.linalg.matrix_exp(skew)
        identity = torch.eye(self.channels, dtype=skew.dtype, device=skew.device)
        return torch.linalg.solve(identity - skew, identity + skew)  # I - S is never singular

    def inverse_matrix(self):
        return self.matrix().mT

    def log_abs_det(self):
        return self.raw.new_zeros(())


class Triangular(LinearMap):
    """A lower (or ``upper``) triangular with diagonal exp(log_diagonal), the identity at first."""

    def __init__(self, channels, bias=True, *, upper=False):
        super().__init__(channels, bias)
        self.upper = bool(upper)
        self.off_diagonal = nn.Parameter(torch.zeros(channels, channels))
        self.log_diagonal = nn.Parameter(torch.zeros(channels))

    def matrix(self):
        strict = torch.triu(self.off_diagonal, 1) if self.upper else torch.tril(self.off_diagonal, -1)
        return strict + torch.diag(torch.exp(self.log_diagonal))

    def inverse_matrix(self):
        identity = torch.eye(self.channels, dtype=self.log_diagonal.dtype, device=self.log_diagonal.device)
        return torch.linalg.solve_triangular(self.matrix(), identity, upper=self.upper)

    def log_abs_det(self):
        return self.log_diagonal.sum()


class LowRank(LinearMap):
    """A = diag(d) + U V' with d = exp(log_d) and U, V (C, k), in O(C k) per position either way.

    log|det A| = sum(log_d) + log|det(I + V' diag(1/d) U)| (the matrix determinant lemma), and
    A^-1 z = z/d - U~ (I + V' U~)^-1 V' (z/d) with U~ = diag(1/d) U (Woodbury's identity).

    Args:
        rank: k.
    """

    def __init__(self, channels, bias=True, *, rank=1):
        super().__init__(channels, bias)
        rank = _rank("rank", rank, channels)
        self.log_d = nn.Parameter(torch.zeros(channels))
        self.u = nn.Parameter(0.1 * torch.randn(channels, rank) / channels**0.5)
        self.v = nn.Parameter(0.1 * torch.randn(channels, rank) / channels**0.5)

    def matrix(self):
        return torch.diag(torch.exp(self.log_d)) + self.u @ self.v.mT

    def inverse_matrix(self):
        eye = torch.eye(self.channels, dtype=self.log_d.dtype, device=self.log_d.device)
        return self._reverse(eye).mT

    def log_abs_det(self):
        return self.log_d.sum() + functional.slogdet(self._capacitance())[1]

    def _capacitance(self):
        eye = torch.eye(self.u.shape[1], dtype=self.u.dtype, device=self.u.device)
        return eye + self.v.mT @ (self.u * torch.exp(-self.log_d)[:, None])

    def _direct(self, x, offset):
        z = _per_channel(torch.exp(self.log_d), x) * x
        z = z + channel_affine(channel_affine(x, self.v.mT, None), self.u, None)
        return z if offset is None else z + _per_channel(offset, z)

    def _reverse(self, z):
        scaled = z * _per_channel(torch.exp(-self.log_d), z)
        inner = functional.slogdet_inverse(self._capacitance())[2] @ self.v.mT
        return scaled - channel_affine(channel_affine(scaled, inner, None),
                                       self.u * torch.exp(-self.log_d)[:, None], None)


def _per_channel(values, like):
    return values.view(1, -1, *(1,) * (like.dim() - 2))
