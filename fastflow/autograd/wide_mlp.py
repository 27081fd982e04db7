"""A fully connected network as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable


def forward(backend, x, weights, biases, activation, keep=False):
    """The kernel's (out, kept), without a graph."""
    return extension.kernel(backend, "wide_mlp_fwd")(x, weights, biases, activation, keep)


def hidden_values(kept, activation):
    """The activations of the hidden layers among what a kernel has kept: of silu their slopes lie between."""
    return kept[::activation]


@differentiable.direct
class WideMLPFunction(torch.autograd.Function):
    """The output for x and the layers' weights, then their biases; with ``hidden`` the activations of the hidden layers
    behind it. Saves them all but the output."""

    @staticmethod
    def forward(ctx, x, backend, activation, hidden, *params):
        ctx.set_materialize_grads(False)
        layers = len(params) // 2
        out, kept = forward(backend, x, params[:layers], params[layers:], activation, True)
        ctx.save_for_backward(x, *params, *kept)
        ctx.consts = backend, activation, hidden, layers
        return (out, *hidden_values(kept, activation)) if hidden else out

    @staticmethod
    def backward(ctx, *grads):
        backend, activation, hidden, layers = ctx.consts
        x, *saved = ctx.saved_tensors
        params, kept = saved[:2 * layers], saved[2 * layers:]
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if all(g is None for g in grads):
            found = [None] * len(needs)
        elif differentiable.wanted(grads):
            def network(x, *params):
                results = reference.wide_mlp(x, params[:layers], params[layers:], hidden=hidden,
                                             activation=reference.LAYER_ACTIVATIONS[activation])
                return (results[0], *results[1]) if hidden else (results,)
            found = differentiable.reference_grads(network, (x, *params), needs, grads)
        else:
            grad, *by_hidden = grads
            if grad is None:
                grad = x.new_zeros(x.shape[0], params[layers - 1].shape[0])
            if any(g is not None for g in by_hidden):
                values = hidden_values(kept, activation)
                by_hidden = [torch.zeros_like(h) if g is None else g for g, h in zip(by_hidden, values, strict=True)]
            else:
                by_hidden = []
            grad_x, of_params = extension.kernel(backend, "wide_mlp_bwd")(
                grad, by_hidden, x, params[:layers], kept, activation, needs[0], any(needs[1:]))
            found = (grad_x, *(of_params[0::2] + of_params[1::2] or [None] * (2 * layers)))
            found = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (found[0], None, None, None, *found[1:])
