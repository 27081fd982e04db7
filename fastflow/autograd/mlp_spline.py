"""A spline coupling with a small fully connected network as one torch.autograd.Function.

What it computes are the operations mlp and spline, with the channels moved and split around them. As one node of
autograd it costs a fraction of the six that they are by themselves, on which a step on small data spends its time.
"""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable, mlp
from fastflow.autograd.spline import NO_CLAMP

__all__ = ["run"]

END_DERIVATIVE = 1.0  # the slope at the ends that the splines of nflows, normflows and zuko have


def run(x, order, back, kept, network, spline, inverse=False):
    """(y, logdet) of a coupling of x (B, D) on the CPU, for layers whose operands fit by construction.

    Args:
        order, back: x[:, order] has the passive channels together, x[:, order][:, back] is x; None: they are already.
        kept: how many channels are passive, the first ones, or the last ones if negative. 0: the network sees all
            channels, and all are transformed, as by an autoregressive one with masks.
        network: (weights, biases, activation, residual, masks) as mlp.run takes them, of the passive channels.
        spline: (tail_bound, min_width, min_height, min_derivative, gain, clamp) of functional.spline, kind "rq".
    """
    weights, biases, activation, residual, masks = network
    params = [t for pair in zip(weights, biases, strict=True) for t in pair]
    *constants, clamp = spline
    consts = (0, inverse, *map(float, constants), NO_CLAMP if clamp is None else float(clamp), END_DERIVATIVE)
    how = order, back, kept, (reference.ACTIVATIONS.index(activation), residual), consts
    if differentiable.needs_grad(x, *params):
        x, *tensors = differentiable.distinct(x, *params, *masks)
        return MLPSplineFunction.apply(x, *how, len(params), *tensors)
    return _forward(x, *how, mlp.masked(params, masks), False)[:2]


def _forward(x, order, back, kept, network, consts, params, keep):
    moved = x if order is None else x.index_select(1, order)
    passive, active = _parts(moved, kept)
    raw, activations = extension.kernel("cpu", "mlp_fwd")(passive, params, *network, keep)
    y, logdet = extension.kernel("cpu", "spline_fwd")(active, raw, None, *consts)
    return _joined(passive, y, kept, back), logdet, moved, raw, activations


def _parts(x, kept):
    """The passive channels and the others."""
    if kept == 0:
        return x, x
    if kept > 0:
        return x[:, :kept], x[:, kept:]
    return x[:, kept:], x[:, :kept]


def _joined(passive, active, kept, back):
    if kept == 0:
        return active
    whole = torch.cat([passive, active] if kept > 0 else [active, passive], 1)
    return whole if back is None else whole.index_select(1, back)


class MLPSplineFunction(torch.autograd.Function):
    """(y, logdet) of x and ``count`` parameters, weight and bias of every layer in turn, and masks behind them."""

    @staticmethod
    def forward(ctx, x, order, back, kept, network, consts, count, *tensors):
        ctx.set_materialize_grads(False)
        params = mlp.masked(tensors[:count], tensors[count:])
        y, logdet, *saved = _forward(x, order, back, kept, network, consts, params, True)
        ctx.save_for_backward(x, *saved, order, back, *tensors)
        ctx.consts = kept, network, consts, count
        return y, logdet

    @staticmethod
    def backward(ctx, grad_y, grad_logdet):
        x, moved, raw, activations, order, back, *tensors = ctx.saved_tensors
        kept, network, consts, count = ctx.consts
        params, masks = tensors[:count], tensors[count:]
        need_x, need_params = ctx.needs_input_grad[0], ctx.needs_input_grad[7:7 + count]
        if (grad_y is None and grad_logdet is None) or not (need_x or any(need_params)):
            return (None,) * len(ctx.needs_input_grad)
        if differentiable.wanted((grad_y, grad_logdet)):
            grad_x, *found = differentiable.reference_grads(
                lambda x, *params: _reference(x, mlp.masked(params, masks), order, back, kept, network, consts),
                (x, *params), (need_x, *need_params), (grad_y, grad_logdet))
        else:
            if grad_y is not None and order is not None:
                grad_y = grad_y.index_select(1, order)
            passive, active = _parts(moved, kept)
            grad_passive, grad_active = (None, None) if grad_y is None else _parts(grad_y, kept)
            grad_active, grad_raw = extension.kernel("cpu", "spline_bwd")(grad_active, grad_logdet, active, raw, need_x,
                                                                          True, *consts)
            through, found = extension.kernel("cpu", "mlp_bwd")(
                grad_raw, passive, activations, mlp.masked(params, masks), *network, need_x, any(need_params))
            grad_x = _gradient(through, grad_passive, grad_active, kept, back) if need_x else None
            found = mlp.gradients(found, masks, need_params)
        return (grad_x, None, None, None, None, None, None, *found, *[None] * len(masks))


def _gradient(through, grad_passive, grad_active, kept, back):
    """The gradient of x from those through the network, of what passes and of what is transformed."""
    if kept == 0:
        return through + grad_active
    return _joined(through if grad_passive is None else through + grad_passive, grad_active, kept, back)


def _reference(x, params, order, back, kept, network, consts):
    activation, residual = network
    _, inverse, bound, min_width, min_height, min_derivative, gain, clamp, _ = consts
    passive, active = _parts(x if order is None else x.index_select(1, order), kept)
    raw = reference.mlp(passive, params[::2], params[1::2], activation=reference.ACTIVATIONS[activation],
                        residual=residual)
    y, logdet = reference.spline(active, raw, tail_bound=bound, min_width=min_width, min_height=min_height,
                                 min_derivative=min_derivative, gain=gain, clamp=None if clamp == NO_CLAMP else clamp,
                                 inverse=inverse)
    return _joined(passive, y, kept, back), logdet
