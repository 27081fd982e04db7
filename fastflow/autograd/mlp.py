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


def factors(masks, like):
    """The masks in the dtype of the weights: to multiply by booleans torch makes such a copy every time."""
    return [m if m.dtype is like.dtype else m.to(like.dtype) for m in masks]


def masked(params, masks):
    """The parameters, every weight times its mask where there are masks, of :func:`factors`."""
    params = list(params)
    if masks:
        params[::2] = torch._foreach_mul(params[::2], list(masks))
    return params


def gradients(found, masks, needs):
    """The kernel's gradients of masked parameters as those of the parameters themselves, None where not needed."""
    if not any(needs):
        return [None] * len(needs)
    return [g if need else None for g, need in zip(masked(found, masks), needs, strict=True)]


@differentiable.direct
class MLPFunction(torch.autograd.Function):
    """y of x and ``count`` parameters, weight and bias of every layer in turn, and masks of the weights or none behind
    them. Saves them, the hidden activations and the masked weights."""

    @staticmethod
    def forward(ctx, x, backend, activation, residual, count, *tensors):
        masks = tensors[count:]
        params = masked(tensors[:count], masks)
        y, kept = forward(backend, x, params, activation, residual, True)
        ctx.save_for_backward(x, kept, *tensors, *(params[::2] if masks else ()))
        ctx.consts = backend, activation, residual, count
        return y

    @staticmethod
    def backward(ctx, grad):
        x, kept, *tensors = ctx.saved_tensors
        backend, activation, residual, count = ctx.consts
        params, masks = tensors[:count], tensors[count:count + count // 2]
        need_x, need_params = ctx.needs_input_grad[0], ctx.needs_input_grad[5:5 + count]
        if differentiable.wanted((grad,)):
            def again(x, *params):
                params = masked(params, masks)
                return (reference.mlp(x, params[::2], params[1::2], activation=reference.ACTIVATIONS[activation],
                                      residual=residual),)
            grad_x, *found = differentiable.reference_grads(again, (x, *params), (need_x, *need_params), (grad,))
        else:
            if masks:
                params[::2] = tensors[count + len(masks):]
            grad_x, found = extension.kernel(backend, "mlp_bwd")(grad, x, kept, params, activation, residual, need_x,
                                                                 any(need_params))
            grad_x, found = grad_x if need_x else None, gradients(found, masks, need_params)
        return (grad_x, None, None, None, None, *found, *[None] * len(masks))


def run(x, weights, biases, activation="relu", residual=False, masks=()):
    """functional.mlp without its checks, for layers whose operands fit by construction; every weight times its mask if
    there are masks."""
    params = [t for pair in zip(weights, biases, strict=True) for t in pair]
    backend, masks = backends.choose("mlp", x, *params), factors(masks, x)
    if backend == "reference":
        params = masked(params, masks)
        return reference.mlp(x, params[::2], params[1::2], activation=activation, residual=residual)
    kind = reference.ACTIVATIONS.index(activation)
    if differentiable.needs_grad(x, *params):
        x, *tensors = differentiable.distinct(x, *params, *masks)
        return differentiable.apply(MLPFunction, x, backend, kind, residual, len(params), *tensors)
    return forward(backend, x, masked(params, masks), kind, residual)[0]
