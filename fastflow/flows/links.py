"""The steps of a flow as a memory-saving pass sees them.

``link.forward(x, logdet, *tensors)`` returns (z, logdet) and whatever leaves there; ``tensors`` are link.tensors.
``link.undo(z, side)`` is x, without a graph. ``link.rerun(z, side, needs, dtype, *tensors)`` is x too, in that dtype;
on the way it builds the graph that forward built, as far as what is saved in it goes, with an x that requires a
gradient if ``needs``.
"""

import contextlib

import torch

from fastflow.autograd.differentiable import unhooked
from fastflow.flows import memory
from fastflow.nn import InvertibleConv1x1
from fastflow.nn.outputs import in_format_of, over_positions

__all__ = ["ConvLink", "CouplingLink", "Link", "ShapeLink", "SplitLink", "TransformLink"]


class Link:
    heavy = False  # holds a network: worth a z of its own
    sided = False  # a part of the output leaves the flow
    saves_nothing = False
    tensors = ()

    def rerun(self, z, side, needs, dtype, *tensors):
        with torch.no_grad(), unhooked():  # an inverse may take gradients of its own
            x = self.undo(z, side).to(dtype)
        self.forward(_leaf(x, needs), None, *tensors)
        return x


def _leaf(x, needs):
    return x.detach().requires_grad_(needs)


def _add(logdet, more):
    return more if logdet is None else logdet + more


class TransformLink(Link):
    """Any transform, by its own forward and inverse; ``context`` as it takes it."""

    def __init__(self, transform, context=None, *, heavy=True):
        self.transform, self.heavy = transform, heavy
        self.context = context
        if isinstance(context, torch.Tensor):
            self.tensors = (context,)
        modules = transform.modules() if isinstance(transform, torch.nn.Module) else ()
        self.convs = [m for m in modules if isinstance(m, InvertibleConv1x1)]

    def forward(self, x, logdet, *context):
        with memory.saving(None), self._outside_banks():
            z, more = self.transform(x, *(context or (self.context,)))
        return z, _add(logdet, more)

    def undo(self, z, side):
        return self.transform.inverse(z, self.context)[0]

    @contextlib.contextmanager
    def _outside_banks(self):
        """A WeightBank's call has ended by the time of backward. The second run must do as the first did."""
        held = [(m, m._bank) for m in self.convs if m._bank is not None]
        for module, _ in held:
            module._bank = None
        try:
            yield
        finally:
            for module, bank in held:
                module._bank = bank


class ShapeLink(Link):
    """A transform that moves elements about: its log-determinant is 0 and it saves nothing."""

    saves_nothing = True

    def __init__(self, transform):
        self.transform = transform

    def forward(self, x, logdet):
        return self.transform(x)[0], logdet

    def undo(self, z, side):
        return self.transform.inverse(z)[0]


class CouplingLink(Link):
    """An nn.AffineCoupling: one run of the conditioner serves inverse and graph."""

    heavy = True

    def __init__(self, coupling, context=None):
        self.coupling, self.context = coupling, context
        if isinstance(context, torch.Tensor):
            self.tensors = (context,)

    def forward(self, x, logdet, *context):
        return self.coupling(x, *(context or (self.context,)), logdet=logdet)

    def undo(self, z, side):
        return self.coupling.inverse(z, self.context)[0]

    def rerun(self, z, side, needs, dtype, *context):
        return self.coupling.recompute(z, *(context or (self.context,)), needs=needs, dtype=dtype)


class ConvLink(Link):
    """An nn.InvertibleConv1x1 by ``factors`` computed outside, whose ``undo`` the inverse needs.

    Args:
        with_logdet: add the log-determinant; without, that is left to the caller.
    """

    def __init__(self, conv, factors, *, with_logdet):
        self.conv, self.factors, self.with_logdet = conv, factors, with_logdet
        self.tensors = tuple(factors[:2]) if factors.undo is None else (*factors[:2], *factors.undo[:2])

    def forward(self, x, logdet, matrix, offset, *_):
        # Not always the factors' own: hooks on saved tensors may have put copies in their place for the second run.
        z = self.conv.apply_factors(x, self.factors._replace(matrix=matrix, offset=offset))
        if self.with_logdet:
            z, logdet = in_format_of(x, z), _add(logdet, over_positions(self.factors.logabsdet, x))
        return z, logdet

    def undo(self, z, side):
        return self.conv.apply_factors(z, self.factors.undo)


class SplitLink(Link):
    """The splitting half of a flows.Split; the latents leave. ``context`` is for the prior that takes one."""

    heavy = sided = True

    def __init__(self, split, context=None):
        self.split, self.context = split, context
        self.saves_nothing = split.prior is None
        if split.conditional and isinstance(context, torch.Tensor):
            self.tensors = (context,)

    def forward(self, x, logdet, *context):
        x1, z2, logdet = self.split.split(x, logdet, *context)
        return x1, logdet, z2

    def undo(self, z, side):
        return self.split.merge(z, side, None, self.context)[0]

    def rerun(self, z, side, needs, dtype, *context):
        return self.split.recompute(z, side, *context, needs=needs, dtype=dtype)
