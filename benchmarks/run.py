"""The runner behind ``fastflow bench``: tables on the terminal, JSON for the record."""

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import cases, glow, realnvp, timing

WHAT = ("ops", "models", "compiled", "all")


def select(what, pattern):
    """The cases of "ops", "models", "compiled" (models under torch.compile, minutes of compilation each) or "all",
    which is the first two, whose name holds ``pattern``."""
    models = (*glow.CASES, *realnvp.CASES, *realnvp.WIDER_CASES)
    chosen = {"ops": cases.OP_CASES, "models": models, "compiled": realnvp.COMPILED_CASES,
              "all": (*cases.OP_CASES, *models)}[what]
    return [case for case in chosen if pattern in case.name]


def machine(device):
    """What the figures were measured on, for the JSON's head."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False,
                                cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # there is no git
        commit = ""
    info = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "commit": commit,
            "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform(),
            "processor": _processor(), "cores": os.cpu_count(), "device": device,
            "malloc": "keeps what is freed" if timing.keep_memory() else "as it is"}
    if device == "cuda":
        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    try:
        info["triton"] = __import__("triton").__version__
    except ImportError:
        info["triton"] = None
    return info


def _processor():
    """Its name, and where there are numbers family and model: a virtual machine's name may stand for generations."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        first = ""
    own = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{key.removeprefix('cpu ')} {own[key]}" for key in ("cpu family", "model") if key in own]
    return ", ".join([own.get("model name") or platform.processor(), *numbers])


def save(folder, name, content):
    """Write a record, its key "machine" that of :func:`machine`, under ``folder`` as NAME-DATE.json; where that is the
    record of another processor, as NAME-DATE-2.json, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{content['machine']['date'][:10]}"
    paths = (folder / f"{stem}{suffix}.json" for suffix in itertools.chain([""], map("-{}".format, itertools.count(2))))
    path = next(p for p in paths if not p.exists() or
                json.loads(p.read_text())["machine"]["processor"] == content["machine"]["processor"])
    temporary = path.with_suffix(".tmp")  # a record that is written again is never half there
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    print(f"written to {path}")


def measure(case, device, rounds, one_thread=False, without=(), round_seconds=None):
    """Rows of one case: under one thread in CPU time and, unless ``one_thread``, all threads in wall time; or on the
    GPU. The variants named in ``without`` are left out; each of the others runs about ``round_seconds`` at a time.

    Per variant a row holds median and quartiles over the rounds, in microseconds, or under "failed" what it raised;
    where the case names peers, also the fastest of them, and the setting in which each contender ran.
    """
    rows = []
    regimes = [("cuda", None)] if device == "cuda" else [("cpu", 1), ("wall", os.cpu_count())][:1 if one_thread else 2]
    for clock, threads in regimes:
        if threads is not None:
            torch.set_num_threads(threads)
        torch.compiler.reset()
        variants = {}
        try:
            variants = {name: call for name, call in case.build(device).items() if name not in without}
            samples, failed = timing.interleave(variants, clock, rounds, round_seconds=round_seconds)
        except Exception as error:  # nothing of the case can run
            samples, failed = {}, {"fastflow": timing.first_line(error)}
        quartiles = {name: _quartiles(seconds) for name, seconds in samples.items()}
        own = quartiles.get("fastflow")
        rows.append({"case": case.name, "group": case.group, "clock": timing.CLOCKS[clock], "threads": threads,
                     "median_us": {name: _us(q2) for name, (_, q2, _) in quartiles.items()},
                     "quartiles_us": {name: [_us(q1), _us(q3)] for name, (q1, _, q3) in quartiles.items()},
                     "speedup_over": {name: round(q2 / own[1], 3)
                                      for name, (_, q2, _) in quartiles.items() if own and name != "fastflow"},
                     "failed": failed})
        if case.peers:
            rows[-1] |= {"over_fastest": _over_fastest(rows[-1], case.peers),
                         "settings": {name: call.setting for name, call in variants.items()
                                      if getattr(call, "setting", "")}}
    return rows


def _over_fastest(row, peers):
    """{"of", "name", "ratio"}: the fastest of the peers that ran, and how many times faster fastflow is."""
    ran = {name: row["speedup_over"][name] for name in peers if name in row["speedup_over"]}
    name = min(ran, key=ran.get, default=None)
    return {"of": list(peers), "name": name, "ratio": ran.get(name)}


def _quartiles(values):
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def _us(seconds):
    return round(1e6 * seconds, 2)


def show(row):
    """One line of the table; what failed stands at its end."""
    threads = "GPU" if row["threads"] is None else f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    own = row["median_us"].get("fastflow")
    cells = [f"{row['case']:<72} {threads:<10} " + ("" if own is None else f"{own:>12.1f} us ")]
    cells += [f"{name} {ratio:6.2f}x" for name, ratio in row["speedup_over"].items()]
    cells += [f"{name} failed: {message}" for name, message in row["failed"].items()]
    fastest = row.get("over_fastest", {})
    if fastest.get("name"):
        cells.append(f"over the fastest peer, {fastest['name']}: {fastest['ratio']:.2f}x")
    print("  ".join(cells), flush=True)


def main(argv=None):
    """Run the benchmarks; returns the exit status, 1 where fastflow itself raised. A baseline's failure is reported."""
    parser = argparse.ArgumentParser(prog="fastflow bench", description="Measures fastflow beside PyTorch and other "
                                     "libraries: tables on the terminal, JSON for the record.")
    parser.add_argument("what", nargs="?", default="ops", choices=WHAT, help="what is measured (default: ops)")
    parser.add_argument("--filter", default="", help="only the cases whose name holds this")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one-thread", action="store_true",
                        help="leave out all threads in wall time, which means little on a machine that others use")
    parser.add_argument("--without", action="append", default=[], metavar="BASELINE",
                        help="a baseline to leave out, for instance compile, which costs seconds of compilation a case")
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
        for row in measure(case, args.device, args.rounds, args.one_thread, args.without):
            show(row)
            rows.append(row)
    if args.results:
        save(args.results, f"{args.device}-{args.what}", {"machine": machine(args.device), "rows": rows})
    broken = sorted({row["case"] for row in rows if "fastflow" in row["failed"]})
    for name in broken:
        print(f"fastflow bench: fastflow itself failed: {name}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
