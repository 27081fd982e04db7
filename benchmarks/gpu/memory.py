"""The depth benchmark (InvertibleNetworks.jl): peak memory and time of a training step of Glow as it grows deeper.

Glow 3x256x256, batch 8, 256 hidden channels, 3 levels of 4 to 64 steps, under an artificial limit of 40 GB.
"""

import contextlib
import statistics
import time

import torch

from benchmarks import contest, glow, memory, timing
from benchmarks.gpu import measuring

LIMIT = 40e9
MODES = {"fastflow, none": "none", "fastflow, save_z": "save_z", "fastflow, invert, every 8": "invert, every 8"}
PEER = ("normflows", {"use_lu": True})


def depth(n_steps):
    """Rows of one depth, one for each way."""
    def case(device, tiny):
        size, hidden, batch, k = (16, 8, 2, 2) if tiny else (256, 256, 8, n_steps)
        with limited(device):
            for way in (*MODES, "eager", PEER[0]):
                measuring.release()
                row = {"case": f"Glow 3x{size}x{size}, 3 levels x {k} steps, {hidden} hidden channels, batch {batch}",
                       "group": "depth", "mode": way, "limit_bytes": LIMIT, "failed": {}}
                try:
                    row |= _measured(lambda w=way, k=k: _step(w, size, k, hidden, batch, device), device)
                except Exception as error:  # torch.OutOfMemoryError is what the limit is for
                    row["failed"] = {way: "out of memory" if isinstance(error, torch.OutOfMemoryError)
                                     else timing.first_line(error)}
                yield row
        measuring.release()
    return case


def _step(way, size, n_steps, hidden, batch, device):
    x = memory.batch(batch, size, device)
    if way == PEER[0]:
        model = glow.peer_glow(way, 3, n_steps, hidden, (3, size, size), device, **PEER[1])
        return contest.training_step(measuring.flags_on_host(model), x)
    model = memory.glow(size, n_steps, hidden, device)
    if way == "eager":
        return contest.training_step(glow.neutral_glow(model), x)
    step = memory.step_of(model, MODES[way])
    return lambda: step(x)


def _measured(construct, device, steps=2):
    """Peak bytes of a step, weights and optimizer included, and ms, after one that makes the optimizer's state."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    call, seconds = construct(), []
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return {"peak_bytes": peak, "ms": round(1e3 * statistics.median(seconds), 3)}


@contextlib.contextmanager
def limited(device):
    """Inside, the process may have LIMIT bytes beyond what it has, and cuDNN takes no workspace to try things out."""
    if device != "cuda":
        yield
        return
    measuring.release()
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (LIMIT + torch.cuda.memory_reserved()) / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.backends.cudnn.benchmark = before
