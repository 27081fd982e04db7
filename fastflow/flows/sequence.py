"""Any sequence of transforms in a memory mode."""

from torch import nn

from fastflow.flows import memory
from fastflow.flows.contexts import shared
from fastflow.flows.links import ConvLink, CouplingLink, ShapeLink, TransformLink
from fastflow.flows.logdets import zero_logdet
from fastflow.nn import ActNorm, AffineCoupling, InvertibleConv1x1
from fastflow.nn.factors import factorize
from fastflow.nn.hooks import is_hooked

__all__ = ["flatten", "run"]


def flatten(transforms):
    """The transforms, each replaced by its ``parts()`` if it has such a method and no hooks, which belong to the whole
    (those of FSDP2 among them)."""
    return [part for t in transforms for part in (t.parts() if hasattr(t, "parts") and not (
        isinstance(t, nn.Module) and is_hooked(t)) else [t])]


def run(transforms, x, context=None):
    """(z, logdet) of x through the transforms in the memory mode in force.

    What holds no network (1x1 convolutions, ActNorm, permutations) shares the kept z of the coupling behind it. A
    transform with the attribute ``saves_memory`` saves by itself and stands between two paths. Any other is run again
    as a whole, by its inverse and forward under "invert".
    """
    path, logdet, waiting = memory.path(), None, []
    factors = _factors(transforms, undo=path.inverts)
    for index, (transform, own) in enumerate(zip(transforms, shared(transforms, context), strict=True)):
        if getattr(transform, "saves_memory", False):
            x, logdet = path.end(*path(x, logdet, *waiting))
            waiting = []
            x, more = transform(x, own)
            logdet = more if logdet is None else logdet + more
            path = memory.path()
            continue
        waiting.append(_link(transform, own, factors.get(index)))
        if waiting[-1].heavy:
            x, logdet = path(x, logdet, *waiting)
            waiting = []
    x, logdet = path.end(*path(x, logdet, *waiting))
    return x, zero_logdet(x) if logdet is None else logdet


def _factors(transforms, undo):
    """{index: Factors} of the 1x1 convolutions, each size factorised once."""
    places = [i for i, t in enumerate(transforms) if _is(t, InvertibleConv1x1) and not is_hooked(t)]
    convs = [transforms[i] for i in places]
    banks = [conv.bank for conv in convs]
    if None not in banks and not undo:  # inside a WeightBank, or without 1x1 convolutions
        return {i: bank.factors(conv, False) for i, conv, bank in zip(places, convs, banks, strict=True)}
    return dict(zip(places, factorize(convs, undo=undo), strict=True))


def _link(transform, context, factors):
    if factors is not None:
        return ConvLink(transform, factors, with_logdet=True)
    if _is(transform, AffineCoupling):
        return CouplingLink(transform, context)
    if getattr(transform, "moves_elements", False):
        return ShapeLink(transform)
    return TransformLink(transform, context, heavy=not isinstance(transform, (ActNorm, InvertibleConv1x1)))


def _is(transform, kind):
    """Whether it is of that kind and runs as that does."""
    return isinstance(transform, kind) and type(transform).forward is kind.forward
