"""Glow's step on a CPU, an invertible 1x1 convolution and the coupling with its convolutional network, as steps of a
chain."""

import torch

from fastflow import extension, reference
from fastflow.autograd import chain
from fastflow.autograd.affine_coupling import INTERLEAVED, SHIFT_FIRST, SHIFT_IN_FRONT

__all__ = ["images", "rows", "steps"]


def steps(matrix, offset, network, kept, layout, order, shift_first, scale):
    """The step of x (B, C, H, W) with adjacent channels, for operands that fit by construction and that the kernels of
    the CPU take.

    Args:
        matrix, offset: (C, C) and (C,) or None, of the 1x1 convolution.
        network: (w1, b1, w2, b2, w3, b3) as functional.conv_net takes them.
        kept: how many channels pass, the first ones; not 0.
        layout, order, shift_first, scale: of functional.affine_coupling; scale a ScaleMap.
    """
    flags = ((INTERLEAVED if layout == "interleave" else 0) | (SHIFT_IN_FRONT if order == "shift_scale" else 0)
             | (SHIFT_FIRST if shift_first else 0))
    return (chain.Step(ChannelsStep, (), (matrix, offset)),
            chain.Step(ConvCouplingStep, (kept, flags, scale, layout, order, shift_first), tuple(network)))


def rows(x):
    """x (B, C, *S) as (B*S, C), a view where the channels are adjacent."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def images(values, like):
    """Rows of as many channels as ``like`` (B, C, *S) has, in its shape."""
    return values.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)


class ChannelsStep:
    """matrix @ x + offset along dim 1. Tensors: matrix, offset."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        matrix, offset = tensors
        values = rows(x)
        y = values @ matrix.t() if offset is None else torch.addmm(offset, values, matrix.t())
        return images(y, x), logdet, x

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        if grad_y is None:
            return None, [None, None]
        (x,), grad = saved, rows(grad_y)
        return (images(grad @ tensors[0], x) if need_x else None,
                [grad.t() @ rows(x) if needs[0] else None, grad.sum(0) if needs[1] else None])

    @staticmethod
    def reference(x, tensors, consts):
        return torch.nn.functional.linear(x.movedim(1, -1), *tensors).movedim(-1, 1), None


class ConvCouplingStep:
    """The coupling. Tensors: the network's."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        kept, flags, scale, *_ = consts
        params, h1, h2 = extension.kernel("cpu", "conv_net_fwd")(x.narrow(1, 0, kept), *tensors, 0.0, keep)
        y, logdet = extension.kernel("cpu", "affine_coupling_fwd")(x, params, None, logdet, None, kept, flags,
                                                                   *scale.scalars)
        return y, logdet, x, params, h1, h2

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        kept, flags, scale, *_ = consts
        if grad_y is None and grad_logdet is None or not (need_x or any(needs)):
            return None, [None] * len(tensors)
        x, params, h1, h2 = saved
        w1, _, w2, _, w3, _ = tensors
        grad_x, grad_params, _ = extension.kernel("cpu", "affine_coupling_bwd")(
            grad_y, grad_logdet, x, params, None, kept, need_x, True, False, flags, *scale.scalars)
        # Hooks on what was saved may have laid the maps out anew.
        through, *found = extension.kernel("cpu", "conv_net_bwd")(
            grad_params, x.narrow(1, 0, kept), w1, w2, w3, h1.contiguous(), h2.contiguous(), 0.0, need_x, any(needs))
        if need_x:
            grad_x.narrow(1, 0, kept).add_(through)
        return grad_x if need_x else None, [grad if need else None for grad, need in zip(found, needs, strict=True)]

    @staticmethod
    def reference(x, tensors, consts):
        kept, _, scale, layout, order, shift_first = consts
        params = reference.conv_net(x.narrow(1, 0, kept), *tensors)
        return reference.affine_coupling(x, params, scale=scale, layout=layout, order=order, shift_first=shift_first,
                                         passive=kept)
