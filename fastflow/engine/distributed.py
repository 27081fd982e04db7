"""What wraps a model: torch.compile, DistributedDataParallel, FSDP2; and the processes that train it together."""

import contextlib
import datetime
import importlib
import os

import torch
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Processes", "agree", "gathered", "is_compiled", "is_sharded", "local", "mean_over", "placed_like",
           "replicas", "synchronized", "synchronizes", "unwrap", "whole", "wrapped"]


def layers_of(model):
    """The wrappers from the outside in, and last the model itself."""
    while True:
        yield model
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None:
            return
        model = inner


def unwrap(model):
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    return list(layers_of(model))[-1]


def is_compiled(model):
    """Whether torch.compile, or Module.compile(), is among the wrappers, or on a part that runs steps of a flow."""
    *wrappers, inner = layers_of(model)
    parts = [m for m in inner.modules() if m is inner or getattr(m, "saves_memory", False)]
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
               for m in (*wrappers, *parts))


def replicas(model):
    """The DistributedDataParallel around the model, or None."""
    return next((m for m in layers_of(model) if isinstance(m, DistributedDataParallel)), None)


def is_sharded(model):
    """Whether parameters are spread over processes, as by FSDP2's fully_shard."""
    return any(hasattr(p, "placements") for p in unwrap(model).parameters())


def synchronizes(model):
    """Whether :func:`synchronized` has a say in the model's backward."""
    return replicas(model) is not None or hasattr(unwrap(model), "set_requires_gradient_sync")


@contextlib.contextmanager
def synchronized(model, now):
    """Gradients of a backward inside are reduced over the processes if ``now``, else kept to be added to."""
    ddp, inner = replicas(model), unwrap(model)
    if hasattr(inner, "set_requires_gradient_sync"):  # FSDP2
        inner.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if ddp is None or now else ddp.no_sync():
        yield


def whole(tensor):
    """A sharded tensor gathered; another one as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(named, keep=True):
    """{name: whole tensor on the CPU} of named tensors, {} if not ``keep``; all processes together, one tensor at a
    time, so that no device holds more than one whole one."""
    found = {}
    for name, tensor in named.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.to("cpu")
        del full
    return found


def local(tensor):
    """This process's part of a sharded tensor, the same memory; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def placed_like(tensor, full):
    """The whole tensor ``full``, the same in every process, spread as ``tensor`` is; as it is if that is whole too."""
    if not hasattr(tensor, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(tensor.device), tensor.device_mesh, tensor.placements)


def wrapped(model, strategy, device):
    """The model for training in all processes: "ddp" keeps it whole in each, "fsdp" spreads parameters, gradients and
    the optimizer's state over them, each of the model's ``shard_groups()`` a group of its own and the rest one more."""
    if strategy == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for group in getattr(model, "shard_groups", list)():
            fully_shard(group, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


class Processes:
    """The processes that torchrun started; one alone elsewhere.

    Attributes:
        rank, count: which of how many this one is.
    """

    def __init__(self, device, timeout_seconds):
        """Joins the group if there is one and this process has not; a process that waits longer than the timeout for
        another one fails."""
        distributed = torch.distributed
        self._own = not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self._own:
            # Its defaults hold the group that there is when it is first imported, as building an optimizer does, and a
            # group that something holds does not end its threads when it is left.
            importlib.import_module("torch.distributed.nn")
            from fastflow.engine.rendezvous import fresh_store

            timeout = datetime.timedelta(seconds=timeout_seconds)
            store, rank, count = next(distributed.rendezvous("env://", timeout=timeout))
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout,
                                           store=fresh_store(store, rank, count, timeout_seconds), rank=rank,
                                           world_size=count)
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank, self.count = (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)

    def leave(self):
        """Leaves the group that this object joined; afterwards it is of no use."""
        if self._own and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def gather(self, tensor):
        """What every process has in this place, in order of rank; CPU tensors of one shape and dtype."""
        if self.count == 1:
            return [tensor]
        every = [torch.empty_like(tensor) for _ in range(self.count)]
        torch.distributed.all_gather(every, tensor.contiguous())
        return every

    def mean(self, numbers):
        """The means over the processes of a list of numbers, a list."""
        if self.count == 1:
            return numbers
        return torch.stack(self.gather(torch.tensor(numbers, dtype=torch.float64))).mean(0).tolist()

    def most(self, number):
        """The largest of the numbers that the processes have."""
        return number if self.count == 1 else max(t.item() for t in self.gather(torch.tensor(float(number))))


def _spread(model):
    """Whether processes train the model together. Asked at every step: its parameters are looked at where there can be
    others alone."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and (
        replicas(model) is not None or is_sharded(model))


def mean_over(model, number):
    """The mean over the processes of a 0-d tensor, where the model's gradients are means over them; else itself."""
    if not _spread(model):
        return number
    total = number.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def agree(model, flag):
    """The flag that is raised in every process if it is in one: all take a step or none does. In place."""
    if _spread(model):
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return flag
