"""Permutations of channels."""

import torch
from torch import nn

from fastflow import checks
from fastflow.flows.logdets import zero_logdet

__all__ = ["Permute", "Reverse"]


class Permute(nn.Module):
    """The channels (dim 1) in another order: z[:, i] = x[:, permutation[i]].

    Args:
        permutation: sequence or (C,) int64 tensor holding each of 0..C-1 once.
    """

    moves_elements = True  # and does nothing else: log-determinant 0

    def __init__(self, permutation):
        super().__init__()
        # Checked on the CPU whatever the default device, which may be the meta device.
        held = permutation.cpu() if isinstance(permutation, torch.Tensor) else torch.tensor(permutation, device="cpu")
        held = held.to(torch.int64)
        if held.dim() != 1 or not torch.equal(held.sort().values, torch.arange(len(held), device="cpu")):
            raise ValueError(f"permutation: expected each of 0..C-1 once, got {held.tolist()}")
        device = permutation.device if isinstance(permutation, torch.Tensor) else torch.get_default_device()
        self.register_buffer("permutation", held.to(device))

    def forward(self, x, context=None):
        return self._take(x, self.permutation)

    def inverse(self, z, context=None):
        return self._take(z, torch.argsort(self.permutation))

    def _take(self, x, order):
        checks.tensor("x", x)
        if x.dim() < 2 or x.shape[1] != len(order):
            raise ValueError(f"x: expected shape (B, {len(order)}, *S), got {tuple(x.shape)}")
        return x.index_select(1, order), zero_logdet(x)


class Reverse(nn.Module):
    """The channels (dim 1) in reverse order."""

    moves_elements = True

    def forward(self, x, context=None):
        return x.flip(1), zero_logdet(x)

    def inverse(self, z, context=None):
        return self(z)
