"""From the weights of invertible 1x1 convolutions to what their passes need, one factorisation per size class."""

from typing import NamedTuple

import torch
from torch import nn

from fastflow import functional
from fastflow.functional import full_precision

__all__ = ["Factors", "channel_affine", "factorize"]


class Factors(NamedTuple):
    """One direction of one layer: y = matrix @ x + offset at every position, log|det matrix| = logabsdet."""

    matrix: torch.Tensor
    offset: torch.Tensor | None
    logabsdet: torch.Tensor | None
    undo: "Factors | None" = None  # the other direction, without gradients


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
    weights, logabsdets, inverses = [], [], []
    if plain:
        weights.append(_stack([layer.weight for layer in plain], dtype))
        if undo:
            _, logabsdet, back = functional.slogdet_inverse(weights[0])
            logabsdets.append(logabsdet)
            inverses.append(back.detach())
        elif not inverse:
            logabsdets.append(functional.slogdet(weights[0])[1])
    if plu:
        log_s = _stack([layer.log_s for layer in plu], dtype)
        weights.append(functional.plu_weight(
            _stack([layer.lower for layer in plu], dtype), _stack([layer.upper for layer in plu], dtype), log_s,
            _stack([layer.sign_s for layer in plu], dtype), torch.stack([layer.perm for layer in plu])))
        logabsdets.append(log_s.sum(-1))
        if undo:
            inverses.append(functional.slogdet_inverse(weights[-1].detach())[2])
    matrix = weights[0] if len(weights) == 1 else torch.cat(weights)
    if inverse:
        _, logabsdet, matrix = functional.slogdet_inverse(matrix)
        if plu:  # the factors know their determinant without rounding
            logabsdet = torch.cat([logabsdet[:len(plain)], *logabsdets])
    else:
        logabsdet = logabsdets[0] if len(logabsdets) == 1 else torch.cat(logabsdets)
    norms = [layer.actnorm for layer in layers]
    factors = _folded(norms, matrix, logabsdet, inverse)
    if undo:
        with torch.no_grad():
            back = _folded(norms, inverses[0] if len(inverses) == 1 else torch.cat(inverses), -logabsdet, True)
        factors = [factor._replace(undo=other) for factor, other in zip(factors, back, strict=True)]
    return factors


def _folded(norms, matrix, logabsdet, inverse):
    """The Factors of each layer, its actnorm folded in."""
    matrix, offset, logabsdet = _fold_actnorm(norms, matrix, logabsdet, inverse)
    offsets = [None] * len(norms) if offset is None else offset.unbind(0)
    return list(map(Factors, matrix.unbind(0), offsets, logabsdet.unbind(0)))


def _fold_actnorm(norms, matrix, logabsdet, inverse):
    """W (x + b) e^l = (W e^l) x + (W e^l) b, and its inverse (e^-l W^-1) z - b."""
    if all(norm is None for norm in norms):
        return matrix, None, -logabsdet if inverse else logabsdet
    identity = matrix.new_zeros(matrix.shape[-1])
    bias = _stack([identity if norm is None else norm.bias for norm in norms], matrix.dtype)
    log_scale = _stack([identity if norm is None else norm.log_scale for norm in norms], matrix.dtype)
    logabsdet = logabsdet + log_scale.sum(-1)
    if inverse:
        return matrix * torch.exp(-log_scale)[:, :, None], -bias, -logabsdet
    matrix = matrix * torch.exp(log_scale)[:, None, :]
    return matrix, (matrix @ bias[:, :, None]).squeeze(-1), logabsdet


def _stack(tensors, dtype):
    return torch.stack(tuple(tensors)).to(dtype)


def channel_affine(x, matrix, offset):
    """matrix @ x + offset along dim 1 of x (B, C, *S), in x's memory format, as one matrix product; matrix (C', C)."""
    if x.dim() == 2:
        return nn.functional.linear(x, matrix, offset)
    if x.stride(1) == 1:  # channels last: the pixels are the rows of a matrix
        return nn.functional.linear(x.movedim(1, -1), matrix, offset).movedim(-1, 1)
    batched, flat = matrix.expand(x.shape[0], *matrix.shape), x.flatten(2)
    y = torch.bmm(batched, flat) if offset is None else torch.baddbmm(offset[:, None], batched, flat)
    return y.view(x.shape[0], matrix.shape[0], *x.shape[2:])


def _refuse_sharded(layer, anchor, root):
    if type(anchor) in (torch.Tensor, nn.Parameter) or not hasattr(anchor, "placements"):
        return
    named = (root if root is not None else layer).named_parameters()
    name = next((name for name, parameter in named if parameter is anchor), "weight")
    raise TypeError(f"{name}: expected a whole tensor, got a sharded one ({type(anchor).__name__}); the 1x1 weights of "
                    f"a model are factorised together, so keep them in one FSDP2 group that is unsharded at that point")
