"""Affine coupling as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable

INTERLEAVED, SHIFT_IN_FRONT, SHIFT_FIRST, INVERSE = 1, 2, 4, 8


def flags_of(layout, order, shift_first, inverse=False):
    """The options of functional.affine_coupling as kernels take them."""
    return ((INTERLEAVED if layout == "interleave" else 0) | (SHIFT_IN_FRONT if order == "shift_scale" else 0)
            | (SHIFT_FIRST if shift_first else 0) | (INVERSE if inverse else 0))


def forward(x, params, shift, logdet, passive, how):
    """The kernel's (y, logdet), without a graph. ``how``: backend, passive channels of x itself, flags, and the scalars
    of the ScaleMap, which torch.compile may have to make anew out of what stands for numbers."""
    backend, kept, flags, scalars = how
    return extension.kernel(backend, "affine_coupling_fwd")(x, params, shift, logdet, passive, kept, flags, *scalars)


@differentiable.direct
class AffineCouplingFunction(torch.autograd.Function):
    """(y, logdet) of x, params (packed, raw of a pair, or additive's shift), shift (of a pair), logdet and passive.

    Saves x and the params as they came.
    """

    @staticmethod
    def forward(ctx, x, params, shift, logdet, passive, how):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, params, shift)
        ctx.how = how
        ctx.passive = None if passive is None else (passive.shape[1], passive.dtype)
        return forward(x, params, shift, logdet, passive, how)

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        x, params, shift = ctx.saved_tensors
        backend, kept, flags, scalars = ctx.how
        need_x, need_params, need_shift, need_logdet, need_passive, _ = ctx.needs_input_grad
        grad_passive = None
        if need_passive and grad_y is not None:
            channels, dtype = ctx.passive
            grad_passive = grad_y.narrow(1, 0, channels).to(dtype)  # a whole slice is an alias, which vmap may lack
        grads = (None, None, None)
        if (grad_y is not None or grad_logdet is not None) and (need_x or need_params or need_shift):
            if differentiable.wanted((grad_y, grad_logdet)):
                own = grad_y
                if grad_y is not None and ctx.passive is not None:
                    own = grad_y.narrow(1, ctx.passive[0], x.shape[1])
                scale = reference.ScaleMap.from_scalars(*scalars)
                grads = differentiable.reference_grads(lambda *inputs: by_reference(*inputs, kept, flags, scale),
                                                       (x, params, shift), (need_x, need_params, need_shift),
                                                       (own, grad_logdet))
            else:
                grads = extension.kernel(backend, "affine_coupling_bwd")(
                    grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift, flags, *scalars)
        grad_x, grad_params, grad_shift = grads
        return (grad_x if need_x else None, grad_params if need_params else None, grad_shift if need_shift else None,
                grad_logdet if need_logdet else None, grad_passive, None)


def by_reference(x, params, shift, kept, flags, scale):
    """(y, logdet), differentiable any number of times."""
    return reference.affine_coupling(
        x, params if shift is None else (params, shift), scale=scale,
        layout="interleave" if flags & INTERLEAVED else "chunk",
        order="shift_scale" if flags & SHIFT_IN_FRONT else "scale_shift",
        shift_first=bool(flags & SHIFT_FIRST), inverse=bool(flags & INVERSE), passive=kept or None)
