"""A sweep over the weight of the rate: a model for each, and the curve of rate against distortion that they make."""

import csv
import io
import math
import os

import torch

from fastflow.diagnostics import rate_distortion_sweep
from fastflow.engine import charts
from fastflow.engine.datasets import levels_of_values, load_data
from fastflow.engine.errors import SettingsError
from fastflow.engine.files import write_text
from fastflow.engine.models import build_model
from fastflow.engine.objectives import objective_for
from fastflow.engine.run import load_trained
from fastflow.engine.settings import from_dict

__all__ = ["COLUMNS", "run_sweep"]

COLUMNS = ("beta", "rate", "distortion", "elbo", "elbo_error", "bits_per_dim", "active")


def run_sweep(settings, out, train, device):
    """Trains a model with each of ``settings.sweep.beta``, measures all on the same held-out images, and writes
    OUT/rate-distortion.csv and OUT/rate-distortion.png.

    Args:
        settings: with a section [sweep].
        out: the directory.
        train: function (settings, directory) that trains one model there; it gets OUT/beta-B for each.
        device: torch.device to measure on.

    Returns:
        (rows, table, picture): for each beta {column: value}, the rate, the distortion and the ELBO with its standard
        error in nats per image, bits/dim, both those of integer images, and the number of active units; and both
        paths.

    Raises:
        SettingsError: it is started in several processes.

    References:
        Higgins et al., "beta-VAE", 2017. Alemi et al., "Fixing a broken ELBO", 2018, arXiv:1711.00464.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError("sweep: one process trains its models one after the other; start it without torchrun")
    raw, test = settings.model_dump(), load_data(settings).test
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(settings)
        x, constant = objective_for(model, n_bins=levels_of_values(settings)).prepare(model, test)

    def fit(beta):
        directory = out / f"beta-{beta:g}"
        train(from_dict(raw | {"model": raw["model"] | {"beta": beta}, "sweep": None}), directory)
        return load_trained(directory, device).model.eval()

    generator = torch.Generator(device).manual_seed(0)
    rows = []
    for point in rate_distortion_sweep(fit, settings.sweep.beta, x.to(device), generator=generator):
        elbo = point.elbo - constant
        rows.append({"beta": point.beta, "rate": point.rate, "distortion": point.distortion + constant, "elbo": elbo,
                     "elbo_error": point.elbo_error, "bits_per_dim": -elbo / (x[0].numel() * math.log(2.0)),
                     "active": "" if point.active is None else point.active})
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    table = out / "rate-distortion.csv"
    write_text(table, text.getvalue())
    return rows, table, _picture(out / "rate-distortion.png", rows)


def _picture(path, rows):
    """Distortion over rate, a point for each beta, with the line of all models of the best ELBO found; the path."""
    drawn = charts.figure(6.0, 4.2)
    at = charts.axes(drawn.subplots(), "held-out images, by beta", "rate, nats per image", "distortion, nats per image")
    points = sorted((row["rate"], row["distortion"], row["beta"]) for row in rows)
    at.plot([rate for rate, _, _ in points], [distortion for _, distortion, _ in points], "o-", color=charts.BAR)
    for rate, distortion, beta in points:
        at.annotate(f"{beta:g}", (rate, distortion), xytext=(5, 5), textcoords="offset points", fontsize=8)
    limits = at.get_xlim(), at.get_ylim()
    best = max(row["elbo"] for row in rows)
    at.axline((0.0, -best), slope=-1.0, color=charts.FAINT, label=f"ELBO {best:.5g}, the best of these")
    at.set(xlim=limits[0], ylim=limits[1])
    at.legend(fontsize=8, frameon=False)
    return charts.save(path, drawn)
