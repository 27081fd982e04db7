"""A convolution of an activated map as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable


def forward(backend, x, weight, bias, consts):
    """The kernel's result, without a graph; consts: stride, padding, transposed, activation, channels_last."""
    return extension.kernel(backend, "activated_conv_fwd")(x, weight, bias, *consts)


@differentiable.direct
class ActivatedConvFunction(torch.autograd.Function):
    """The result for x, weight and bias. Saves the three, and nothing of the activated map."""

    @staticmethod
    def forward(ctx, x, weight, bias, backend, consts):
        ctx.save_for_backward(x, weight, bias)
        ctx.backend, ctx.consts = backend, consts
        return forward(backend, x, weight, bias, consts)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        stride, padding, transposed, activation, _ = ctx.consts
        needs = [need and t is not None for need, t in zip(ctx.needs_input_grad, (x, weight, bias), strict=False)]
        if differentiable.wanted((grad,)):
            options = {"stride": stride, "padding": padding, "transposed": transposed,
                       "activation": reference.LAYER_ACTIVATIONS[activation]}
            grads = differentiable.reference_grads(lambda *operands: (reference.activated_conv(*operands, **options),),
                                                   (x, weight, bias), needs, (grad,))
        else:
            grads = extension.kernel(ctx.backend, "activated_conv_bwd")(
                grad, x, weight, stride, padding, transposed, activation, needs[0], needs[1] or needs[2])
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*grads, None, None)
