"""The invertible 1x1 convolution: one C x C matrix applied at every position."""

import torch
from torch import nn

from fastflow import checks
from fastflow.nn.actnorm import ActNorm
from fastflow.nn.factors import factorize
from fastflow.nn.outputs import in_format_of, over_positions

__all__ = ["InvertibleConv1x1"]


class InvertibleConv1x1(nn.Module):
    """z = W x at every position of x (B, C, *S), S possibly empty; log|det| = S * log|det W| for S positions.

    W starts as a random rotation. "plain" learns W itself, parameter ``weight`` (C, C); its log-determinant comes from
    one LU factorisation per pass. "plu" learns ``lower``, ``upper`` (C, C) and ``log_s`` (C,) of W = P L U, with the
    permutation ``perm`` and the signs ``sign_s`` fixed as buffers. Everything runs in float32 or better, also under
    autocast.

    With an ``actnorm`` the layer computes W ((x + bias) * exp(log_scale)), folded into one matrix and one offset, so
    that normalisation costs no pass over the data.

    Args:
        channels: C.
        parametrization: "plain" or "plu".
        actnorm: an ActNorm of C channels that comes before W, or None.

    Raises:
        ValueError: an unknown parametrization, or an actnorm of another size.

    References:
        Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039, section 3.2.
    """

    _bank = None  # set by WeightBank for the length of one call

    def __init__(self, channels, parametrization="plain", *, actnorm=None, device=None, dtype=None):
        super().__init__()
        channels = checks.count("channels", channels, 1)
        checks.choice("parametrization", parametrization, ("plain", "plu"))
        if actnorm is not None and not isinstance(actnorm, ActNorm):
            raise TypeError(f"actnorm: expected an ActNorm or None, got {type(actnorm).__name__}")
        if actnorm is not None and actnorm.channels != channels:
            raise ValueError(f"actnorm: expected {channels} channels, got {actnorm.channels}")
        self.channels = channels
        self.parametrization = parametrization
        self.actnorm = actnorm
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, device=device)).Q
        dtype = torch.get_default_dtype() if dtype is None else dtype

        def parameter(value):  # row-major, as FSDP2 wants it
            return nn.Parameter(value.to(dtype).contiguous())

        if parametrization == "plain":
            self.weight = parameter(rotation)
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = parameter(lower.tril(-1))
        self.upper = parameter(upper.triu(1))
        self.log_s = parameter(diagonal.abs().log())
        self.register_buffer("sign_s", diagonal.sign().to(dtype))
        self.register_buffer("perm", permutation.argmax(1))

    @property
    def bank(self):
        """What a WeightBank's call in this thread shares among its layers, or None."""
        bank = self._bank  # once: another thread may set it between two looks
        return bank if bank is not None and bank.serves() else None

    @property
    def anchor(self):
        """The parameter whose dtype and device are the layer's."""
        return self.weight if self.parametrization == "plain" else self.lower

    def forward(self, x, context=None, *, factors=None):
        """(z, logdet) of x; ``factors`` are those of :func:`factors.factorize`, computed here if None."""
        return self._run(x, factors, inverse=False)

    def inverse(self, z, context=None, *, factors=None):
        """(x, logdet) of z; ``factors`` as in forward, for the inverse."""
        return self._run(z, factors, inverse=True)

    @torch.no_grad()
    def initialize(self, x, context=None):
        """Set the actnorm, if there is one, from the batch x, and return z."""
        if self.actnorm is not None:
            self.actnorm.initialize(x)
        return self(x)[0]

    def apply_factors(self, x, factors):
        """matrix @ x + offset without the log-determinant; x (B, C, *S)."""
        checks.tensor("x", x)
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected shape (B, {self.channels}, *S), got {tuple(x.shape)}")
        matrix = factors.matrix
        checks.same_device("x", x, "weight", matrix)
        if x.dtype != matrix.dtype:
            checks.goes_with("x", x, "weight", matrix)
            x = x.to(matrix.dtype)
        return factors.apply(x)

    def extra_repr(self):
        return f"{self.channels}, parametrization={self.parametrization!r}"

    def _run(self, x, factors, inverse):
        if factors is None:
            bank = self.bank
            factors = factorize([self], inverse)[0] if bank is None else bank.factors(self, inverse)
        y = self.apply_factors(x, factors)
        return in_format_of(x, y), over_positions(factors.logabsdet, x)
