"""Charts of runs and models, by matplotlib, without its global state."""

import logging
import math

import numpy as np

from fastflow.engine.pictures import save_picture

__all__ = ["ACCENT", "BAR", "FAINT", "axes", "curves", "figure", "save"]

BAR, FAINT, ACCENT, SECOND = "#3c6eb4", "#c4c4c4", "#c84632", "#e0913a"
DPI = 110
FEW = 40  # points of a curve that is shown whole
MAX_POINTS = 400  # of a curve; longer logs are averaged down
# One chart for each: title, unit; the curves of what is held out go with it.
CURVES = {"bits_per_dim": ("bits/dim", "bits"), "log_prob": ("log-likelihood", "nats per row"),
          "elbo": ("ELBO", "nats per image"), "rate": ("rate", "nats per image"),
          "distortion": ("distortion", "nats per image"), "grad_norm": ("gradient norm", ""),
          "learning_rate": ("learning rate", ""), "images_per_second": ("throughput", "images/s"),
          "rows_per_second": ("throughput", "rows/s")}
PARTS = {"training": "", "validation": "validation_", "held out": "test_"}


def figure(width, height):
    """A matplotlib Figure of that many inches whose parts are laid out so that nothing overlaps."""
    noisy = logging.getLogger("matplotlib.font_manager")  # it announces on stderr that it looks for fonts, once
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    finally:
        noisy.setLevel(level)
    found = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(found)
    return found


def axes(at, title, x_label="", y_label=""):
    """The axes, with a title on the left and without a frame on top and right."""
    at.set_title(title, loc="left", fontsize=10)
    at.set_xlabel(x_label, fontsize=9)
    at.set_ylabel(y_label, fontsize=9)
    at.tick_params(labelsize=8)
    at.spines[["top", "right"]].set_visible(False)
    return at


def save(path, drawn):
    """Writes a Figure as a PNG; returns the path."""
    drawn.canvas.draw()
    save_picture(path, np.asarray(drawn.canvas.buffer_rgba())[:, :, :3])
    return path


def curves(log):
    """A Figure of what the lines of a run's log hold, training and held-out in one chart each; None for an empty log.

    Args:
        log: dicts with "step" and numbers; those that are not finite are left out.
    """
    series = {name: {where: _points(log, prefix + name) for where, prefix in PARTS.items()} for name in CURVES}
    series = {name: found for name, found in series.items() if any(len(points) > 1 for points in found.values())}
    if not series:
        return None
    n_rows = math.ceil(len(series) / 2)
    drawn = figure(10.0, 2.6 * n_rows)
    grid = drawn.subplots(n_rows, 2, squeeze=False).flatten()
    for at, (name, found) in zip(grid, series.items(), strict=False):
        axes(at, CURVES[name][0], "step", CURVES[name][1])
        shown = [value for where, points in found.items() if points for value in _line(at, points, where)]
        if len(shown) > FEW:  # then the first steps, and a hiccup of the machine, may be out of all proportion
            low, high = np.percentile(shown, (5.0, 100.0) if name in ("elbo", "log_prob") else (0.0, 95.0))
            margin = 0.08 * ((high - low) or abs(high) or 1.0)
            at.set_ylim(low - margin, high + margin)
        if sum(map(bool, found.values())) > 1:
            at.legend(fontsize=8, frameon=False)
    for at in grid[len(series):]:
        at.set_axis_off()
    return drawn


def _line(at, points, where):
    steps, values = zip(*points, strict=True)
    colour = {"training": BAR, "validation": SECOND, "held out": ACCENT}[where]
    at.plot(steps, values, color=colour, linewidth=1.3, marker=None if where == "training" else "o", markersize=4,
            label=where)
    return values


def _points(log, name):
    """[(step, value)], at most MAX_POINTS of them."""
    points = [(line["step"], line[name]) for line in log if math.isfinite(line.get(name, math.nan))]
    size = max(1, -(-len(points) // MAX_POINTS))
    chunks = [points[i:i + size] for i in range(0, len(points), size)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]
