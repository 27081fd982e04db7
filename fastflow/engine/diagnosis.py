"""A VAE's diagnosis as a page of pictures and as text."""

import math
import textwrap
from pathlib import Path

import torch

from fastflow.diagnostics import diagnose
from fastflow.engine import charts
from fastflow.engine.aside import aside
from fastflow.engine.files import write_text
from fastflow.engine.labels import known
from fastflow.engine.objectives import levels_of
from fastflow.engine.pictures import tiled

__all__ = ["diagnose_images", "write_diagnosis"]

WIDTH = 10.0  # inches
MAX_IMAGES = 512  # that a model is diagnosed on; the aggregate posterior takes time in their square
FEW = 40  # so many bars get an index each


def diagnose_images(model, objective, images, device, *, beta=1.0, seed=0, labels=None):
    """diagnostics.diagnose of a VAE on integer images (N, C, H, W), 512 spread evenly over them if there are more, its
    ELBO that of the integers, as an evaluation reports it, given their labels (N,) if the model takes them. Modes and
    generators are left as they were."""
    if len(images) > MAX_IMAGES:
        some = torch.linspace(0, len(images) - 1, MAX_IMAGES).long()
        images, labels = images[some], None if labels is None else labels[some]
    with aside(model, device, seed):
        x, constant = objective.prepare(model, images.to(device))
        context = known(model, x, None if labels is None else labels.to(device))
        return diagnose(model, x, context, beta=beta, constant=constant)


def write_diagnosis(folder, diagnosis, model, n_bins, title="diagnosis"):
    """Writes diagnosis.txt and the page diagnosis.png: what was measured, in words; the KL of each latent; rate and
    distortion; and, for images of 1 or 3 channels, traversals of latents and bits, or what each level of a hierarchy
    adds; for quantised models how often each code is used.

    Args:
        folder: made if missing.
        diagnosis: a diagnostics.Diagnosis.
        model, n_bins: the VAE, and the number of levels of its images, for the pictures.
        title: of the page.

    Returns:
        {"summary": path, "page": path}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"summary": folder / "diagnosis.txt", "page": folder / "diagnosis.png"}
    write_text(paths["summary"], diagnosis.summary() + "\n")
    lines = [part for line in diagnosis.summary().split("\n")
             for part in textwrap.wrap(line, 116, subsequent_indent="    ")]
    below, height = _below(diagnosis, model, n_bins)
    heights = [0.55 + 0.19 * len(lines), 3.0, *([height] if below else [])]
    drawn = charts.figure(WIDTH, sum(heights))
    text, *panels = drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flatten()
    text.text(0.012, 0.97, title, fontsize=13, va="top", weight="bold")
    text.text(0.012, 1.0 - 0.42 / heights[0], "\n".join(lines), fontsize=9, va="top", linespacing=1.4)
    if diagnosis.kl is None:
        _rate_distortion(panels[0].subplots(1, 2)[0], diagnosis)
        panels[0].axes[1].set_axis_off()
    else:
        left, right = panels[0].subplots(1, 2, width_ratios=(3, 2))
        _latent_kl(left, diagnosis)
        _rate_distortion(right, diagnosis)
    if below:
        below(panels[1])
    charts.save(paths["page"], drawn)
    return paths


def _latent_kl(at, diagnosis):
    """A bar for each latent: those of a hierarchy and codes in their order, others the largest KL first."""
    kl = torch.nan_to_num(diagnosis.kl.double().cpu(), nan=0.0, posinf=0.0)
    order = torch.arange(len(kl))
    if diagnosis.level_sizes is None and diagnosis.codes is None:
        order = kl.argsort(descending=True, stable=True)
    used = [True] * len(kl) if diagnosis.active is None else diagnosis.active.tolist()
    colors = [charts.BAR if used[index] else charts.FAINT for index in order.tolist()]
    where = {"code position": ", row by row"}.get(diagnosis.unit, ", largest first")
    label = f"{diagnosis.unit}{where}" + ("" if diagnosis.active is None else "; grey: not active")
    if diagnosis.level_sizes is not None:
        label = "level, from the top down; grey: not active"
    charts.axes(at, f"KL of each {diagnosis.unit}", label, "nats")
    at.bar(range(len(kl)), kl[order].tolist(), color=colors, width=0.8 if len(kl) <= 4 * FEW else 1.0)
    if diagnosis.marginal_kl is not None:
        marginal = torch.nan_to_num(diagnosis.marginal_kl.double().cpu(), nan=0.0, posinf=0.0)
        at.plot(range(len(kl)), marginal[order].tolist(), ".", color=charts.ACCENT, label="of the aggregate posterior")
        at.legend(fontsize=8, frameon=False)
    at.set_xlim(-0.7, len(kl) - 0.3)
    if len(kl) <= FEW:
        at.set_xticks(range(len(kl)), [str(index) for index in order.tolist()], fontsize=7)
    elif diagnosis.level_sizes is None:
        at.set_xticks([])
    if diagnosis.level_sizes is not None:
        ends = torch.tensor(diagnosis.level_sizes).cumsum(0).tolist()
        for end in ends[:-1]:
            at.axvline(end - 0.5, color="black", linewidth=0.6)
        middles = [end - 0.5 * size for end, size in zip(ends, diagnosis.level_sizes, strict=True)]
        at.set_xticks(middles, range(1, 1 + len(middles)))


def _rate_distortion(at, diagnosis):
    """The model's point, the line of models of the same ELBO through it, and how the rate divides."""
    point = diagnosis.point
    charts.axes(at, f"rate {point.rate:.4g}, distortion {point.distortion:.5g}", "rate, nats", "distortion, nats")
    if not (math.isfinite(point.rate) and math.isfinite(point.distortion)):
        at.text(0.5, 0.5, "not finite", color=charts.ACCENT, ha="center", transform=at.transAxes)
        return
    right = max(2.0 * point.rate, 1e-3)
    at.plot([0.0, right], [-point.elbo, -point.elbo - right], color=charts.FAINT, label=f"ELBO {point.elbo:.5g}")
    at.plot([point.rate], [point.distortion], "o", color=charts.ACCENT, label="this model")
    if diagnosis.information is not None:
        at.axvline(diagnosis.information.mutual_information.item(), color=charts.BAR, linestyle=":",
                   label="mutual information")
    at.set_xlim(left=0.0)
    at.legend(fontsize=8, frameon=False)


def _below(diagnosis, model, n_bins):
    """(what draws the lowest panel, its height in inches); (None, 0) where there is nothing to show."""
    if diagnosis.codes is not None:
        return lambda panel: _code_usage(panel.subplots(), diagnosis.codes), 2.4
    rows, title, labels, ticks = diagnosis.level_images, "", [], []
    if rows is not None:
        title = "what each level adds: the uppermost levels inferred from the image, the others at their priors' means"
        labels = [f"{n} of {len(rows) - 1} levels" for n in range(len(rows))]
    elif diagnosis.traversal is not None:
        found = diagnosis.traversal
        rows, values = found.images, found.values.tolist()
        title = f"one {diagnosis.unit} moves, the others stay as one image has them; those with the largest KL"
        labels = [f"{diagnosis.unit} {dim}: {kl:.3g} nats"
                  for dim, kl in zip(found.dims.tolist(), found.kl.tolist(), strict=True)]
        ticks = [f"{value:g}" for value in values]
        if 2 * len(values) < len(labels):  # as for bits: the values one below the other take less room
            rows, ticks, labels = rows.transpose(0, 1), [label.replace(": ", "\n") for label in labels], ticks
    if rows is None or rows.dim() != 5 or rows.shape[2] not in (1, 3):
        return None, 0.0
    across = min((0.9 if ticks and "\n" in ticks[0] else 0.6) * rows.shape[1], WIDTH - 1.0)
    height = across / rows.shape[1] * len(rows) + 0.8
    return lambda panel: _images(panel.subplots(), levels_of(model, rows.flatten(0, 1), n_bins), n_bins, title, labels,
                                 ticks, rows.shape[1]), height


def _images(at, images, n_bins, title, labels, ticks, n_columns):
    """A grid of images with a label at each row and, where there are ticks, above each column."""
    grid = tiled(images, n_bins, n_columns)
    at.imshow(grid, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    at.set_anchor("W")
    at.set_title(title, loc="left", fontsize=10)
    at.spines[:].set_visible(False)
    at.tick_params(length=0, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    tall, wide = grid.shape[0] / len(labels), grid.shape[1] / n_columns
    at.set_yticks([(row + 0.5) * tall for row in range(len(labels))], labels)
    at.set_xticks([(column + 0.5) * wide for column in range(len(ticks))], ticks)


def _code_usage(at, codes):
    counts = codes.counts.sort(descending=True)[0]
    charts.axes(at, f"how often each code is used: {codes.used} of {len(counts)} at all, perplexity "
                f"{codes.perplexity:.4g}", "code, most frequent first", "share")
    at.bar(range(len(counts)), (counts / counts.sum()).tolist(), color=charts.BAR, width=0.8)
    at.axhline(1.0 / len(counts), color=charts.ACCENT, linestyle=":", label="all equally frequent")
    at.set_xlim(-0.7, len(counts) - 0.3)
    at.legend(fontsize=8, frameon=False)
