"""Failures that come from outside a step, in words that a user can act on."""

import contextlib

import torch

from fastflow.engine.errors import RunError

__all__ = ["explained"]

LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Timed out", "timed out", "watchdog")


@contextlib.contextmanager
def explained(settings, n_processes):
    """Inside, running out of memory becomes a :class:`RunError` that says what to turn on, and a broken connection to
    another process one that says so."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            raise RunError(_out_of_memory(settings.train, text)) from error
        if n_processes > 1 and not isinstance(error, RunError) and any(word in text for word in LOST):
            raise RunError(f"another process has ended or does not answer ({text[:160]})") from error
        raise


def _out_of_memory(train, text):
    lower = "" if train.precision == "bfloat16" else ", train.precision=bfloat16 halves the conditioners' activations"
    return (f"out of memory with batches of {train.batch_size} in {train.accumulate} parts: raise train.accumulate, or "
            f"lower train.batch_size or the model's size; train.memory=save_z keeps less for backward in flows{lower}; "
            f"under torchrun, train.strategy=fsdp spreads the model over the processes ({text[:120]})")
