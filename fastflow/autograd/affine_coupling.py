"""Affine coupling as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable

INTERLEAVED, SHIFT_IN_FRONT, SHIFT_FIRST, INVERSE = 1, 2, 4, 8


def forward(backend, x, params, shift, logdet, passive, flags, scale):
    """The kernel's (y, logdet), without a graph."""
    return extension.kernel(backend, "affine_coupling_fwd")(x, params, shift, logdet, passive, flags, *scale.scalars)


class AffineCouplingFunction(torch.autograd.Function):
    """(y, logdet) of x, params (packed, raw of a pair, or additive's shift), shift (of a pair), logdet and passive.

    Saves x and the params as they came.
    """

    @staticmethod
    def forward(ctx, x, params, shift, logdet, passive, backend, flags, scale):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, params, shift)
        ctx.consts = backend, flags, scale
        ctx.passive = (0, None) if passive is None else (passive.shape[1], passive.dtype)
        return forward(backend, x, params, shift, logdet, passive, flags, scale)

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        x, params, shift = ctx.saved_tensors
        backend, flags, scale = ctx.consts
        need_x, need_params, need_shift, need_logdet, need_passive = ctx.needs_input_grad[:5]
        channels, passive_dtype = ctx.passive
        grad_carried = grad_logdet if need_logdet else None
        grad_passive = None
        if need_passive and grad_y is not None:
            grad_passive = grad_y[:, :channels].to(passive_dtype)
        needs = (need_x, need_params, need_shift and shift is not None)
        if (grad_y is None and grad_logdet is None) or not any(needs):
            grads = (None, None, None)
        elif differentiable.wanted((grad_y, grad_logdet)):
            own = None if grad_y is None else grad_y[:, channels:]
            grads = differentiable.reference_grads(lambda *inputs: _reference(*inputs, flags, scale),
                                                   (x, params, shift), needs, (own, grad_logdet))
        else:
            grads = extension.kernel(backend, "affine_coupling_bwd")(
                grad_y, grad_logdet, x, params, shift, channels, *needs, flags, *scale.scalars)
            grads = tuple(g if need else None for g, need in zip(grads, needs, strict=True))
        return (*grads, grad_carried, grad_passive, None, None, None)


def _reference(x, params, shift, flags, scale):
    y, logdet = reference.affine_coupling(
        x, params if shift is None else (params, shift), scale=scale,
        layout="interleave" if flags & INTERLEAVED else "chunk",
        order="shift_scale" if flags & SHIFT_IN_FRONT else "scale_shift",
        shift_first=bool(flags & SHIFT_FIRST), inverse=bool(flags & INVERSE))
    return y, logdet
