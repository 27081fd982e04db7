"""Whole models on a GPU beside eager peers, graph-captured baselines and torch.compile, the most telling case first.

    python -m benchmarks.gpu_models --results FOLDER [--budget 150] [--only PART]... [--list]

Glow as for CIFAR-10 and its conditioners alone, a tabular RealNVP, a hierarchical VAE, the memory of deep Glows, Jet
and TarFlow. float32 with TF32 matrix products and convolutions for everybody, cuDNN's algorithms tried out
(cudnn.benchmark), the same fused Adam; medians of interleaved rounds in CUDA events. MFU is the model's FLOPs over
the time and the peak of an H200 (494 TFLOP/s in TF32, 989 in bfloat16). The JSON is rewritten after every case; one
that raises or takes longer than --case-limit stands under "failed", and the next one begins. After --budget seconds
no further case begins.

    python -m benchmarks.gpu_models --device cpu --tiny       a rehearsal: the same code on small models, no graphs
"""

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path

import torch

from benchmarks import run, timing
from benchmarks.gpu import conv_net, glow, measuring, memory, realnvp, tokens, vae

BF16 = torch.bfloat16
# In the order of importance.
CASES = {
    "glow-64": glow.against_peers(64),
    "conditioners": conv_net.levels,
    "realnvp-training": realnvp.case_of("training step"),
    "realnvp-log-prob": realnvp.case_of("log_prob"),
    "realnvp-sampling": realnvp.case_of("sampling"),
    "glow-64-unfused": glow.against_unfused(64),
    "vae": vae.hierarchy,
    "kernels": glow.kernels,
    "depth-48": memory.depth(48),
    "depth-16": memory.depth(16),
    "depth-64": memory.depth(64),
    "glow-64-unfused-bf16": glow.against_unfused(64, BF16),
    "glow-512": glow.against_peers(512),
    "tarflow-sampling": tokens.sampling,
    "jet": tokens.training("Jet", tokens.jet, 32),
    "tarflow": tokens.training("TarFlow", tokens.tarflow, 8),
    "glow-512-unfused": glow.against_unfused(512),
    "depth-32": memory.depth(32),
    "depth-4": memory.depth(4),
}


@contextlib.contextmanager
def same_precision():
    """TF32 and cuDNN's search for all contenders."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
    backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = True, True, True
    try:
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark = before


AGAIN = 5.0  # seconds after which a case is told once more, if leaving a graph's recording made something else of it


class _Late(BaseException):
    """No Exception, for a case takes that for the failure of one of its variants, and goes on."""


@contextlib.contextmanager
def limited(seconds):
    """Ends what is inside after so many seconds with a TimeoutError, in the main thread of a system that has alarms."""
    def late(number, frame):
        raise _Late
    try:
        before = signal.signal(signal.SIGALRM, late)
    except (AttributeError, ValueError):
        yield
        return
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
    except _Late:
        raise TimeoutError(f"not done within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(names, device, tiny, budget, case_limit, save):
    """The record's rows, failures, seconds and cases left out; ``save(record)`` is called after every case."""
    record = {"machine": run.machine(device), "tiny": tiny, "budget_s": budget, "rows": [], "failed": {},
              "seconds": {}, "left_out": list(names)}
    start = time.perf_counter()
    for name in names:
        began = time.perf_counter()
        if began - start > budget:
            break
        record["left_out"].remove(name)
        try:
            with limited(case_limit):
                for row in CASES[name](device, tiny):
                    record["rows"].append({"name": name, **row})
                    show(row)
        except Exception as error:  # the other cases are still measured
            record["failed"][name] = f"{type(error).__name__}: {timing.first_line(error)}"
            print(f"{name} failed: {record['failed'][name]}", flush=True)
        record["seconds"][name] = round(time.perf_counter() - began, 1)
        save(record)
        try:
            measuring.release()
        except RuntimeError as error:  # after an illegal access every call fails: the rest needs a new process
            record["failed"]["device"] = f"after {name}: {timing.first_line(error)}"
            print(f"the device no longer answers, {record['failed']['device']}", flush=True)
            save(record)
            break
    return record


def show(row):
    """A few lines about a row."""
    print(row["case"] + (f", {row['mode']}" if "mode" in row else ""))
    for name, ms in row.get("median_ms", {}).items():
        ratios = "  ".join(f"{other} {ratio:.2f}x" for other, ratio in row["ratios"].get(name, {}).items())
        mfu = f"  MFU {row['mfu'][name]:.3f}" if name in row.get("mfu", {}) else ""
        print(f"  {name:<36} {ms:10.3f} ms  {row['examples_per_s'][name]:12.1f}/s{mfu}  {ratios}")
    for goal in row.get("goals", ()):
        if goal["ratio"] is not None:
            print(f"  {'met' if goal['ratio'] >= goal['wanted'] else 'missed'}: {goal['of']} over {goal['over']} "
                  f"{goal['ratio']:.2f}, wanted {goal['wanted']:g}")
    for key in ("profiled", "expected"):
        for name, counts in row.get(key, {}).items():
            print(f"  {name}, {key}: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
    if "ms" in row:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:8.2f} GB"
        print(f"  {row['ms']:.1f} ms {peak}")
    for name, message in row["failed"].items():
        print(f"  {name} failed: {message}")
    sys.stdout.flush()


def _named(part):
    """The case of that name, or else all whose name holds it."""
    return [part] if part in CASES else [name for name in CASES if part in name]


def main(argv=None):
    """Run the cases; the exit status is 1 where fastflow itself raised."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_models", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which no further case begins")
    parser.add_argument("--case-limit", type=float, default=180.0,
                        help="seconds that a single case may take (180); glow-64, the first, takes most of them where "
                             "its more than 50 variants of Triton kernels have not been compiled before")
    parser.add_argument("--only", action="append", default=[], metavar="PART",
                        help="only the case of this name, or else those whose name holds it, in the order given")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models, for a rehearsal")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(CASES))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_models: no GPU is visible to torch; --device cpu --tiny rehearses without one", file=sys.stderr)
        return 1
    if args.device == "cpu" and not args.tiny:
        print("gpu_models: --device cpu: these models are for a GPU; add --tiny for a rehearsal", file=sys.stderr)
        return 1
    names = list(dict.fromkeys(name for part in args.only or [""] for name in _named(part)))
    if not names:
        print(f"gpu_models: --only {' '.join(args.only)} matches no case; see --list", file=sys.stderr)
        return 1

    def save(record):
        if args.results:
            run.save(args.results, f"{args.device}-gpu-models", record)
    with same_precision():
        record = measure(names, args.device, args.tiny, args.budget, args.case_limit, save)
    if record["left_out"]:
        print(f"left out for want of time: {', '.join(record['left_out'])}")
    ours = [row["name"] for row in record["rows"] for name in row["failed"] if name.startswith("fastflow")]
    return int(bool(record["failed"] or ours))


if __name__ == "__main__":
    sys.exit(main())
