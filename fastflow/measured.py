"""Which of several ways to compute something is the fastest on this GPU, found by trying them once for every shape.

A training step repeats few shapes many times, so it may try, as cuDNN does among its algorithms; elsewhere the table of
backends decides, by metadata alone.
"""

import collections
import contextlib
import threading
import warnings

import torch

from fastflow import backends
from fastflow.autograd.differentiable import unhooked

WARM_UP, ROUNDS, CALLS = 2, 3, 5
SLEEP = 20_000_000  # cycles of a GPU, some 10 ms, within which the host has queued the calls of a round
LONGEST = 8  # times as long, where it has not


class _State(threading.local):
    paused = False


_state = _State()
# Of all threads, for backward may run a part again in one of its own, and must find what forward found.
_trying = collections.Counter()
_found = {}  # {what was tried: (the fastest way, {way: seconds})}


@contextlib.contextmanager
def trying(queued):
    """Calls inside try their ways at the first of each shape.

    Args:
        queued: True where the calls are to be recorded as a CUDA graph: the GPU's time alone counts. False: the
            elapsed time, in which the host launches.
    """
    _trying[queued] += 1
    try:
        yield
    finally:
        _trying[queued] -= 1


@contextlib.contextmanager
def paused():
    """Calls of this thread inside neither try nor use what was found."""
    previous, _state.paused = _state.paused, True
    try:
        yield
    finally:
        _state.paused = previous


def fastest(usual, operands, ways, what):
    """The name of the way that was the fastest for operands such as these, ``usual`` where nothing is tried.

    Args:
        operands: of the call, the first of which says where it runs; the parameters among them after it.
        ways: {name: function of the operands}, each differentiable in them.
        what: name of the call, for :func:`report`.
    """
    queued = True if _trying[True] else False if _trying[False] else None
    if queued is None or _state.paused or backends.requested() is not None or not _on_a_gpu(operands[0]):
        return usual
    kind = operands[0].device.type
    lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # Without strides and what needs a gradient, in which a second run may differ.
    key = what, operands[0].device, queued, lowered, *((t.dtype, tuple(t.shape)) for t in operands)
    if key not in _found:
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
        if not recorded or _in_backward() or _capturing():
            return usual
        seconds = _tried(operands, ways, queued, lowered, what)
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


def _in_backward():
    return torch._C._current_graph_task_id() != -1


def _capturing():
    return torch.cuda.is_current_stream_capturing()


def _tried(operands, ways, queued, lowered, what):
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in operands]
    wanted, kind = [t for t in leaves if t.requires_grad], operands[0].device.type

    def both_passes(way):
        # A cache would lower the weights once for all calls.
        with torch.autocast(kind, dtype=lowered, enabled=lowered is not None, cache_enabled=False):
            out = way(*leaves)
        torch.autograd.grad(out, wanted, torch.ones_like(out))

    calls = {name: lambda way=way: both_passes(way) for name, way in ways.items()}
    with unhooked():  # what is saved here is no part of the pass
        for name in list(calls):
            try:
                for _ in range(WARM_UP):
                    calls[name]()
            except Exception as error:
                if len(calls) == 1 or not type(error).__module__.startswith("triton"):
                    raise
                warnings.warn(f"{what}: {name} does not run on this GPU and is left out ({error})", RuntimeWarning,
                              stacklevel=2)
                del calls[name]
        return seconds_of(calls, operands[0].device, queued)


def seconds_of(calls, device, queued):
    """{name: seconds of a call}, the least of several interleaved rounds."""
    least = dict.fromkeys(calls, float("inf"))
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(ROUNDS):
            for name, call in calls.items():
                longer = 1
                while longer <= LONGEST:
                    torch.cuda.synchronize(device)
                    if queued:
                        torch.cuda._sleep(longer * SLEEP)
                    start.record()
                    for _ in range(CALLS):
                        call()
                    end.record()
                    if not queued or not start.query():
                        break
                    longer *= 2  # the GPU woke before all was queued
                end.synchronize()
                least[name] = min(least[name], 1e-3 * start.elapsed_time(end) / CALLS)
    return least
