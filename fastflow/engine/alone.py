"""Running a model in one process of several that train it, with nothing said to the others."""

import contextlib

import torch

from fastflow.engine.buffers import Buffers
from fastflow.vae import FreeBits, KLBalance, VectorQuantizer

__all__ = ["alone"]

# Their forward in training mode reduces over processes.
COLLECTIVE = (FreeBits, KLBalance, VectorQuantizer, torch.nn.SyncBatchNorm)


@contextlib.contextmanager
def alone(model):
    """Inside, a forward of an unwrapped model changes no buffer for good, and unless it is sharded waits for no other
    process: those modules that would talk to others, who may not be running theirs, are in evaluation mode."""
    buffers, modules = Buffers(model), [m for m in model.modules() if m.training and isinstance(m, COLLECTIVE)]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        buffers.put_back()
        for module in modules:
            module.training = True
