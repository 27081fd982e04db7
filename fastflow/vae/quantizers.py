"""Quantisers of latents: a learned codebook, and finite scalar quantisation."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import distributed, nn

from fastflow import checks
from fastflow.flows.labels import check_labels
from fastflow.vae.likelihoods.base import promoted

__all__ = ["FSQ", "Quantized", "VectorQuantizer"]


class Quantized(NamedTuple):
    """Attributes:
    z: (B, D, *S), the codes' vectors, with the gradient of the quantiser's input (straight-through).
    codes: (B, *S) int64.
    loss: (B,), to be minimised: codebook and commitment terms, summed over latents.
    """

    z: torch.Tensor
    codes: torch.Tensor
    loss: torch.Tensor


class VectorQuantizer(nn.Module):
    """The nearest of n_codes learned vectors for each latent vector.

    loss = |sg[e] - z|^2 commitment + |e - sg[z]|^2, sg without gradient; with ``decay`` the codebook is instead the
    moving average of the vectors assigned to each code, updated by every call in training mode (over all ranks where
    torch.distributed runs), and the second term is left out.

    Args:
        n_codes: size of the codebook, at least 2.
        features: D.
        commitment: weight of the first term, a finite number >= 0.
        decay: of the moving averages, in (0, 1), or None for a codebook trained by gradients.
        restart_below: codes whose average count in a batch is below it, a finite number >= 0, move to vectors of the
            batch; 0: never. Only with ``decay``. An average begins, at first and after a move, at 1 or at twice the
            threshold, whichever is more, so that a code has a few batches to be chosen in.

    References:
        van den Oord et al., "Neural discrete representation learning", 2017, arXiv:1711.00937, and its appendix A.1.
    """

    def __init__(self, n_codes, features, *, commitment=0.25, decay=None, restart_below=0.0):
        super().__init__()
        for name, value, least in (("n_codes", n_codes, 2), ("features", features, 1)):
            checks.count(name, value, least)
        if decay is not None:
            checks.number("decay", decay)
        if decay is not None and not 0.0 < decay < 1.0:
            raise ValueError(f"decay: expected a number in (0, 1) or None, got {decay!r}")
        for name, value in (("commitment", commitment), ("restart_below", restart_below)):
            checks.number(name, value)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if restart_below and decay is None:
            raise ValueError("restart_below: expected 0 without decay")
        self.n_codes, self.features = n_codes, features
        self.commitment, self.decay, self.restart_below = commitment, decay, restart_below
        start = torch.randn(n_codes, features) / math.sqrt(features)
        if decay is None:
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.first_count = max(1.0, 2.0 * restart_below)
            self.register_buffer("counts", torch.full((n_codes,), self.first_count))
            self.register_buffer("sums", self.first_count * start)

    def forward(self, z):
        """Quantized of z (B, D, *S); its vectors and loss are float64 if the codebook is, else float32."""
        checks.tensor("z", z)
        if z.dim() < 2 or z.shape[1] != self.features:
            raise ValueError(f"z: expected shape (B, {self.features}, *S), got {tuple(z.shape)}")
        checks.goes_with("z", z, "the codebook", self.codebook)
        z = promoted(z)
        vectors = z.movedim(1, -1)
        rows = vectors.reshape(-1, self.features)
        with torch.no_grad():
            codes = torch.cdist(rows, promoted(self.codebook), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        found = promoted(self.lookup(codes.view(vectors.shape[:-1])))
        if self.training and self.decay is not None:
            self._update(rows.detach(), codes)
        codes = codes.view(vectors.shape[:-1])
        loss = self.commitment * (z - found.detach()).square()
        if self.decay is None:
            loss = loss + (found - z.detach()).square()
        return Quantized(z + (found - z).detach(), codes, loss.flatten(1).sum(1))

    def lookup(self, codes):
        """The vectors (B, D, *S) of codes (B, *S)."""
        check_codes(codes)
        try:
            return F.embedding(codes, self.codebook).movedim(-1, 1)
        except IndexError:
            check_labels("codes", codes, self.n_codes, "n_codes", 0)
            raise

    @torch.no_grad()
    def _update(self, rows, codes):
        counts = count_codes(codes, self.n_codes, rows.dtype)
        sums = torch.zeros_like(self.codebook, dtype=rows.dtype).index_add_(0, codes, rows)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        self.counts.lerp_(counts.to(self.counts.dtype), 1.0 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1.0 - self.decay)
        if self.restart_below:
            dead = self.counts < self.restart_below
            if rows.shape[0]:
                others = rows[torch.randint(rows.shape[0], (self.n_codes,), device=rows.device)]
            else:  # none to move to, which the other ranks are told by NaN
                others = rows.new_full(self.codebook.shape, math.nan)
            if distributed.is_available() and distributed.is_initialized():
                distributed.broadcast(others, 0)
            dead = dead & ~others.isnan().any(1)
            self.sums.copy_(torch.where(dead[:, None], self.first_count * others, self.sums))
            self.counts.copy_(torch.where(dead, self.first_count, self.counts))
        used = self.counts > 1e-6  # of codes long unused the average has no digits left: they stay where they are
        self.codebook.copy_(torch.where(used[:, None], self.sums / self.counts[:, None].clamp_min(1e-6), self.codebook))

    def extra_repr(self):
        return f"n_codes={self.n_codes}, features={self.features}, decay={self.decay}"


def check_codes(codes):
    """``codes`` are indices, of int64 or int32."""
    checks.tensor("codes", codes, floating=False)
    if codes.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"codes: expected an int64 tensor, got {codes.dtype}")


def count_codes(codes, n_codes, dtype):
    """How often each code occurs, (n_codes,)."""
    counts = torch.zeros(n_codes, dtype=dtype, device=codes.device)
    return counts.index_add_(0, codes.flatten(), torch.ones(codes.numel(), dtype=dtype, device=codes.device))


class FSQ(nn.Module):
    """Every latent dimension is bounded and rounded to one of a few levels; the codes are their combinations.

    z_d -> round(bound_d(z_d)) / floor(L_d / 2) with bound(z) = tanh(z + s) (L - 1)(1 + m)/2 - o, where for even L
    o = 1/2 and s makes bound(0) = 0, for odd L both are 0. The margin m is 1e-3, as in the paper, and at most 1/(2 L),
    which keeps the ends in their levels. There is nothing to learn and no loss.

    Args:
        levels: L_d >= 2 for each dimension.

    References:
        Mentzer et al., "Finite scalar quantization: VQ-VAE made simple", 2023, arXiv:2309.15505.
    """

    def __init__(self, levels=(8, 5, 5, 5)):
        super().__init__()
        levels = tuple(levels)
        if not levels or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in levels):
            raise ValueError(f"levels: expected ints of at least 2, got {levels!r}")
        self.levels = levels
        self.features, self.n_codes = len(levels), math.prod(levels)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # follows .double()

    def forward(self, z):
        """Quantized of z (B, D, *S)."""
        checks.tensor("z", z)
        if z.dim() < 2 or z.shape[1] != self.features:
            raise ValueError(f"z: expected shape (B, {self.features}, *S), got {tuple(z.shape)}")
        dtype = torch.promote_types(z.dtype, torch.float32)
        # Filled in on the device: a copy from the host can't be recorded in a CUDA graph.
        sizes = torch.stack([z.new_full((), size, dtype=dtype) for size in self.levels])
        sizes = sizes.view(-1, *[1] * (z.dim() - 2))
        half = 0.5 * (sizes - 1.0) * (1.0 + (0.5 / sizes).clamp_max(1e-3))
        offset = torch.where(sizes % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        whole = bounded + (torch.round(bounded) - bounded).detach()
        digits = (torch.round(bounded).detach() + torch.floor(0.5 * sizes)).to(torch.int64)
        codes = sum(digit * base for digit, base in zip(digits.unbind(1), self._bases(), strict=True))
        return Quantized(whole / torch.floor(0.5 * sizes), codes, sizes.new_zeros(z.shape[0]))

    def lookup(self, codes):
        """The vectors (B, D, *S) of codes (B, *S)."""
        check_codes(codes)
        check_labels("codes", codes, self.n_codes, "n_codes", 0)
        digits = [(codes // base) % size - size // 2 for base, size in zip(self._bases(), self.levels, strict=True)]
        dtype = torch.promote_types(self.anchor.dtype, torch.float32)
        return torch.stack([digit.to(dtype) / (size // 2) for digit, size in zip(digits, self.levels, strict=True)], 1)

    def _bases(self):
        return [math.prod(self.levels[:index]) for index in range(len(self.levels))]

    def extra_repr(self):
        return f"levels={self.levels}"
