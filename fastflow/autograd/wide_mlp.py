"""A fully connected network as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable


def forward(backend, x, weights, biases, activation, keep=False):
    """The kernel's (out, kept), without a graph."""
    return extension.kernel(backend, "wide_mlp_fwd")(x, weights, biases, activation, keep)


class WideMLPFunction(torch.autograd.Function):
    """The output for x and the layers' weights, then their biases. Saves them and the hidden activations."""

    @staticmethod
    def forward(ctx, x, backend, activation, *params):
        layers = len(params) // 2
        out, kept = forward(backend, x, params[:layers], params[layers:], activation, True)
        ctx.save_for_backward(x, *params, *kept)
        ctx.consts = backend, activation, layers
        return out

    @staticmethod
    def backward(ctx, grad):
        backend, activation, layers = ctx.consts
        x, *saved = ctx.saved_tensors
        params, kept = saved[:2 * layers], saved[2 * layers:]
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        if differentiable.wanted((grad,)):
            def network(x, *params):
                return (reference.wide_mlp(x, params[:layers], params[layers:],
                                           activation=reference.LAYER_ACTIVATIONS[activation]),)
            grads = differentiable.reference_grads(network, (x, *params), needs, (grad,))
        else:
            grad_x, found = extension.kernel(backend, "wide_mlp_bwd")(grad, x, params[:layers], kept, activation,
                                                                      needs[0], any(needs[1:]))
            grads = (grad_x, *(found[0::2] + found[1::2] or [None] * (2 * layers)))
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (grads[0], None, None, *grads[1:])
