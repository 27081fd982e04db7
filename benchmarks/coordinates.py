"""fastflow's Glow with its parameters written as nflows writes them, for Adam sees coordinates."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.peers import common


class _ShiftAfterScale(nn.Module):
    """ActNorm's bias b of (x + b) e^s from the shift t of x e^s + t."""

    def __init__(self, actnorm):
        super().__init__()
        self._actnorm = [actnorm]  # out of the modules' sight: it holds this one

    def forward(self, shift):
        return shift * torch.exp(-self._actnorm[0].log_scale)

    def right_inverse(self, bias):
        return bias * self._actnorm[0].log_scale.exp()


class _LowerUpper(nn.Module):
    """A 1x1 weight from the entries of nflows' L and U, with its places in the order of fastflow's channels."""

    def __init__(self, conv, rows, columns):
        super().__init__()
        self._conv = [conv]
        self.register_buffer("rows", torch.argsort(rows))
        self.register_buffer("columns", torch.argsort(conv.permutation._permutation)[torch.argsort(columns)])

    def forward(self, lower_entries, upper_entries, unconstrained_upper_diag):
        conv = self._conv[0]
        lower = torch.eye(conv.features, dtype=lower_entries.dtype).index_put(
            tuple(torch.as_tensor(i) for i in conv.lower_indices), lower_entries)
        diagonal = nn.functional.softplus(unconstrained_upper_diag) + conv.eps
        upper = torch.diag(diagonal).index_put(tuple(torch.as_tensor(i) for i in conv.upper_indices), upper_entries)
        return (lower @ upper)[self.rows][:, self.columns]

    def right_inverse(self, weight):
        conv = self._conv[0]
        return tuple(t.detach().clone() for t in (conv.lower_entries, conv.upper_entries,
                                                  conv.unconstrained_upper_diag))


def as_nflows(own, peer):
    """Rewrite ``own``, after nflows.load_glow(peer, own), in the coordinates of ``peer``, whose 1x1 convolutions lose
    the bias that fastflow's don't have."""
    for (steps, _), level in zip(peer.levels, own.transform.levels, strict=True):
        order = torch.arange(level.steps[0].conv.channels)
        for (_, conv, _), step in zip(steps, level.steps, strict=True):
            swapped = common.swapped(step.conv.channels)
            conv.bias.requires_grad_(False)
            parametrize.register_parametrization(step.conv.actnorm, "bias", _ShiftAfterScale(step.conv.actnorm))
            parametrize.register_parametrization(step.conv, "weight", _LowerUpper(conv, swapped, order))
            order = swapped
