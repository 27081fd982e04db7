"""An affine coupling with its small fully connected networks as a step of a chain."""

import torch

from fastflow import extension, reference
from fastflow.autograd import chain, mlp
from fastflow.autograd.affine_coupling import INVERSE

__all__ = ["step"]

TANH_BACKWARD = torch.ops.aten.tanh_backward.default


def step(kept, networks, scale, inverse=False, centred=None):
    """The coupling of x (B, D) on the CPU as a chain's step, for layers whose operands fit by construction.

    Args:
        kept: how many features pass, the first ones, or the last ones if negative; not 0.
        networks: of the features that pass, each (weights, biases, activation, False, ()) as mlp.run takes them: one
            whose result is the packed parameters, scales first, or the shift where ``scale`` is additive; or two, of
            the raw scale and of the shift.
        scale: a ScaleMap.
        centred: (function, gain, factor), function "tanh" or "atan": the raw scale r is first made
            factor * function(gain * r), less its mean over the features of a sample. Of one network alone.
    """
    params, shapes = [], []
    for weights, biases, activation, *_ in networks:
        own = [t for pair in zip(weights, biases, strict=True) for t in pair]
        params += own
        shapes.append((reference.ACTIVATIONS.index(activation), len(own)))
    consts = kept, tuple(shapes), INVERSE if inverse else 0, scale, centred
    return chain.Step(AffineStep, consts, tuple(params))


def _passive(x, kept):
    return x[:, :kept] if kept > 0 else x[:, kept:]


def _each(shapes, tensors):
    """(activation, its tensors, where they stand) of each network."""
    at = 0
    for activation, count in shapes:
        yield activation, tensors[at:at + count], slice(at, at + count)
        at += count


def _centre(raw, function, gain, factor):
    """(the log-scale of volume 1, what _uncentre needs)."""
    u = raw if gain == 1.0 else raw * gain
    value = torch.tanh(u) if function == "tanh" else torch.atan(u)
    log_scale = value * factor
    mean = log_scale.sum(1, keepdim=True)
    return torch.sub(log_scale, mean, alpha=1.0 / raw.shape[1]), value if function == "tanh" else u


def _uncentre(grad, known, function, gain, factor):
    """The gradient of raw."""
    grad = torch.sub(grad, grad.sum(1, keepdim=True), alpha=1.0 / grad.shape[1])
    if function == "tanh":
        return TANH_BACKWARD(grad, known).mul_(factor * gain)
    return grad.div_(known.square().add_(1.0)).mul_(factor * gain)


class AffineStep:
    """Tensors: of each network the weight and bias of every layer in turn."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        kept, shapes, flags, scale, centred = consts
        passive, known = _passive(x, kept), None
        made = [extension.kernel("cpu", "mlp_fwd")(passive, own, activation, False, keep)
                for activation, own, _ in _each(shapes, tensors)]
        params, shift = made[0][0], made[1][0] if len(made) > 1 else None
        if centred is not None:
            raw, shift = params.chunk(2, 1)
            params, known = _centre(raw, *centred)
        y, total = extension.kernel("cpu", "affine_coupling_fwd")(
            x, params, shift, logdet if centred is None else None, None, kept, flags, *scale.scalars)
        return y, total if centred is None else logdet, x, params, shift, known, *(hidden for _, hidden in made)

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        kept, shapes, flags, scale, centred = consts
        if centred is not None:
            grad_logdet = None
        if grad_y is None and grad_logdet is None or not (need_x or any(needs)):
            return None, [None] * len(tensors)
        x, params, shift, known, *activations = saved
        grad_x, *grads = extension.kernel("cpu", "affine_coupling_bwd")(
            grad_y, grad_logdet, x, params, shift, kept, need_x, True, shift is not None, flags, *scale.scalars)
        if centred is not None:
            grads = [torch.cat([_uncentre(grads[0], known, *centred), grads[1]], 1)]
        passive, found = _passive(x, kept), []
        for (activation, own, at), grad, hidden in zip(_each(shapes, tensors), grads, activations, strict=False):
            through, of_params = extension.kernel("cpu", "mlp_bwd")(grad, passive, hidden, own, activation, False,
                                                                    need_x, any(needs[at]))
            found += mlp.gradients(of_params, (), needs[at])
            if need_x:
                _passive(grad_x, kept).add_(through)
        return grad_x if need_x else None, found

    @staticmethod
    def reference(x, tensors, consts):
        kept, shapes, flags, scale, centred = consts
        made = [reference.mlp(_passive(x, kept), own[::2], own[1::2], activation=reference.ACTIVATIONS[activation],
                              residual=False) for activation, own, _ in _each(shapes, tensors)]
        if centred is not None:
            raw, shift = made[0].chunk(2, 1)
            made = [_centre(raw, *centred)[0], shift]
        y, logdet = reference.affine_coupling(x, tuple(made) if len(made) > 1 else made[0], scale=scale,
                                              inverse=bool(flags), passive=kept)
        return y, logdet if centred is None else None
