"""Looking at a model while it trains, without a trace."""

import contextlib

import torch

from fastflow.diagnostics.mode import in_eval

__all__ = ["aside"]


@contextlib.contextmanager
def aside(model, device, seed):
    """Inside, the model is in evaluation mode, without gradients, and torch's generators are seeded; afterwards mode
    and generators are as before."""
    with in_eval(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        yield
