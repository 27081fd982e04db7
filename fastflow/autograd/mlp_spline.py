"""A spline coupling with a small fully connected network as a step of a chain, and by itself.

What it computes are the operations mlp and spline, with the channels moved and split around them. In one node of
autograd it costs a fraction of the six that they are by themselves, on which a step on small data spends its time.
"""

import torch

from fastflow import extension, reference
from fastflow.autograd import chain, mlp
from fastflow.autograd.spline import NO_CLAMP

__all__ = ["run", "step"]

END_DERIVATIVE = 1.0  # the slope at the ends that the splines of nflows, normflows and zuko have


def run(x, order, back, kept, network, spline, inverse=False):
    """(y, logdet) of a coupling of x (B, D) on the CPU, for layers whose operands fit by construction; see
    :func:`step`."""
    return chain.run(x, (step(order, back, kept, network, spline, inverse),))


def step(order, back, kept, network, spline, inverse=False):
    """The coupling as a chain's step.

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
    options = (0, inverse, *map(float, constants), NO_CLAMP if clamp is None else float(clamp), END_DERIVATIVE)
    consts = kept, (reference.ACTIVATIONS.index(activation), residual), options, len(params)
    return chain.Step(SplineStep, consts, (order, back, *params, *mlp.factors(masks, weights[0])))


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


class SplineStep:
    """Tensors: order, back, weight and bias of every layer in turn, and masks behind them."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        order, back, *own = tensors
        kept, network, options, count = consts
        passive, active = _parts(x if order is None else x.index_select(1, order), kept)
        params = mlp.masked(own[:count], own[count:])
        raw, activations = extension.kernel("cpu", "mlp_fwd")(passive, params, *network, keep)
        y, logdet = extension.kernel("cpu", "spline_fwd")(active, raw, logdet, *options)
        weights = params[::2] if own[count:] else ()
        return _joined(passive, y, kept, back), logdet, passive, active, raw, activations, *weights

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        order, back, *own = tensors
        passive, active, raw, activations, *weights = saved
        kept, network, options, count = consts
        needs = needs[2:2 + count]
        if not (need_x or any(needs)):
            return None, [None] * len(tensors)
        params, masks = own[:count], own[count:]
        if masks:
            params[::2] = weights
        if grad_y is not None and order is not None:
            grad_y = grad_y.index_select(1, order)
        grad_passive, grad_active = (None, None) if grad_y is None else _parts(grad_y, kept)
        grad_active, grad_raw = extension.kernel("cpu", "spline_bwd")(grad_active, grad_logdet, active, raw, need_x,
                                                                      True, *options)
        through, found = extension.kernel("cpu", "mlp_bwd")(grad_raw, passive, activations, params, *network, need_x,
                                                            any(needs))
        grad_x = _gradient(through, grad_passive, grad_active, kept, back) if need_x else None
        return grad_x, [None, None, *mlp.gradients(found, masks, needs), *[None] * len(masks)]

    @staticmethod
    def reference(x, tensors, consts):
        order, back, *own = tensors
        kept, (activation, residual), options, count = consts
        _, inverse, bound, min_width, min_height, min_derivative, gain, clamp, _ = options
        params = mlp.masked(own[:count], own[count:])
        passive, active = _parts(x if order is None else x.index_select(1, order), kept)
        raw = reference.mlp(passive, params[::2], params[1::2], activation=reference.ACTIVATIONS[activation],
                            residual=residual)
        y, logdet = reference.spline(active, raw, tail_bound=bound, min_width=min_width, min_height=min_height,
                                     min_derivative=min_derivative, gain=gain, inverse=inverse,
                                     clamp=None if clamp == NO_CLAMP else clamp)
        return _joined(passive, y, kept, back), logdet


def _gradient(through, grad_passive, grad_active, kept, back):
    """The gradient of x from those through the network, of what passes and of what is transformed."""
    if kept == 0:
        return through + grad_active
    return _joined(through if grad_passive is None else through + grad_passive, grad_active, kept, back)
