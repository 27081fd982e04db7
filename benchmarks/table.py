"""A results file as a Markdown table: how many times faster fastflow is than each baseline.

    python -m benchmarks.table benchmarks/results/FILE.json [GROUP]...
"""

import json
import sys
from pathlib import Path

BASELINES = ("eager", "compile", "torch batched", "torch loop")


def markdown(results, groups=()):
    """The lines of the table, of all groups of cases or of these. On a CPU a cell holds the ratio at one thread in CPU
    time, then at all threads in wall time; a baseline that failed there leaves a dash."""
    table = {}
    for row in results["rows"]:
        if groups and row["group"] not in groups:
            continue
        entry = table.setdefault(row["case"], {})
        for baseline in BASELINES:
            if baseline in row["speedup_over"] or baseline in row["failed"]:
                ratio = row["speedup_over"].get(baseline)
                entry.setdefault(baseline, []).append("-" if ratio is None else f"{ratio:.2f}")
    used = [b for b in BASELINES if any(b in entry for entry in table.values())]
    lines = ["| case | " + " | ".join(f"over {b}" for b in used) + " |", "|---" * (1 + len(used)) + "|"]
    for case, entry in table.items():
        cells = [" / ".join(entry.get(b, ())) for b in used]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(markdown(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])))
