"""A sweep over the weight of the rate: a model for each, and the curve of rate against distortion that they make."""

import csv
import io
import math
import os

import torch

from fastflow.diagnostics import rate_distortion_sweep
from fastflow.engine.datasets import levels_of_values, load_data
from fastflow.engine.errors import SettingsError
from fastflow.engine.files import write_text
from fastflow.engine.models import build_model
from fastflow.engine.objectives import objective_for
from fastflow.engine.run import load_trained
from fastflow.engine.settings import from_dict

__all__ = ["COLUMNS", "run_sweep"]

COLUMNS = ("beta", "rate", "distortion", "elbo", "elbo_error", "bits_per_dim", "active")
WIDTH, HEIGHT, MARGIN = 720, 480, 72
INK, FAINT, ACCENT = (32, 32, 32), (205, 205, 205), (200, 70, 50)


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
        error in nats per image, bits/dim, both those of integer images, and the number of active units; and the paths.

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
    """Distortion over rate, a point for each beta, with the line of models of the best ELBO found."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    points = [(row["rate"], row["distortion"]) for row in rows]
    lows, highs = (tuple(pick(values) for values in zip(*points, strict=True)) for pick in (min, max))
    spans = [max(high - low, 1e-6) * 1.15 for low, high in zip(lows, highs, strict=True)]
    lows = [max(0.0, lows[0] - 0.065 * spans[0]), lows[1] - 0.065 * spans[1]]  # a rate has no less

    def place(rate, distortion):
        return (MARGIN + (rate - lows[0]) / spans[0] * (WIDTH - 24 - MARGIN),
                HEIGHT - MARGIN - (distortion - lows[1]) / spans[1] * (HEIGHT - MARGIN - 48))

    best = max(rows, key=lambda row: row["elbo"])
    draw.line([place(rate, -best["elbo"] - rate) for rate in (lows[0], lows[0] + spans[0])], fill=FAINT, width=2)
    draw.rectangle([0, 0, WIDTH, 44], fill="white")
    draw.rectangle([0, HEIGHT - MARGIN + 1, WIDTH, HEIGHT], fill="white")
    draw.line([(MARGIN, 44), (MARGIN, HEIGHT - MARGIN), (WIDTH - 20, HEIGHT - MARGIN)], fill=INK)
    draw.line([place(*point) for point in sorted(points)], fill=INK, width=1)
    for row, point in zip(rows, points, strict=True):
        x, y = place(*point)
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=ACCENT)
        draw.text((x + 7, y - 14), f"beta {row['beta']:g}", fill=INK)
    draw.text((MARGIN, 14), f"rate-distortion, nats per image; grey: the best ELBO, {best['elbo']:.4g}, of beta "
              f"{best['beta']:g}", fill=INK)
    draw.text((8, 48), "distortion", fill=INK)
    draw.text((WIDTH - 60, HEIGHT - MARGIN + 26), "rate", fill=INK)
    for value in (lows[1], lows[1] + spans[1]):
        draw.text((8, place(lows[0], value)[1] - (18 if value == lows[1] else -16)), f"{value:.5g}", fill=INK)
    for share in (0.0, 0.94):
        draw.text((MARGIN + share * (WIDTH - 24 - MARGIN), HEIGHT - MARGIN + 8),
                  f"{lows[0] + share * spans[0]:.3g}", fill=INK)
    image.save(path, format="PNG")
    return path
