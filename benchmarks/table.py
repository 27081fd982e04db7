"""A results file as a Markdown table: how many times faster fastflow is than each baseline.

    python -m benchmarks.table benchmarks/results/FILE.json
"""

import json
import sys
from pathlib import Path

BASELINES = ("eager", "compile", "torch batched", "torch loop")


def rows_of(results):
    """{case: {baseline: [(threads or None on a GPU, speed-up)]}} of a results file's content, in its order."""
    table = {}
    for row in results["rows"]:
        entry = table.setdefault(row["case"], {})
        for baseline, ratio in row["speedup_over"].items():
            entry.setdefault(baseline, []).append((row["threads"], ratio))
    return table


def markdown(results):
    """The lines of the table; a cell holds one thread's CPU-time ratio, then all threads' wall-time ratio."""
    table = rows_of(results)
    used = [b for b in BASELINES if any(b in entry for entry in table.values())]
    lines = ["| case | " + " | ".join(f"over {b}" for b in used) + " |", "|---" * (1 + len(used)) + "|"]
    for case, entry in table.items():
        cells = [" / ".join(f"{ratio:.2f}" for _, ratio in entry.get(b, ())) for b in used]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(Path(sys.argv[1]).read_text()))))
