"""What wraps a model: torch.compile, DistributedDataParallel, FSDP2."""

import contextlib

import torch
from torch.nn.parallel import DistributedDataParallel

__all__ = ["agree", "is_sharded", "local", "replicas", "synchronized", "unwrap", "whole"]


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


def replicas(model):
    """The DistributedDataParallel around the model, or None."""
    return next((m for m in layers_of(model) if isinstance(m, DistributedDataParallel)), None)


def is_sharded(model):
    """Whether parameters are spread over processes, as by FSDP2's fully_shard."""
    return any(hasattr(p, "placements") for p in unwrap(model).parameters())


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


def local(tensor):
    """This process's part of a sharded tensor, the same memory; another tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def agree(model, flag):
    """The flag that is raised in every process if it is in one: all take a step or none does. In place."""
    if replicas(model) is not None or is_sharded(model):
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return flag
