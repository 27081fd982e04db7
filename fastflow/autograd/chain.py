"""Layers in a row as one torch.autograd.Function.

On small data a node of autograd costs about what the kernel inside it does.
"""

from typing import NamedTuple

import torch

from fastflow.autograd import differentiable

__all__ = ["Step", "run"]


class Step(NamedTuple):
    """A layer from x to y, both (B, D) or (B, C, *S).

    ``kind`` is a class with static methods, of which none records a graph but ``reference`` for the one that is on:

    - forward(x, logdet, tensors, consts, keep) gives y, the sum of logdet (B,) and the layer's own, either of which may
      be None, and what backward needs beside the tensors, always as many; without ``keep`` some of it may be empty.
    - backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs) gives the gradients of x and of each tensor,
      None where not needed. Either of the incoming ones may be None.
    - reference(x, tensors, consts) gives y and the layer's log-determinant (B,), or None, by differentiable operations.
    """

    kind: type
    consts: tuple
    tensors: tuple  # parameters, and whatever else the layer consists of; None allowed


def run(x, steps, logdet=None):
    """(y, logdet (B,)) of x through all steps, for operands that fit by construction; to a ``logdet`` that is given
    those of the steps are added. It is None where neither is."""
    tensors = [t for step in steps for t in step.tensors]
    shapes = tuple((kind, consts, len(own)) for kind, consts, own in steps)
    if differentiable.needs_grad(x, logdet, *tensors):
        x, logdet, *tensors = differentiable.distinct(x, logdet, *tensors)
        return differentiable.apply(ChainFunction, x, logdet, shapes, *tensors)
    return _forward(x, logdet, shapes, tensors, False)[:2]


def _forward(x, logdet, shapes, tensors, keep):
    saved, at = [], 0
    for kind, consts, count in shapes:
        x, logdet, *made = kind.forward(x, logdet, tensors[at:at + count], consts, keep)
        saved.append(made)
        at += count
    return x, logdet, saved


def _reference(x, logdet, shapes, tensors):
    at = 0
    for kind, consts, count in shapes:
        x, own = kind.reference(x, tensors[at:at + count], consts)
        if own is not None:
            logdet = own if logdet is None else logdet + own
        at += count
    return x, logdet


@differentiable.direct
class ChainFunction(torch.autograd.Function):
    """(y, logdet) of x, a logdet or None, and the tensors of all steps. shapes: (kind, constants, number of tensors) of
    each."""

    @staticmethod
    def forward(ctx, x, logdet, shapes, *tensors):
        ctx.set_materialize_grads(False)
        y, logdet, saved = _forward(x, logdet, shapes, tensors, True)
        ctx.save_for_backward(x, *tensors, *(t for made in saved for t in made))
        ctx.shapes, ctx.counts = shapes, [len(made) for made in saved]
        return y, logdet

    @staticmethod
    def backward(ctx, grad, grad_logdet):
        needs_x, needs_logdet, _, *needs = ctx.needs_input_grad
        through = grad_logdet if needs_logdet else None
        if grad is None and grad_logdet is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[:len(needs)], rest[len(needs):]
        if differentiable.wanted((grad, grad_logdet)):
            grad, *grads = differentiable.reference_grads(lambda x, *own: _reference(x, None, ctx.shapes, own),
                                                          (x, *tensors), (needs_x, *needs), (grad, grad_logdet))
            return (grad, through, None, *grads)
        grads, at, end = [None] * len(needs), len(needs), len(saved)
        for (kind, consts, count), made in zip(reversed(ctx.shapes), reversed(ctx.counts), strict=True):
            at, end = at - count, end - made
            need_x, own = needs_x or any(needs[:at]), slice(at, at + count)
            grad, grads[own] = kind.backward(grad, grad_logdet, tensors[own], saved[end:end + made], consts, need_x,
                                             needs[own])
            if not need_x:
                break
        return (grad, through, None, *grads)
