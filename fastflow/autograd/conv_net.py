"""Glow's convolutional conditioner as one torch.autograd.Function.

A kernel computes in x's dtype; under autocast the parameters may be of another, which their gradients have.
"""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable


def forward(backend, operands, slope, keep=False):
    """The kernel's (out, h1, h2), without a graph; the maps h1 and h2 are empty unless kept."""
    return extension.kernel(backend, "conv_net_fwd")(*operands, slope, keep)


@differentiable.direct
class ConvNetFunction(torch.autograd.Function):
    """The output for x, w1, b1, w2, b2, w3, b3. Saves them (but not the biases) and both hidden maps."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, w3, b3, backend, slope):
        out, h1, h2 = forward(backend, (x, w1, b1, w2, b2, w3, b3), slope, True)
        ctx.save_for_backward(x, w1, b1, w2, b2, w3, b3, h1, h2)
        ctx.consts = backend, slope
        return out

    @staticmethod
    def backward(ctx, grad):
        *inputs, h1, h2 = ctx.saved_tensors
        h1, h2 = h1.contiguous(), h2.contiguous()  # hooks may have laid them out anew
        backend, slope = ctx.consts
        needs = ctx.needs_input_grad[:7]
        if differentiable.wanted((grad,)):
            grads = differentiable.reference_grads(
                lambda x, *params: (reference.conv_net(x, *(p.to(x.dtype) for p in params), negative_slope=slope),),
                inputs, needs, (grad,))
        else:
            x, w1, _, w2, _, w3, _ = inputs
            grads = extension.kernel(backend, "conv_net_bwd")(grad, x, w1, w2, w3, h1, h2, slope, needs[0],
                                                              any(needs[1:]))
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (*grads, None, None)
