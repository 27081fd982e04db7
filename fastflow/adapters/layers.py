"""What the adapters of several libraries share."""

import torch

from fastflow import backends, functional, reference
from fastflow.adapters import verify
from fastflow.adapters.swap import PREFIX, joins, plain

__all__ = ["autocasts", "couple", "fusable", "joins", "order", "order_of", "overridden", "plain", "remembered",
           "reorder", "worthwhile"]

SMALL = 4096  # elements below which, on a CPU, a host's own few operations cost what a kernel and its call do


def fusable(x, *others):
    """Whether x and the others are float32, or all are float64: in lower precision and under autocast a host's dtypes
    are its own affair. torch.jit.trace sees the host's operations, which can be saved and loaded anywhere."""
    dtype = x.dtype
    return ((dtype is torch.float32 or dtype is torch.float64) and all(t.dtype is dtype for t in others)
            and not torch.jit.is_tracing())


def worthwhile(x):
    """Whether x is large enough for a kernel to gain on the host's own operations. An export for batches of any size
    takes the host's."""
    return not torch.compiler.is_exporting() and (x.numel() >= SMALL or not x.is_cpu or verify.running())


def autocasts(x):
    """Whether autocast is on for the device of x."""
    return reference.autocasts(x.device.type)


def overridden(module, *names):
    """Why a module can't be swapped that has a method of its own under one of the names, or None."""
    own = [name for name in names if name in module.__dict__]
    return f"its {own[0]} is another function than its class's" if own else None


def remembered(module, name, compute, *tensors, traced=None, maybe=False):
    """compute(*tensors), computed again only when the values of the module's tensors are others. On a GPU, where a
    look at values would wait for it, when a tensor was exchanged or written to: writes through its ``data`` go unseen.

    torch.compile can't look at values. There ``traced(*tensors)`` puts into the graph what compute gives, unless that
    is known to be None. Without ``traced`` the known value is trusted; layers find it out when they are swapped and
    when they load a state dict. torch.func's tensors have no memory to know them by, and under vmap no values: there
    it is ``traced`` too, but None where that holds only for some values (``maybe``).
    """
    known = module.__dict__.get(PREFIX + name)
    if torch.compiler.is_compiling():
        value = compute(*tensors) if known is None else known[1]
        return value if traced is None or value is None else traced(*tensors)
    try:
        stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version, t.shape, t.stride()) for t in tensors)
    except RuntimeError:
        return None if maybe else (traced or compute)(*tensors)
    if known is None or known[0] != stamp or not _same(tensors, known[3]):
        if backends.transformed() is not None:  # whatever is made there ends with the transform
            return compute(*tensors)
        with torch.inference_mode(False):  # the next call may be one of training
            # The aliases keep the memory, so that no other tensor can come to lie there.
            aliases = tuple(t.detach() for t in tensors)
            values = tuple(t.clone() for t in aliases) if all(t.is_cpu for t in aliases) else ()
            known = stamp, compute(*tensors), aliases, values
        module.__dict__[PREFIX + name] = known
    return known[1]


def _same(tensors, values):
    """Whether the tensors have the values that were kept of them, which are none on a GPU. A graph that a dispatch mode
    makes can't depend on them."""
    return bool(verify.modes()) or all(map(torch.equal, tensors, values))


def order(module, passive, active):
    """What :func:`order_of` says of two index buffers of the module; under torch.compile the order always moves."""
    return remembered(module, "order", order_of, passive, active, traced=_moving)


def _moving(passive, active):
    indices = torch.cat([passive, active])
    return len(passive), indices, torch.argsort(indices)


def order_of(passive, active):
    """(number of passive channels, order, its inverse): channels of which indices ``passive`` come first in ``order``.

    Where the passive ones are the first ones, or the last ones (then the number is negative), order and inverse are
    None: nothing needs moving.
    """
    first, second = passive.tolist(), active.tolist()
    if first + second == list(range(len(first) + len(second))):
        return len(first), None, None
    if first and second + first == list(range(len(first) + len(second))):
        return -len(first), None, None
    order = torch.cat([passive, active])
    return len(first), order, torch.argsort(order)


class _Reorder(torch.autograd.Function):
    """index_select along dim 1 by a permutation; backward selects by its inverse instead of adding."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        return reorder(grad, back, order), None, None


def reorder(x, order, back):
    """The channels of x in ``order``, a permutation of them whose inverse is ``back``."""
    if torch.is_grad_enabled() and x.requires_grad and backends.needs_reference((x,)) is None:
        return _Reorder.apply(x, order, back)
    return x.index_select(1, order)


def couple(x, kept, condition, inverse, **dialect):
    """(y, logdet) of an affine coupling of which the first ``kept`` channels of x, or the last ``-kept`` ones, pass.

    ``condition`` is called with those that pass; ``dialect`` is that of functional.affine_coupling. Split and joined so
    that one node of autograd adds up the two gradients of what passes.
    """
    channels = x.shape[1]
    if kept >= 0:
        passive, active = x.split([kept, channels - kept], 1)
        return functional.affine_coupling(active, condition(passive), passive=passive, inverse=inverse, **dialect)
    active, passive = x.split([channels + kept, -kept], 1)
    params = condition(passive)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return functional.affine_coupling(x, params, passive=kept, inverse=inverse, **dialect)
    y, logdet = functional.affine_coupling(active, params, inverse=inverse, **dialect)
    return torch.cat([y, passive], 1), logdet
