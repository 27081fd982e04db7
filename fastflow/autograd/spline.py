"""Monotonic splines as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable

NO_CLAMP = 0.0  # what the operators take for clamp=None


def forward(backend, x, params, logdet, consts):
    """The kernel's (y, logdet), without a graph."""
    return extension.kernel(backend, "spline_fwd")(x, params, logdet, *consts)


@differentiable.direct
class SplineFunction(torch.autograd.Function):
    """(y, logdet) of x, params and logdet. Saves x and the params as they came.

    ``consts`` is (kind, inverse, tail_bound, min_width, min_height, min_derivative, gain, clamp,
    end_derivative), as the operators take them.
    """

    @staticmethod
    def forward(ctx, x, params, logdet, backend, consts):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, params)
        ctx.backend, ctx.consts = backend, consts
        return forward(backend, x, params, logdet, consts)

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        x, params = ctx.saved_tensors
        needs, grads = ctx.needs_input_grad[:2], (grad_y, grad_logdet)
        grad_carried = grad_logdet if ctx.needs_input_grad[2] else None
        if (grad_y is None and grad_logdet is None) or not any(needs):
            found = None, None
        elif differentiable.wanted(grads):
            found = differentiable.reference_grads(lambda *inputs: _reference(*inputs, ctx.consts), (x, params), needs,
                                                   grads)
        else:
            found = extension.kernel(ctx.backend, "spline_bwd")(grad_y, grad_logdet, x, params, *needs, *ctx.consts)
            found = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*found, grad_carried, None, None)


def _reference(x, params, consts):
    kind, inverse, bound, min_width, min_height, min_derivative, gain, clamp, end_derivative = consts
    return reference.spline(x, params, kind=reference.SPLINES[kind], tail_bound=bound, min_width=min_width,
                            min_height=min_height, min_derivative=min_derivative, gain=gain,
                            clamp=None if clamp == NO_CLAMP else clamp, end_derivative=end_derivative,
                            inverse=inverse)
