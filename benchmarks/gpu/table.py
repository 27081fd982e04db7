"""The record of benchmarks.gpu_models as Markdown."""


def markdown(record):
    """The lines of all tables: a contest each, the depth benchmark, counted kernels, what failed and was left out."""
    rows = record["rows"]
    lines = [line for row in rows if "median_ms" in row for line in _contest(row)]
    depth = [row for row in rows if row["group"] == "depth"]
    if depth:
        lines += ["### Memory", "", f"Under a limit of {depth[0]['limit_bytes'] / 1e9:g} GB.", "",
                  "| case | way | peak GB | ms |", "|---|---|---|---|"]
        lines += [f"| {row['case']} | {row['mode']} | {_depth(row)} |" for row in depth] + [""]
    for row in rows:
        if row["group"] == "launches":
            lines += _launches(row)
    failed = [f"- {name}: {message}" for name, message in record["failed"].items()]
    failed += [f"- {row['case']}, {name}: {message}" for row in rows if row["group"] != "depth"
               for name, message in row["failed"].items()]
    lines += ["### Failed", "", *failed, ""] if failed else []
    if record["left_out"]:
        lines += [f"Left out for want of time: {', '.join(record['left_out'])}.", ""]
    return lines


def bandwidth(record):
    """The table of a record of benchmarks.bandwidth."""
    lines = [f"A copy moves {record['copy_tb_per_s']:.2f} TB/s, read and written.", "",
             "| case | backend | us | TB/s | of a copy |", "|---|---|---|---|---|"]
    for row in record["rows"]:
        figures = (f"failed: {row['failed']} | | " if "failed" in row else
                   f"{row['us']:.1f} | {row['tb_per_s']:.2f} | {row['of_copy']:.2f}")
        lines.append(f"| {row['case'].replace('torch.', '')} | {row['backend']} | {figures} |")
    if record.get("left_out"):
        lines += ["", f"Left out for want of time: {', '.join(record['left_out'])}."]
    return lines


def no_gain(record, least):
    """A line for every ratio below ``least``."""
    return [f"- {row['case']}: {own} {ratio:.2f} over {other}" for row in record["rows"]
            for own, ratios in row.get("ratios", {}).items() for other, ratio in ratios.items() if ratio < least]


def _contest(row):
    """A line for each contender, a column for each of ours: how many times faster it is."""
    own = list(row["ratios"])
    lines = [f"### {row['case']}", "",
             "| | ms | per second | MFU | " + " | ".join(f"{name} is faster by" for name in own) + " |",
             "|---" * (4 + len(own)) + "|"]
    for name, ms in row["median_ms"].items():
        mfu = f"{row['mfu'][name]:.3f}" if name in row.get("mfu", {}) else ""
        ratios = [f"{row['ratios'][mine][name]:.2f}" if name in row["ratios"][mine] else "" for mine in own]
        lines.append(f"| {name} | {ms:.3f} | {row['examples_per_s'][name]:.0f} | {mfu} | {' | '.join(ratios)} |")
    settings = [f"{name} {setting}" for name, setting in row["settings"].items()]
    notes = [f"{name}: {note}" for name, note in row["notes"].items()]
    for words in ("; ".join(settings), "; ".join(notes)):
        lines += ["", words + "."] if words else []
    return [*lines, ""]


def _depth(row):
    failed = next(iter(row["failed"].values()), None)
    if failed is not None:
        return f"{failed} | "
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
    return f"{peak} | {row['ms']:.1f}"


def _launches(row):
    lines = [f"### {row['case'][:1].upper()}{row['case'][1:]}", ""]
    for words, key in (("as the profiler counts", "profiled"), ("as counted without a GPU", "expected")):
        for name, counts in row.get(key, {}).items():
            lines.append(f"- {name}, {words}: " + ", ".join(f"{what} {count}" for what, count in counts.items()))
    return [*lines, ""]
