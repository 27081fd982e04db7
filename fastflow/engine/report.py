"""One self-contained HTML page about a run: settings, curves, figures, pictures, diagnosis, throughput, environment."""

import base64
import html
import os
import platform
import statistics
from pathlib import Path

import torch

import fastflow
from fastflow import backends
from fastflow.diagnostics import inversion_error
from fastflow.engine.aside import aside
from fastflow.engine.datasets import levels_of_values, load_data
from fastflow.engine.evaluate import evaluate
from fastflow.engine.files import read_log, write_text
from fastflow.engine.gallery import draw, draw_curves
from fastflow.engine.objectives import objective_for
from fastflow.engine.run import load_trained

__all__ = ["write_report"]

INVERTED = 64  # images that a flow is run forth and back on
UNITS = {"bits_per_dim": ("bits/dim", ""), "elbo": ("ELBO", "nats per image"), "rate": ("rate", "nats per image"),
         "distortion": ("distortion", "nats per image"), "log_prob": ("log-likelihood", "nats per row")}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em;color:#222}
h1{margin-bottom:0}h2{margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse}td,th{padding:2px 18px 2px 0;text-align:left;vertical-align:top}
td:first-child{color:#666;white-space:nowrap}.columns{columns:2;column-gap:3em}
figure{display:inline-block;vertical-align:top;margin:0 16px 12px 0;max-width:100%}
figcaption{font-weight:600;margin-bottom:4px}.small img{max-width:480px}img{max-width:100%}"""


def write_report(directory, device):
    """Writes DIR/report.html, without any reference to other files, from the newest checkpoint and the log; the
    pictures in it are written anew beside it, as at the end of a training.

    Args:
        directory: a run's directory.
        device: torch.device to compute on.

    Returns:
        The path.

    Raises:
        RunError: there is no run.
        CheckpointError: its newest checkpoint is bad.
    """
    directory = Path(directory)
    trained = load_trained(directory, device)
    settings, model = trained.settings, trained.model
    images = load_data(settings)
    objective = objective_for(model, n_bins=levels_of_values(settings),
                              n_samples=getattr(settings.model, "n_samples", 1))
    unit = "rows" if images.test.is_floating_point() else "images"
    doubt = trained.doubt(images, unit)
    figures = evaluate(model, objective, images.test, device, labels=getattr(images, "test_labels", None))
    log, name = read_log(directory / "metrics.jsonl"), directory.resolve().name
    drawn = draw(directory, model, objective, settings, images, device, trained.step, name)
    curves = draw_curves(directory)
    parts = [f"<h1>{html.escape(name)}</h1><p>{html.escape(settings.description)}</p>",
             "<h2>Held out</h2>", _figures(figures, trained.step, len(images.test), unit),
             f"<p>{html.escape(doubt)}</p>" if doubt else ""]
    if curves:
        parts += ["<h2>Curves</h2>", _picture("", curves)]
    path = drawn["samples"]
    parts.append('<h2>Samples</h2><div class="small">')
    parts.append(_picture("samples", path) if path.endswith(".png") else f"<p>{html.escape(path)}</p>")
    if "reconstructions" in drawn:
        parts.append(_picture("held-out images, and below each its reconstruction", drawn["reconstructions"]))
    parts.append("</div><h2>Diagnosis</h2>")
    parts.append(_picture("", drawn["diagnosis"]) if "diagnosis" in drawn
                 else _inversion(model, objective, images.test[:INVERTED], device, unit))
    if speeds := [line[f"{unit}_per_second"] for line in log if f"{unit}_per_second" in line]:
        speed = statistics.median(speeds)
        seconds = trained.step * settings.train.batch_size / speed
        parts += ["<h2>Throughput</h2>", _table({f"median {unit}/s of the steps logged": f"{speed:.0f}",
                                                 "so all steps together take about": f"{seconds:.0f} s"})]
    sections = {f"{section}.{key}" if key else section: inner
                for section, value in settings.model_dump().items() if section != "description"
                for key, inner in (value.items() if isinstance(value, dict) else [("", value)])}
    parts += ["<h2>Settings</h2>", f'<div class="columns">{_table(sections)}</div>',
              "<h2>Environment of this report</h2>", _table(_environment(device))]
    path = directory / "report.html"
    write_text(path, f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
               f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n")
    return path


def _figures(figures, step, n_examples, unit):
    rows = {}
    for name, value in figures.items():
        bound = (f"importance-weighted bound of {name.removeprefix('iwae_')} samples", "nats per image")
        label, measure = UNITS.get(name, bound if name.startswith("iwae_") else (name.replace("_", " "), ""))
        rows[label] = f"{value:.4f} {measure}"
    return _table({"step": step, unit: n_examples, **rows})


def _inversion(model, objective, images, device, unit):
    """How exactly a flow inverts: images or rows there and back."""
    if not hasattr(model, "transform"):
        return "<p>None for this kind of model.</p>"
    with aside(model, device, 0):
        found = inversion_error(model, objective.prepare(model, images.to(device))[0])
    return _table({f"largest error of inverse(forward(x)), {len(images)} {unit}": f"{found.absolute:.2e}",
                   "the same over 1 + |x|": f"{found.relative:.2e}",
                   "largest sum of the two log-determinants": f"{found.logdet:.2e} nats"})


def _environment(device):
    found = {"fastflow": fastflow.__version__, "Python": platform.python_version(), "torch": torch.__version__,
             "platform": platform.platform(), "CPUs": os.cpu_count(), "threads": torch.get_num_threads(),
             "device": device}
    if device.type == "cuda":
        found["GPU"] = torch.cuda.get_device_name(device)
    return found | {f"backend {name}": reason for name, reason in backends.status().items()}


def _picture(caption, path):
    coded = base64.b64encode(Path(path).read_bytes()).decode()
    above = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{above}<img alt="{html.escape(Path(path).stem)}" src="data:image/png;base64,{coded}"></figure>'


def _table(rows):
    return "<table>" + "".join(f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
                               for key, value in rows.items()) + "</table>"
