"""The curves of a run as one picture."""

import importlib.util
import math
import os

__all__ = ["plot_curves"]

PANELS = (("bits/dim", ("bits_per_dim",)), ("nats per row", ("log_prob",)),
          ("nats per image", ("elbo", "rate", "distortion")), ("gradient norm", ("grad_norm",)),
          ("learning rate", ("learning_rate",)), ("per second", ("images_per_second", "rows_per_second")))
PARTS = ("", "validation_", "test_")
ROBUST = 0.98  # a panel shows this share of its training values; a spike does not flatten the rest
COLUMNS, WIDTH, HEIGHT = 2, 5.2, 2.8


def plot_curves(path, entries, title):
    """Writes the figures of a log against their step as a PNG, a panel for each unit; needs matplotlib.

    Args:
        path: the file.
        entries: as from :func:`fastflow.engine.log.read_log`.
        title: above it.

    Returns:
        The path, or None where matplotlib is missing or there is nothing to draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return None
    panels = []
    for label, stems in PANELS:
        lines = {f"{part}{stem}": _points(entries, f"{part}{stem}") for stem in stems for part in PARTS}
        lines = {name: points for name, points in lines.items() if points}
        if lines:
            panels.append((label, lines))
    if not panels:
        return None
    from matplotlib.figure import Figure

    n_rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * WIDTH, n_rows * HEIGHT))
    figure.subplots_adjust(left=0.08, right=0.98, top=1.0 - 0.4 / (n_rows * HEIGHT), bottom=0.45 / (n_rows * HEIGHT),
                           wspace=0.22, hspace=0.28)
    figure.suptitle(title, y=1.0 - 0.15 / (n_rows * HEIGHT), fontsize="medium")
    for index, (label, lines) in enumerate(panels):
        axes = figure.add_subplot(n_rows, COLUMNS, index + 1)
        for name, points in lines.items():
            evaluated = name.startswith(PARTS[1:])
            axes.plot(*zip(*points, strict=True), marker="o" if evaluated else None, markersize=3, linewidth=1.2,
                      label=name)
        low, high = _limits(lines)
        axes.set_ylim(low, high)
        axes.set_ylabel(label)
        if index >= len(panels) - COLUMNS:
            axes.set_xlabel("step")
        if len(lines) > 1:
            axes.legend(fontsize="small")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    figure.savefig(temporary, format="png", dpi=90)
    temporary.replace(path)
    return path


def _points(entries, name):
    return [(e["step"], e[name]) for e in entries if isinstance(e.get(name), (int, float)) and math.isfinite(e[name])]


def _limits(lines):
    """The range of the middle of all values, a little wider."""
    values = sorted(y for points in lines.values() for _, y in points)
    cut = int((1.0 - ROBUST) / 2 * len(values))
    low, high = values[cut], values[len(values) - 1 - cut]
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
