"""A results file as a Markdown table: how many times faster fastflow is than each baseline.

    python -m benchmarks.table benchmarks/results/FILE.json [GROUP]...
"""

import json
import sys
from pathlib import Path

FASTEST = "the fastest peer"
BASELINES = ("eager", "compile", "torch batched", "torch loop", "nflows", "normflows", "rosinality", "FrEIA", "zuko",
             "torchflows", FASTEST)


def markdown(results, groups=(), baselines=BASELINES):
    """The lines of the table, of all groups of cases or of these, one column for each of the baselines that was
    measured. On a CPU a cell holds the ratio at one thread in CPU time, then at all threads in wall time; a baseline
    that failed there leaves a dash."""
    table = {}
    for row in results["rows"]:
        if groups and row["group"] not in groups:
            continue
        entry = table.setdefault(row["case"], {})
        ratios = dict(row["speedup_over"])
        if row.get("over_fastest"):
            ratios[FASTEST] = row["over_fastest"]["ratio"]
        for baseline in baselines:
            if baseline in ratios or baseline in row["failed"]:
                ratio = ratios.get(baseline)
                entry.setdefault(baseline, []).append("-" if ratio is None else f"{ratio:.2f}")
    used = [b for b in baselines if any(b in entry for entry in table.values())]
    lines = ["| case | " + " | ".join(f"over {b}" for b in used) + " |", "|---" * (1 + len(used)) + "|"]
    for case, entry in table.items():
        cells = [" / ".join(entry.get(b, ())) for b in used]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


def settings(results):
    """A line per case and regime: in which setting each contender was the fastest."""
    return [f"- {row['case']}{regime(row)}: "
            + "; ".join(f"{name} {setting}" for name, setting in row["settings"].items())
            for row in results["rows"] if row.get("settings")]


def regime(row):
    """", 1 thread", ", 2 threads"; nothing on a GPU."""
    threads = row["threads"]
    return "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"


def equal_time(results):
    """Held-out bits/dim of the two of every pair at each mark, lower is better."""
    lines = ["| model | start | " + " | ".join(
        f"{100 * mark:g} % of the time" for mark in results["marks"]) + " | steps |",
        "|---" * (3 + len(results["marks"])) + "|"]
    for row in results["rows"]:
        for model in (row["fastflow"], row["of_peer"]):
            bits = " | ".join(f"{point['bits_per_dim']:.3f}" for point in model["curve"])
            lines.append(f"| {model['name']} | {bits} | {model['curve'][-1]['steps']} |")
    return lines


def equal_steps(results):
    """Held-out bits/dim of the two of every pair as they go, and their difference at the end."""
    steps = [point["steps"] for point in results["rows"][0]["curve"]]
    lines = ["| pair | " + " | ".join(f"{n} steps" for n in steps) + " | difference |", "|---" * (2 + len(steps)) + "|"]
    for row in results["rows"]:
        for key, name in (("fastflow", f"fastflow, as {row['peer']}"), ("peer", row["peer"])):
            cells = " | ".join(f"{point[key]:.4f}" for point in row["curve"])
            lines.append(f"| {name} | {cells} | {row['curve'][-1]['difference']:+.5f} |")
    return lines


def toy2d(results, stated):
    """KL to every target: mean over the seeds, the worst seed, what is stated of the mean."""
    models = list(dict.fromkeys(row["model"] for row in results["rows"]))
    lines = ["| target | " + " | ".join(f"{name} | stated" for name in models) + " |",
             "|---" * (1 + 2 * len(models)) + "|"]
    for target in dict.fromkeys(row["target"] for row in results["rows"]):
        rows = {row["model"]: row for row in results["rows"] if row["target"] == target}
        cells = (f"{rows[name]['mean_kl_nats']:.4f} / {max(rows[name]['kl_nats']):.4f} | "
             f"{stated[target, name]:g}"
                 for name in models)
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return lines


def launches(results):
    """Launches of a step and megabytes kept for backward per image."""
    hidden = list(results["rows"][0]["saved_bytes_per_image"])
    lines = ["| model | launches | of the flow | host reads | " + " | ".join(
        f"MB kept, {h} hidden" for h in hidden) + " |", "|---" * (4 + len(hidden)) + "|"]
    for row in results["rows"]:
        kept = " | ".join(f"{row['saved_bytes_per_image'][h] / 1e6:.2f}" for h in hidden)
        lines.append(f"| {row['model']} | {row['launches']} | {row['of_flow']} | {row['reads']} | {kept} |")
    return lines


def machine(results):
    """On what a file was measured, in a sentence."""
    info = results["machine"]
    gpu = f"{info['gpu']}, " if "gpu" in info else ""
    return (f"{gpu}{info['processor']}, {info['cores']} cores, torch {info['torch']}, Python {info['python']}, "
            f"{info['date'][:10]}, commit {info['commit'][:10]}")


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])))
