"""What a piece of code dispatches and what it keeps for backward, of any model, without a GPU.

    with Dispatched() as counted: step()             counted.launches, counted.reads, counted.by_op
    with saved_for_backward(model) as saved: loss = model(x).mean()     saved.bytes

A launch is an aten operator that is neither a view nor an allocation. On a GPU one operator may be several kernels
(a convolution's backward, slogdet, a foreach optimiser) and is seldom fewer, so a count is a lower bound. fastflow's
own operators are not aten's: they count as the kernels that they declare, see fastflow.launches. One that has a kernel
on the CPU alone (conv_net) declares none, so count such a model where that kernel steps aside.
"""

import collections
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import launches
from fastflow.nn import channel_affine

ALLOCATIONS = {"aten::" + name for name in (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "resize_", "set_",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "detach_", "record_stream")}
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


def _is_view(op):
    """Whether an operator returns an alias of an argument and writes nothing."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)


class Dispatched(TorchDispatchMode):
    """Counts what runs inside the block, backward included.

    Attributes:
        by_op: {operator: calls} of aten's operators that are neither views nor allocations, reads apart.
        reads: how often the host reads a tensor's value, which on a GPU waits for it.
        fused: launches that fastflow's operators declare, {operator: launches}.
        launches: all of them together.
    """

    def __init__(self, backend=None):
        super().__init__()
        self.by_op, self.reads = collections.Counter(), 0
        self._own = contextlib.ExitStack()
        self._backend = backend

    def __enter__(self):
        self._counted = self._own.enter_context(launches.count(self._backend))
        return super().__enter__()

    def __exit__(self, *error):
        self._own.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in READS:
            self.reads += 1
        elif name.startswith("aten::") and name not in ALLOCATIONS and not _is_view(func):
            self.by_op[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def fused(self):
        return dict(self._counted.by_operator)

    @property
    def launches(self):
        return sum(self.by_op.values()) + self._counted.total


class Saved:
    """Storages that autograd holds, each once: ``bytes`` in total."""

    def __init__(self, excluded):
        self._excluded, self._storages = excluded, {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = storage  # held, so that its address is not given out again
        return tensor

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self._storages.values())


@contextlib.contextmanager
def as_on_a_gpu():
    """Inside, layers save launches as they do where those are worth it, see nn.channel_affine.DEFERRED_ON."""
    before = channel_affine.DEFERRED_ON
    channel_affine.DEFERRED_ON = {"cpu", "cuda"}
    try:
        yield
    finally:
        channel_affine.DEFERRED_ON = before


@contextlib.contextmanager
def saved_for_backward(model):
    """Yields a :class:`Saved` of what a forward pass inside the block keeps, the model's parameters and buffers
    excluded."""
    saved = Saved({t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())})
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
