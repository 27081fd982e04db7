"""A fully connected network as one torch.autograd.Function."""

import torch

from fastflow import backends, checks, extension, reference
from fastflow.autograd import differentiable


def check(x, weights, biases, activation, residual):
    """Data, layers and options go together."""
    checks.tensor("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape (B, I), got {tuple(x.shape)}")
    checks.choice("activation", activation, reference.ACTIVATIONS)
    for name, value in (("weights", weights), ("biases", biases)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected a sequence of tensors, got {type(value).__name__}")
    if not weights or len(weights) != len(biases):
        raise ValueError(f"biases: expected one for each of one or more weights, got {len(weights)} weights and "
                         f"{len(biases)} biases")
    if residual and len(weights) % 2:
        raise ValueError(f"weights: expected an even number for a residual network, got {len(weights)}")
    width, last = x.shape[1], len(weights) - 1
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        checks.tensor(f"weights[{index}]", weight)
        if weight.dim() != 2:
            raise ValueError(f"weights[{index}]: expected shape (out, in), got {tuple(weight.shape)}")
        fixed = residual and 0 < index < last
        out = weights[0].shape[0] if fixed else weight.shape[0]
        for name, value, shape in ((f"weights[{index}]", weight, (out, width)), (f"biases[{index}]", bias, (out,))):
            checks.tensor(name, value)
            checks.shape(name, value, shape)
            checks.same_device(name, value, "x", x)
            if value.dtype is not x.dtype:
                raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
        width = out


def forward(backend, x, params, activation, residual, keep=False):
    """The kernel's (y, kept), without a graph."""
    return extension.kernel(backend, "mlp_fwd")(x, params, activation, residual, keep)


class MLPFunction(torch.autograd.Function):
    """y of x and the parameters, weight and bias of every layer in turn. Saves them and the hidden activations."""

    @staticmethod
    def forward(ctx, x, backend, activation, residual, *params):
        y, kept = forward(backend, x, list(params), activation, residual, True)
        ctx.save_for_backward(x, kept, *params)
        ctx.consts = backend, activation, residual
        return y

    @staticmethod
    def backward(ctx, grad):
        x, kept, *params = ctx.saved_tensors
        backend, activation, residual = ctx.consts
        need_x, need_params = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        needs = (need_x, *need_params)
        if differentiable.wanted((grad,)):
            def again(x, *params):
                return (reference.mlp(x, params[::2], params[1::2], activation=reference.ACTIVATIONS[activation],
                                      residual=residual),)
            grads = differentiable.reference_grads(again, (x, *params), needs, (grad,))
        else:
            grad_x, of_params = extension.kernel(backend, "mlp_bwd")(grad, x, kept, params, activation, residual,
                                                                     need_x, any(need_params))
            found = (grad_x, *(of_params if any(need_params) else [None] * len(params)))
            grads = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (grads[0], None, None, None, *grads[1:])


def run(x, weights, biases, activation="relu", residual=False):
    """functional.mlp without its checks, for layers whose operands fit by construction."""
    params = [t for pair in zip(weights, biases, strict=True) for t in pair]
    backend = backends.choose("mlp", x, *params)
    if backend == "reference":
        return reference.mlp(x, weights, biases, activation=activation, residual=residual)
    kind = reference.ACTIVATIONS.index(activation)
    if differentiable.needs_grad(x, *params):
        x, *params = differentiable.distinct(x, *params)
        return MLPFunction.apply(x, backend, kind, residual, *params)
    return forward(backend, x, params, kind, residual)[0]
