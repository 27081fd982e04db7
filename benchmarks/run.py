"""The runner behind ``fastflow bench``: tables on the terminal, JSON for the record."""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import cases, glow, timing

GROUPS = ("affine_coupling", "slogdet", "gaussian_sample_kl", "glow")


def select(what, pattern):
    """The cases of "ops", "glow" or "all" whose name holds ``pattern``."""
    chosen = {"ops": cases.OP_CASES, "glow": glow.CASES, "all": (*cases.OP_CASES, *glow.CASES)}[what]
    return [case for case in chosen if pattern in case.name]


def machine(device):
    """What the figures were measured on, for the JSON's head."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parent).stdout.strip()
    info = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit,
            "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform(),
            "processor": _processor(), "cores": os.cpu_count(), "device": device}
    if device == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    try:
        info["triton"] = __import__("triton").__version__
    except ImportError:
        info["triton"] = None
    return info


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def measure(case, device, rounds):
    """Rows of one case: under one thread in CPU time and all threads in wall time, or on the GPU."""
    rows = []
    regimes = [("cuda", None)] if device == "cuda" else [("cpu", 1), ("wall", os.cpu_count())]
    variants = None
    for clock, threads in regimes:
        if threads is not None:
            torch.set_num_threads(threads)
        torch.compiler.reset()
        variants = case.build(device)
        seconds = timing.interleave(variants, clock, rounds)
        rows.append({"case": case.name, "group": case.group, "clock": timing.CLOCKS[clock], "threads": threads,
                     "median_us": {name: round(1e6 * s, 2) for name, s in seconds.items()},
                     "speedup_over": {name: round(s / seconds["fastflow"], 3)
                                      for name, s in seconds.items() if name != "fastflow"}})
    return rows


def show(row):
    """One line of the table."""
    ratios = "  ".join(f"{name} {ratio:6.2f}x" for name, ratio in row["speedup_over"].items())
    threads = "GPU" if row["threads"] is None else f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    print(f"{row['case']:<72} {threads:<10} {row['median_us']['fastflow']:>12.1f} us   {ratios}", flush=True)


def main(argv=None):
    """Run the benchmarks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastflow bench", description=__doc__)
    parser.add_argument("what", nargs="?", default="ops", choices=("ops", "glow", "all"))
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("fastflow bench: --device cuda: no GPU is visible to torch", file=sys.stderr)
        return 1
    chosen = select(args.what, args.filter)
    if not chosen:
        print(f"fastflow bench: --filter {args.filter!r} matches no case", file=sys.stderr)
        return 1
    print("Medians of fastflow, and how many times faster it is than each baseline (interleaved in one run).")
    rows = []
    for case in chosen:
        for row in measure(case, args.device, args.rounds):
            show(row)
            rows.append(row)
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        info = machine(args.device)
        name = f"{args.device}-{args.what}-{info['date'][:10]}.json"
        (args.results / name).write_text(json.dumps({"machine": info, "rows": rows}, indent=1) + "\n")
        print(f"written to {args.results / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
