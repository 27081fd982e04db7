"""One step of Glow, and whether its passes go through one node of autograd."""

import operator

import torch
from torch import nn

from fastflow import backends
from fastflow.autograd import chain, glow_step
from fastflow.flows.links import ConvLink, CouplingLink, Link
from fastflow.nn import ActNorm, AffineCoupling, ConvNet, InvertibleConv1x1
from fastflow.nn.channel_affine import deferrable
from fastflow.nn.hooks import is_hooked

__all__ = ["GlowStep", "in_the_way", "links"]

_SHAPE = operator.attrgetter("shape")


class GlowStep(nn.Module):
    """One step of flow: ActNorm folded into an invertible 1x1 convolution, then an affine coupling.

    Args:
        channels: C >= 2.
        conditioner: network of the coupling, from C // 2 channels to twice the rest.
        parametrization: of the convolution, "plain" or "plu".
        coupling: further keyword arguments of nn.AffineCoupling.
    """

    def __init__(self, channels, conditioner, *, parametrization="plain", **coupling):
        super().__init__()
        self.conv = InvertibleConv1x1(channels, parametrization, actnorm=ActNorm(channels))
        self.coupling = AffineCoupling(conditioner, **coupling)

    def forward(self, x, context=None):
        x, logdet = self.conv(x)
        return self.coupling(x, context, logdet=logdet)

    def inverse(self, z, context=None):
        z, logdet = self.coupling.inverse(z, context)
        x, more = self.conv.inverse(z)
        return x, logdet + more

    def parts(self):
        return [self.conv, self.coupling]

    def initialize(self, x, context=None):
        return self.coupling(self.conv.initialize(x), context)[0]


def links(step, factors, x, context, inverts):
    """A GlowStep as links of a pass (flows.memory) without the convolution's log-determinant, which is left to the
    caller: one link where the kernels of the CPU take all of it, else two."""
    if not inverts:
        reason, network = _network_of(step, x, context)
        if reason is None and _of_x(x, factors.matrix, factors.offset):
            return (StepLink(step.coupling, network, factors),)
    return ConvLink(step.conv, factors, with_logdet=False), CouplingLink(step.coupling, context)


def in_the_way(step, x, context=None):
    """Why a call of the step with x does not go through one node of autograd, or None; not looked at is what the
    factors of its 1x1 convolution will be. Passes of memory="invert" never go so."""
    return _network_of(step, x, context)[0]


def _network_of(step, x, context):
    """(what :func:`in_the_way` answers, the network's parameters where that is None)."""
    coupling, conv = step._modules["coupling"], step._modules["conv"]
    network = coupling._modules.get("conditioner")
    reason = _unlike(conv, coupling, network, x, context)
    if reason is not None:
        return reason, None
    params = network.parameters_in_turn()
    half, hidden = x.shape[1] // 2, params[0].shape[0]
    outputs = coupling.params_per_channel * (x.shape[1] - half)
    shapes = ((hidden, half, 3, 3), (hidden,), (hidden, hidden, 1, 1), (hidden,), (outputs, hidden, 3, 3), (outputs,))
    if x.stride(1) != 1 or not _of_x(x, *params) or any(map(operator.ne, map(_SHAPE, params), shapes)):
        return "its operands do not go together", None  # an error that the parts themselves explain
    for op, operands in (("conv_net", (x, *params)), ("affine_coupling", (x,))):
        backend, reason = backends.prefers(op, *operands)
        if backend != "cpu":
            return f"{op}: {reason}", None
    return None, params


def _unlike(conv, coupling, network, x, context):
    """Why these modules are not the plain ones that the kernel computes, or the call is not, or None."""
    if type(coupling) is not AffineCoupling or type(network) is not ConvNet:
        return "it is no affine coupling with a ConvNet"
    if type(conv).apply_factors is not InvertibleConv1x1.apply_factors or "apply_factors" in vars(conv):
        return "its 1x1 convolution has a method of its own"
    if coupling.split != "channel" or coupling.flip or x.shape[1] < 2 or x.shape[1] != conv.channels:
        return "its split is not into the first channels and the rest"
    shift = network._modules["context"]
    if context is not None or shift.layer is not None:
        return "it has a context"
    if torch.compiler.is_compiling():
        return "torch.compile makes nodes of its own"
    if deferrable(x):
        return "the gradients of all 1x1 weights are computed at once"
    if (is_hooked(coupling) or is_hooked(network) or is_hooked(shift) or not network.is_as_made()
            or nn.modules.module._has_any_global_hook()):
        return "a layer is hooked or replaced"
    return None


def _of_x(x, *tensors):
    """Whether the tensors, None among them, are such as a kernel reads beside x."""
    return backends.needs_reference(tensors) is None and all(
        t is None or (t.dtype is x.dtype and t.device == x.device and t.layout is torch.strided) for t in tensors)


class StepLink(Link):
    """A GlowStep's convolution by ``factors`` computed outside, and its coupling, as one node of autograd."""

    heavy = True

    def __init__(self, coupling, network, factors):
        self.coupling, self.network, self.tensors = coupling, network, (factors.matrix, factors.offset)

    def forward(self, x, logdet, matrix, offset):
        c = self.coupling
        step = glow_step.step(matrix, offset, self.network, x.shape[1] // 2, c.layout, c.order,
                              c.shift_first, c.scale)
        return chain.run(x, [step], logdet)
