"""Which of several ways to compute something is the fastest on this GPU, found by trying them once for every shape.

A training step repeats few shapes many times, so it may try, as cuDNN does among its algorithms; elsewhere the table of
backends decides, by metadata alone.
"""

import contextlib
import threading

import torch
from torch.autograd.graph import saved_tensors_hooks

from fastflow import backends

WARM_UP, ROUNDS, CALLS = 2, 3, 5
SLEEP = 20_000_000  # cycles of a GPU, some 10 ms, within which the host has queued the calls of a round


class _State(threading.local):
    queued = None


_state = _State()
_found = {}  # {what was tried: (the fastest way, {way: seconds})}


@contextlib.contextmanager
def trying(queued):
    """Calls inside try their ways at the first of each shape.

    Args:
        queued: True where the calls are to be recorded as a CUDA graph: the GPU's time alone counts. False: the
            elapsed time, in which the host launches.
    """
    previous, _state.queued = _state.queued, queued
    try:
        yield
    finally:
        _state.queued = previous


def fastest(usual, operands, ways, what):
    """The name of the way that was the fastest for operands such as these, ``usual`` where nothing is tried.

    Args:
        operands: of the call, the first of which says where it runs; the parameters among them after it.
        ways: {name: function of the operands}, each differentiable in them.
        what: name of the call, for :func:`report`.
    """
    if _state.queued is None or backends.requested() is not None or not _on_a_gpu(operands[0]):
        return usual
    kind = operands[0].device.type
    lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (what, operands[0].device, _state.queued, lowered,
           *((t.dtype, tuple(t.shape), t.stride(), t.requires_grad) for t in operands))
    if key not in _found:
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in operands) or _recording():
            return usual
        seconds = _tried(operands, ways, _state.queued)
        _found[key] = min(seconds, key=seconds.get), seconds
    return _found[key][0]


def report(device):
    """A line for each call that was tried on this device: the fastest way, and how long each took."""
    lines = []
    for (what, where, _, lowered, x, *_), (name, seconds) in _found.items():
        if where == device:
            times = ", ".join(f"{way} {1e3 * time:.3f} ms" for way, time in seconds.items())
            lines.append(f"{what} of {x[1]} {lowered or x[0]} on {name} ({times})")
    return lines


def _on_a_gpu(x):
    return (x.is_cuda and type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
            and not torch._C._len_torch_dispatch_stack())


def _recording():
    return torch.cuda.is_current_stream_capturing()


def _tried(operands, ways, queued):
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in operands]
    wanted = [t for t in leaves if t.requires_grad]

    def both_passes(way):
        out = way(*leaves)
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    with saved_tensors_hooks(_same, _same):  # what is saved here is no part of the pass
        return seconds_of({name: lambda way=way: both_passes(way) for name, way in ways.items()}, operands[0].device,
                          queued)


def _same(tensor):
    return tensor


def seconds_of(calls, device, queued):
    """{name: seconds of a call}, the least of several interleaved rounds."""
    least = dict.fromkeys(calls, float("inf"))
    with torch.cuda.device(device):
        for call in calls.values():
            for _ in range(WARM_UP):
                call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(ROUNDS):
            for name, call in calls.items():
                torch.cuda.synchronize(device)
                if queued:
                    torch.cuda._sleep(SLEEP)
                start.record()
                for _ in range(CALLS):
                    call()
                end.record()
                end.synchronize()
                least[name] = min(least[name], 1e-3 * start.elapsed_time(end) / CALLS)
    return least
