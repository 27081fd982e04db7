"""What the memory modes save and cost: bytes kept for backward per image, the peak, and the time of a step.

    python -m benchmarks.memory [modes | depth] [--device cuda] [--rounds N] [--results DIR]

"modes": Glow 3x32x32, 3 levels of 8 and 32 steps, 512 hidden channels. Bytes per image are the growth with the batch:
of the tensors that the graph keeps (unique storages, parameters excluded), and of the peak of all tensors alive in a
forward and backward pass, gradients of hidden layers included. "depth": the published depth benchmark, Glow 256x256,
batch 8, 256 hidden channels, 3 levels of 4 to 64 steps (InvertibleNetworks.jl: normflows runs out of 40 GB near 48); on
a CPU scaled down to 64x64, where the peak is that of a process of its own and times are those of a batch of 2. Times
are medians of interleaved training steps with Adam, on a CPU those of one thread in CPU time.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import run, timing
from fastflow import flows
from fastflow.engine import TrainStep
from fastflow.engine.memory import per_image
from fastflow.flows import memory

MODES = {"none": ("none", None), "save_z": ("save_z", None), "invert": ("invert", None),
         "invert, every 8": ("invert", 8)}
DEPTHS = (4, 8, 16, 32, 48, 64)


class Peak(TorchDispatchMode):
    """The largest sum of bytes of the tensors that live at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # what is written in place is not made here
        for storage in _storages(out):
            if storage._cdata not in given:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def _storages(tree):
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def glow(size, n_steps, hidden, device="cpu"):
    torch.manual_seed(0)
    model = flows.Glow((3, size, size), 3, n_steps, hidden).to(device)
    with torch.no_grad():  # no zero weights, and scales near 1: a flow after its initialisation
        for parameter in model.parameters():
            parameter.add_(0.003 * torch.randn_like(parameter))
    return model


def batch(n, size, device="cpu"):
    return torch.rand(n, 3, size, size, device=device) - 0.5


def step_of(model, mode):
    name, keep_every = MODES[mode]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    return TrainStep(model, optimizer, memory=name, keep_every=keep_every, check_finite=False)


def _loss(model, mode):
    name, keep_every = MODES[mode]
    mode = None if name == "none" else memory.Mode(name, model, keep_every)

    def loss(x, context=None):
        with memory.saving(mode):
            return -model(x).mean()
    return loss


def kept(model, size, mode):
    """Bytes per image that the graph keeps."""
    return per_image(_loss(model, mode), model, batch(2, size, next(model.parameters()).device), n=1)[0]


def peak(model, size, mode):
    """Bytes per image at the peak of a forward and a backward pass."""
    loss, peaks = _loss(model, mode), []
    for n in (4, 8):  # so many that they, and not the weights' gradients, make the peak
        x = batch(n, size, next(model.parameters()).device)
        for parameter in model.parameters():  # the gradients are there before: they don't grow with the batch
            parameter.grad = torch.zeros_like(parameter)
        with Peak() as seen:
            loss(x).backward()
        peaks.append(seen.peak)
    return (peaks[1] - peaks[0]) / 4


def times(model, x, modes, device, rounds):
    """{mode: median seconds} and what failed, of interleaved training steps."""
    steps = {mode: step_of(model, mode) for mode in modes}
    calls = {mode: lambda step=step: step(x) for mode, step in steps.items()}
    samples, failed = timing.interleave(calls, "cuda" if device == "cuda" else "cpu", rounds, warmup=1)
    return {mode: statistics.median(s) for mode, s in samples.items()}, failed


def modes_rows(device, rounds, n=4, hidden=512, depths=(8, 32)):
    for n_steps in depths:
        model = glow(32, n_steps, hidden, device)
        seconds, failed = times(model, batch(n, 32, device), MODES, device, rounds)
        for mode in MODES:
            yield {"case": f"Glow 3x32x32, 3 levels x {n_steps} steps, {hidden} hidden channels", "mode": mode,
                   "saved_bytes_per_image": kept(model, 32, mode), "peak_bytes_per_image": peak(model, 32, mode),
                   "batch": n,
                   "seconds": seconds.get(mode), "time_over_none": _ratio(seconds, mode), "failed": failed.get(mode)}


def depth_rows(device, rounds, size=None, n=8, hidden=256, depths=DEPTHS):
    size = size or (256 if device == "cuda" else 64)
    for n_steps in depths:
        model = glow(size, n_steps, hidden, device)
        seconds, failed = times(model, batch(n if device == "cuda" else 2, size, device), MODES, device, rounds)
        for mode in MODES:
            yield {"case": f"Glow 3x{size}x{size}, 3 levels x {n_steps} steps, {hidden} hidden channels", "mode": mode,
                   "saved_bytes_per_image": None if device == "cuda" else kept(model, size, mode), "batch": n,
                   "peak_bytes": peak_of_process(device, size, n_steps, hidden, n, mode),
                   "seconds": seconds.get(mode), "time_over_none": _ratio(seconds, mode), "failed": failed.get(mode)}


def _ratio(seconds, mode):
    return seconds[mode] / seconds["none"] if mode in seconds and "none" in seconds else None


def peak_of_process(device, *arguments):
    """Peak bytes of one training step in a process of its own, above what it held before; None where it fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", device, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    return int(done.stdout) if done.returncode == 0 else None


def child(device, size, n_steps, hidden, n, mode):
    torch.set_num_threads(1)
    model = glow(int(size), int(n_steps), int(hidden), device)
    step, x = step_of(model, mode), batch(int(n), int(size), device)
    warm = glow(8, 1, 4, device)  # what the first step of a process loads is not the model's
    step_of(warm, mode)(batch(1, 8, device))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(x)
        print(torch.cuda.max_memory_allocated() - before)
        return
    before = _status("VmRSS")
    step(x)
    print(_status("VmHWM") - before)


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def show(row):
    """One line of the table."""
    columns = [("saved_bytes_per_image", "kept {:9.4f} MB/image", 1e6),
               ("peak_bytes_per_image", "peak {:8.3f} MB/image", 1e6), ("peak_bytes", "peak {:9.1f} MB", 1e6),
               ("seconds", "{:8.3f} s", 1), ("time_over_none", "{:5.2f}x", 1), ("failed", "failed: {}", None)]
    cells = [form.format(row[name] / scale if scale else row[name]) for name, form, scale in columns
             if row.get(name) is not None]
    print(f"{row['case']:<62} {row['mode']:<16} " + "  ".join(cells), flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        return child(*argv[1:])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=("modes", "depth", "all"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for what, measure in (("modes", modes_rows), ("depth", depth_rows)):
        if args.what in (what, "all"):
            for row in measure(args.device, args.rounds):
                show(row)
                rows.append({"group": what, **row})
    if args.results:
        run.save(args.results, f"{args.device}-memory-{args.what}", {"machine": run.machine(args.device), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
