"""Glow's step on a CPU, an invertible 1x1 convolution and the coupling with its convolutional network, as steps of a
chain."""

from fastflow import extension, reference
from fastflow.autograd import affine_coupling, chain
from fastflow.autograd.channel_affine import ChannelsStep

__all__ = ["steps"]


def steps(matrix, offset, network, kept, layout, order, shift_first, scale):
    """The step of x (B, C, H, W) with adjacent channels, for operands that fit by construction and that the kernels of
    the CPU take.

    Args:
        matrix, offset: (C, C) and (C,) or None, of the 1x1 convolution.
        network: (w1, b1, w2, b2, w3, b3) as functional.conv_net takes them.
        kept: how many channels pass, the first ones; not 0.
        layout, order, shift_first, scale: of functional.affine_coupling; scale a ScaleMap.
    """
    consts = kept, affine_coupling.flags_of(layout, order, shift_first), scale
    return chain.Step(ChannelsStep, (), (matrix, offset)), chain.Step(ConvCouplingStep, consts, tuple(network))


class ConvCouplingStep:
    """The coupling. Tensors: the network's."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        kept, flags, scale = consts
        params, h1, h2 = extension.kernel("cpu", "conv_net_fwd")(x.narrow(1, 0, kept), *tensors, 0.0, keep)
        y, logdet = extension.kernel("cpu", "affine_coupling_fwd")(x, params, None, logdet, None, kept, flags,
                                                                   *scale.scalars)
        return y, logdet, x, params, h1, h2

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        kept, flags, scale = consts
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
        params = reference.conv_net(x.narrow(1, 0, consts[0]), *tensors)
        return affine_coupling.by_reference(x, params, None, *consts)
