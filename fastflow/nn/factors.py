"""From the weights of invertible 1x1 convolutions to what their passes need, one factorisation per size class."""

from typing import NamedTuple

import torch
from torch import nn

from fastflow import functional
from fastflow.functional import full_precision
from fastflow.nn.channel_affine import Ledger, channel_affine, hand_out

__all__ = ["Factors", "factorize", "total_logabsdet"]


class Group(NamedTuple):
    """What the layers of one size class share: log|det| of each (N,), and where they leave their weights' gradients."""

    logabsdet: torch.Tensor
    ledger: Ledger | None


class Factors(NamedTuple):
    """One direction of one layer: y = matrix @ x + offset at every position, log|det matrix| = logabsdet."""

    matrix: torch.Tensor
    offset: torch.Tensor | None
    logabsdet: torch.Tensor | None
    group: Group | None = None
    index: int = 0
    undo: "Factors | None" = None  # the other direction, without gradients

    def apply(self, x):
        """matrix @ x + offset along dim 1 of x (B, C, *S), which has the matrix's dtype."""
        with full_precision(x.device.type):
            return channel_affine(x, self.matrix, self.offset, None if self.group is None else self.group.ledger,
                                  self.index)


def total_logabsdet(factors):
    """The sum of the layers' log|det|, 0-d, in as few launches as possible."""
    group = factors[0].group
    if group is not None and [f.index for f in factors if f.group is group] == list(range(len(group.logabsdet))):
        return group.logabsdet.sum()
    return torch.stack([factor.logabsdet for factor in factors]).sum()


def factorize(layers, inverse=False, root=None, *, undo=False):
    """The :class:`Factors` of each InvertibleConv1x1 in ``layers``, in order.

    Weights of one size are stacked and factorised by one call of functional.slogdet, or for the inverse of
    functional.slogdet_inverse; those in PLU form are assembled by one call of functional.plu_weight. The ActNorm that a
    layer carries is folded into its matrix and offset. Every result is differentiable in the parameters.

    Args:
        layers: InvertibleConv1x1 modules.
        inverse: the direction; False is data to noise.
        root: module in which a parameter is looked up when an error must name it.
        undo: for data to noise, also the way back, without gradients; plain weights need no second factorisation.

    Raises:
        TypeError: a parameter is sharded (a DTensor); the message names it.
    """
    classes = {}
    for index, layer in enumerate(layers):
        anchor = layer.anchor
        _refuse_sharded(layer, anchor, root)
        classes.setdefault((layer.channels, anchor.dtype, anchor.device), []).append(index)
    results = [None] * len(layers)
    for (_, _, device), members in classes.items():
        # Plain weights come first, so that their factorisation is one slice of the class.
        members = ([i for i in members if layers[i].parametrization == "plain"]
                   + [i for i in members if layers[i].parametrization == "plu"])
        with full_precision(device.type):
            factors = _factorize_class([layers[i] for i in members], inverse, undo)
        for index, factor in zip(members, factors, strict=True):
            results[index] = factor
    return results


def _factorize_class(layers, inverse, undo):
    dtype = torch.promote_types(layers[0].anchor.dtype, torch.float32)
    plain = [layer for layer in layers if layer.parametrization == "plain"]
    plu = [layer for layer in layers if layer.parametrization == "plu"]
    weights, known = [], None
    if plain:
        weights.append(_stack([layer.weight for layer in plain], dtype))
    if plu:
        log_s = _stack([layer.log_s for layer in plu], dtype)
        weights.append(functional.plu_weight(
            _stack([layer.lower for layer in plu], dtype), _stack([layer.upper for layer in plu], dtype), log_s,
            _stack([layer.sign_s for layer in plu], dtype), torch.stack([layer.perm for layer in plu])))
        known = log_s.sum(-1)
    matrix = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias, log_scale = _actnorm_parameters([layer.actnorm for layer in layers], matrix)
    if bias is not None:  # W (x + b) e^l = M x + M b with M = W e^l
        matrix = matrix * torch.exp(log_scale)[:, None, :]
        if plu:
            known = known + log_scale[len(plain):].sum(-1)
    backs = []
    if inverse:
        _, logabsdet, matrix = functional.slogdet_inverse(matrix)
    elif undo:
        if plain:
            _, logabsdet, back = functional.slogdet_inverse(matrix[:len(plain)])
            backs.append(back.detach())
        if plu:
            backs.append(functional.slogdet_inverse(matrix[len(plain):].detach())[2])
    else:
        logabsdet = functional.slogdet(matrix if not plu else matrix[:len(plain)])[1] if plain else None
    if plu:  # PLU factors know their determinant without rounding
        logabsdet = torch.cat([logabsdet[:len(plain)], known]) if plain else known
    if inverse:
        logabsdet = -logabsdet
        matrices, offsets, ledger = hand_out(matrix, offset=None if bias is None else -bias)
    else:
        matrices, offsets, ledger = hand_out(matrix, shift=bias)
    group = Group(logabsdet, ledger)
    others = [None] * len(layers)
    if backs:
        back_offsets = others if bias is None else -bias.detach()
        others = [Factors(*parts, None) for parts in zip(torch.cat(backs), back_offsets, strict=True)]
    return [Factors(*parts, group, index, other) for index, (*parts, other)
            in enumerate(zip(matrices, offsets, logabsdet.unbind(0), others, strict=True))]


def _actnorm_parameters(norms, matrix):
    """(bias, log_scale), each (N, C), zero where a layer has no ActNorm; (None, None) where none has."""
    if all(norm is None for norm in norms):
        return None, None
    identity = matrix.new_zeros(matrix.shape[-1]) if None in norms else None
    return tuple(_stack([identity if norm is None else getattr(norm, name) for norm in norms], matrix.dtype)
                 for name in ("bias", "log_scale"))


def _stack(tensors, dtype):
    return torch.stack(tuple(tensors)).to(dtype)


def _refuse_sharded(layer, anchor, root):
    if type(anchor) in (torch.Tensor, nn.Parameter) or not hasattr(anchor, "placements"):
        return
    named = (root if root is not None else layer).named_parameters()
    name = next((name for name, parameter in named if parameter is anchor), "weight")
    raise TypeError(f"{name}: expected a whole tensor, got a sharded one ({type(anchor).__name__}); the 1x1 weights of "
                    f"a model are factorised together, so keep them in one FSDP2 group that is unsharded at that point")
