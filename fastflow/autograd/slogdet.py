"""Batched log-determinants and inverses as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable


@differentiable.direct
class SlogdetFunction(torch.autograd.Function):
    """(sign, log|det|, inverse) of weight; the inverse is saved, for it is the gradient's transpose."""

    @staticmethod
    def forward(ctx, weight, backend):
        ctx.set_materialize_grads(False)
        sign, logabsdet, inverse = extension.kernel(backend, "slogdet_fwd")(weight, True)
        ctx.save_for_backward(weight, inverse)
        ctx.backend = backend
        ctx.mark_non_differentiable(sign)
        return sign, logabsdet, inverse

    @staticmethod
    def backward(ctx, grad_sign, grad_logabsdet, grad_inverse):
        if grad_logabsdet is None and grad_inverse is None:
            return None, None
        weight, inverse = ctx.saved_tensors
        if differentiable.wanted((grad_logabsdet, grad_inverse)):
            grads = differentiable.reference_grads(lambda w: reference.slogdet_inverse(w)[1:], (weight,), (True,),
                                                   (grad_logabsdet, grad_inverse))
            return grads[0], None
        grad = None if grad_logabsdet is None else grad_logabsdet[..., None, None] * inverse.mT
        if grad_inverse is not None:
            through = SlogdetFunction.through_inverse(weight, inverse, grad_inverse, ctx.backend)
            grad = -through if grad is None else grad - through
        return grad.to(weight.dtype), None

    @staticmethod
    def through_inverse(weight, inverse, grad, backend):
        """W^-T grad W^-T. The inverse is rounded once, so where float64 costs little it is computed there again."""
        if inverse.dtype == torch.float32 and weight.shape[-1] <= reference.FLOAT64_UP_TO:
            inverse, grad = extension.kernel(backend, "slogdet_fwd")(weight.double(), True)[2], grad.double()
        with reference.full_precision(weight.device.type):
            return inverse.mT @ grad @ inverse.mT


@differentiable.direct
class PluWeightFunction(torch.autograd.Function):
    """W = P L U from its parameters; perm and sign_s carry no gradient."""

    @staticmethod
    def forward(ctx, lower, upper, log_s, sign_s, perm, backend):
        ctx.save_for_backward(lower, upper, log_s, sign_s, perm)
        ctx.backend = backend
        return extension.kernel(backend, "plu_weight_fwd")(lower, upper, log_s, sign_s, perm)

    @staticmethod
    def backward(ctx, grad_weight):
        lower, upper, log_s, sign_s, perm = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if differentiable.wanted((grad_weight,)):
            grads = differentiable.reference_grads(lambda *p: (reference.plu_weight(*p, sign_s, perm),),
                                                   (lower, upper, log_s), needs, (grad_weight,))
        else:
            grads = extension.kernel(ctx.backend, "plu_weight_bwd")(grad_weight, lower, upper, log_s, sign_s, perm)
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*grads, None, None, None)
