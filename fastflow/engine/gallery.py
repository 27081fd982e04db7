"""The pictures of a run: samples, reconstructions, the diagnosis of a VAE, curves; of a table sampled rows."""

import torch

from fastflow.engine import charts
from fastflow.engine.diagnosis import diagnose_images, write_diagnosis
from fastflow.engine.evaluate import is_vae, reconstructions, sample_rows, samples
from fastflow.engine.files import read_log, write_rows
from fastflow.engine.labels import classes_of
from fastflow.engine.pictures import save_grid

__all__ = ["diagnosed", "draw", "draw_curves"]

RECONSTRUCTED, COLUMNS = 32, 8


def draw(out, model, objective, settings, images, device, step, title, page=True):
    """Writes OUT/samples/step-NNNNNN.png and, for a VAE, OUT/samples/reconstructions-step-NNNNNN.png, rows of held-out
    images above rows of their reconstructions, and OUT/diagnosis/. Of a table OUT/samples/step-NNNNNN.csv.

    Args:
        out: the run's directory.
        model, objective: the model as it is to be shown, and its objective.
        settings: the run's.
        images: its data.
        device: where the model is.
        step, title: for names and headings.
        page: whether to diagnose a VAE.

    Returns:
        {name: path as text} of samples, reconstructions and diagnosis, and broken_samples, how many of the samples hold
        values that are not finite.
    """
    options, n_bins, name = settings.sample, objective.n_bins, f"step-{step:06d}.png"
    if hasattr(images, "columns"):
        rows, n_broken = sample_rows(model, options.count, device, options.temperature)
        path = write_rows((out / "samples" / name).with_suffix(".csv"), rows, images.columns)
        return {"samples": str(path), "broken_samples": n_broken}
    drawn, n_broken = samples(model, options.count, n_bins, device, options.temperature)
    found = {"samples": str(save_grid(out / "samples" / name, drawn, n_bins, classes_of(model) or None)),
             "broken_samples": n_broken}
    if is_vae(model):
        n = len(images.test)
        columns = min(COLUMNS, n)
        shown = torch.arange(0, n, max(1, n // RECONSTRUCTED))[:min(RECONSTRUCTED, n // columns * columns)]
        original, labels = images.test[shown], None if images.test_labels is None else images.test_labels[shown]
        made = reconstructions(model, objective, original, device, labels=labels).cpu()
        pairs = torch.stack([original.unflatten(0, (-1, columns)), made.unflatten(0, (-1, columns))], 1).flatten(0, 2)
        found["reconstructions"] = str(save_grid(out / "samples" / f"reconstructions-{name}", pairs, n_bins, columns))
    if page and is_vae(model):
        found["diagnosis"] = str(diagnosed(out, model, objective, settings, images, device, step, title)[1]["page"])
    return found


def diagnosed(out, model, objective, settings, images, device, step, title):
    """(diagnostics.Diagnosis of a VAE on the held-out images, {name: path} of what was written into OUT/diagnosis)."""
    found = diagnose_images(model, objective, images.test, device, beta=getattr(settings.model, "beta", 1.0),
                            labels=images.test_labels)
    return found, write_diagnosis(out / "diagnosis", found, model, images.n_bins, f"{title}, step {step}")


def draw_curves(out):
    """Writes OUT/curves.png from OUT/metrics.jsonl; returns its path, None where there is too little to show."""
    drawn = charts.curves(read_log(out / "metrics.jsonl"))
    return None if drawn is None else charts.save(out / "curves.png", drawn)
