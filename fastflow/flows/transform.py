"""What a transform is, and how transforms are put together."""

from typing import Protocol, runtime_checkable

import torch
from torch import nn

from fastflow import checks
from fastflow.flows import fused, memory, sequence
from fastflow.flows.contexts import OWN, shared, takes_context
from fastflow.flows.logdets import zero_logdet
from fastflow.nn.weight_bank import BESIDES

__all__ = ["Compose", "Inverse", "Transform", "data_shape", "initialize", "noise_shape"]


@runtime_checkable
class Transform(Protocol):
    """An invertible map between data and noise; any object with these two methods is one.

    The log-determinants are (B,), in nats, and opposite: t(x) = (z, l) and t.inverse(z) = (x, -l). A transform whose
    noise is made of several latents packed as one (B, D) tensor also has ``unpack(z)``; one with data-dependent
    parameters has ``initialize(x, context=None)``, which sets them from a batch and returns z; one whose noise has
    another shape than its data has ``noise_shape(event_shape)``, shapes without the batch dimension, and for use in an
    :class:`Inverse` the other way ``data_shape(event_shape)``; one that only runs others in turn has ``parts()``, which
    lists them.

    Behind a conditional base, and in a :class:`Compose` with others that take one, a transform is handed the context
    where it takes one, else None. ``takes_context``, True or False, says so, in a transform or in a network inside one;
    of a module without that attribute its parts say it, or, if it is a class of your own, a forward of more than one
    input.
    """

    def __call__(self, x, context=None):
        """Data to noise: (z, log|det dz/dx|)."""

    def inverse(self, z, context=None):
        """Noise to data: (x, log|det dx/dz|)."""


def check_transform(name, value):
    """``value`` is a transform."""
    if not isinstance(value, Transform) or not callable(value):
        raise TypeError(f"{name}: expected a transform (callable, with a method inverse), got {type(value).__name__}")


@torch.no_grad()
def initialize(transform, x, context=None):
    """Set the data-dependent parameters of ``transform`` from the batch x, if it has any, and return z."""
    if hasattr(transform, "initialize"):
        return transform.initialize(x, context)
    return transform(x, context)[0]


def noise_shape(transform, event_shape):
    """The shape of one z for data whose shape is ``event_shape``."""
    return transform.noise_shape(event_shape) if hasattr(transform, "noise_shape") else tuple(event_shape)


def data_shape(transform, event_shape):
    """The shape of one x for noise whose shape is ``event_shape``."""
    return transform.data_shape(event_shape) if hasattr(transform, "data_shape") else tuple(event_shape)


def knows_data_shape(transform, forward=True):
    """Whether :func:`data_shape` is sure, or :func:`noise_shape` with ``forward`` false: each part tells its shapes, or
    is of a class of ours that keeps them."""
    if isinstance(transform, Inverse):
        return knows_data_shape(transform.transform, not forward)
    if isinstance(transform, Compose):
        return all(knows_data_shape(part, forward) for part in transform.transforms)
    if isinstance(transform, _Foreign):
        transform = transform.transform
    tells = hasattr(transform, "noise_shape"), hasattr(transform, "data_shape")
    return tells[forward] or (not any(tells) and type(transform).__module__.startswith(OWN))


class Compose(nn.Module):
    """The transforms one after the other, first to last from data to noise; log-determinants add up. A context goes to
    those that take one.

    Couplings with small fully connected conditioners on (B, D) data, and the ActNorms among them, run as one kernel
    where nothing stands against it (:func:`functional.mlp_flow`); :meth:`explain` says what does.

    Args:
        transforms: any number of transforms. Those that are modules become submodules.
        event_shape: the shape of one x, for an error that speaks of it where the first transform would speak of another
            or of its own part of x; None for whatever that takes.
    """

    saves_memory = True
    event_shape = None

    def __init__(self, *transforms, event_shape=None):
        super().__init__()
        if event_shape is not None:
            self.event_shape = checks.counts("event_shape", event_shape)
        for index, transform in enumerate(transforms):
            check_transform(f"transforms[{index}]", transform)
        self.transforms = nn.ModuleList(t if isinstance(t, nn.Module) else _Foreign(t) for t in transforms)
        for transform in self.transforms:
            takes_context(transform)  # of whose classes torch.compile then knows it

    def forward(self, x, context=None):
        mode = memory.active()
        if mode is not None:
            self._check(x)
            parts = self.parts()
            return sequence.run(fused.runs(parts, x, context, True) if mode.name == "save_z" else parts, x, context)
        pieces, total = fused.runs(self.transforms, x, context), None
        if type(pieces) is not list or len(pieces) != 1:  # one kernel fits x as it is
            self._check(x)
        for transform, own in zip(pieces, shared(pieces, context), strict=True):
            x, logdet = transform(x, own)
            total = logdet if total is None else total + logdet
        return x, zero_logdet(x) if total is None else total

    def inverse(self, z, context=None):
        pieces, total = fused.runs(self.transforms, z, context), None
        for transform, own in zip(reversed(pieces), reversed(shared(pieces, context)), strict=True):
            z, logdet = transform.inverse(z, own)
            total = logdet if total is None else total + logdet
        return z, zero_logdet(z) if total is None else total

    def parts(self):
        """The transforms in order, in place of a composition its own."""
        return sequence.flatten(self.transforms)

    def explain(self, x, context=None):
        """One line: which layers a call with x and context runs as one kernel, and why not the others."""
        return fused.explain(self, x, context)

    def initialize(self, x, context=None):
        self._check(x)
        for transform, own in zip(self.transforms, shared(self.transforms, context), strict=True):
            x = initialize(transform, x, own)
        return x

    def noise_shape(self, event_shape):
        for transform in self.transforms:
            event_shape = noise_shape(transform, event_shape)
        return event_shape

    def data_shape(self, event_shape):
        for transform in reversed(self.transforms):
            event_shape = data_shape(transform, event_shape)
        return event_shape

    def unpack(self, z):
        """The latents that z (B, D) packs: those of the last transform."""
        last = self.transforms[-1] if len(self.transforms) else None
        return last.unpack(z) if hasattr(last, "unpack") else [z]

    def _check(self, x):
        if self.event_shape is not None:
            checks.tensor("x", x, floating=False)
            checks.events("x", x, self.event_shape)


class Inverse(nn.Module):
    """The transform run the other way: Inverse(t)(x) is t.inverse(x).

    Data-dependent layers inside are not initialised, because no data reach their input.
    """

    def __init__(self, transform):
        super().__init__()
        check_transform("transform", transform)
        self.transform = transform

    def forward(self, x, context=None):
        return self.transform.inverse(x, context)

    def inverse(self, z, context=None):
        return self.transform(z, context)

    def noise_shape(self, event_shape):
        """The transform's ``data_shape`` of it, where shapes change, else the shape itself."""
        return data_shape(self.transform, event_shape)

    def data_shape(self, event_shape):
        return noise_shape(self.transform, event_shape)

    def parts(self):
        """The parts of the transform, each the other way, in the order in which they run then."""
        parts = sequence.flatten([self.transform])
        return [self] if parts == [self.transform] else [Inverse(part) for part in reversed(parts)]


class _Foreign(nn.Module):
    """A transform that is no module, in the shape of one."""

    def __init__(self, transform):
        super().__init__()
        self.transform = transform

    @property
    def takes_context(self):
        return takes_context(self.transform)

    def forward(self, x, context=None):
        return self.transform(x, context)

    def inverse(self, z, context=None):
        return self.transform.inverse(z, context)

    def __getattr__(self, name):
        if name in BESIDES:
            return getattr(self.__dict__["transform"], name)
        return super().__getattr__(name)
