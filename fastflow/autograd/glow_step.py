"""Glow's step on a CPU, an invertible 1x1 convolution and the coupling with its convolutional network, as a step of a
chain."""

import torch.nn.functional as F

from fastflow import extension, reference
from fastflow.autograd import affine_coupling, chain

__all__ = ["step"]


def step(matrix, offset, network, kept, layout, order, shift_first, scale):
    """The step of x (B, C, H, W) with adjacent channels, for operands that fit by construction and that the kernels of
    the CPU take.

    Args:
        matrix, offset: (C, C) and (C,) or None, of the 1x1 convolution.
        network: (w1, b1, w2, b2, w3, b3) as functional.conv_net takes them.
        kept: how many channels pass, the first ones; not 0.
        layout, order, shift_first, scale: of functional.affine_coupling; scale a ScaleMap.
    """
    consts = kept, affine_coupling.flags_of(layout, order, shift_first), scale
    return chain.Step(GlowStep, consts, (matrix, offset, *network))


class GlowStep:
    """The convolution and the coupling. Tensors: matrix, offset, and the network's."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        kept, flags, scale = consts
        run = extension.kernel("cpu", "glow_step_fwd")
        return *run(x, *tensors, logdet, kept, keep, flags, *scale.scalars), x

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        kept, flags, scale = consts
        need_matrix, need_weights = any(needs[:2]), any(needs[2:])
        if grad_y is None and grad_logdet is None or not (need_x or need_matrix or need_weights):
            return None, [None] * len(tensors)
        mixed, params, h1, h2, x = saved
        matrix, _, w1, _, w2, _, w3, _ = tensors
        # Hooks on what was saved may have laid the maps out anew.
        grad_x, *found = extension.kernel("cpu", "glow_step_bwd")(
            grad_y, grad_logdet, x, matrix, w1, w2, w3, mixed, params, h1.contiguous(), h2.contiguous(), kept, need_x,
            need_matrix, need_weights, flags, *scale.scalars)
        return grad_x if need_x else None, [grad if need else None for grad, need in zip(found, needs, strict=True)]

    @staticmethod
    def reference(x, tensors, consts):
        x = F.linear(x.movedim(1, -1), *tensors[:2]).movedim(-1, 1)
        params = reference.conv_net(x.narrow(1, 0, consts[0]), *tensors[2:])
        return affine_coupling.by_reference(x, params, None, *consts)
