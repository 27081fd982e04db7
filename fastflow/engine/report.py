"""One self-contained HTML page about a run: settings, curves, figures, pictures, diagnosis, throughput, environment."""

import base64
import html
import json
import platform
from pathlib import Path

import torch

from fastflow.engine.datasets import load_data
from fastflow.engine.evaluate import _aside, evaluate, is_vae, reconstructions, samples
from fastflow.engine.files import write_text
from fastflow.engine.objectives import levels_of, objective_for
from fastflow.engine.pictures import save_grid
from fastflow.engine.run import load_trained

__all__ = ["curve", "kl_per_latent", "write_report"]

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 200, 64, 24
MAX_POINTS = 400  # of a curve; longer logs are averaged down
TRAVERSED = 8
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:940px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}
figure{display:inline-block;margin:0 12px 12px 0}figcaption{font-weight:600}img{max-width:440px}"""


def write_report(directory, device, n_images=512):
    """Writes DIR/report.html, without any reference to other files, from the newest checkpoint and the log.

    Args:
        directory: a run's directory.
        device: torch.device to compute on.
        n_images: held-out images, at most, that figures and diagnosis are computed from.

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
    objective = objective_for(model, n_bins=images.n_bins)
    held_out = images.test[:n_images]
    figures = evaluate(model, objective, held_out, device)
    log = _read_log(directory / "metrics.jsonl")
    parts = [f"<h1>{html.escape(directory.name)}</h1><p>{html.escape(settings.description)}</p>",
             "<h2>Held out</h2>", _table({"step": trained.step, "images": len(held_out),
                                          **{name: f"{value:.4f}" for name, value in figures.items()}}),
             "<h2>Curves</h2>", *_curves(log), "<h2>Pictures</h2>", *_pictures(trained, objective, images, device)]
    if hasattr(model, "posterior"):
        with _aside(model, device, 0):
            kl = kl_per_latent(model, objective.prepare(model, held_out.to(device))[0])
        if kl is not None:
            parts += ["<h2>Diagnosis</h2>", f"<p>{int((kl > 0.01).sum())} of {len(kl)} latents carry more than 0.01 "
                      f"nats; together {kl.sum().item():.2f} nats per image.</p>", _bars(kl.sort(descending=True)[0])]
    speeds = [line["images_per_second"] for line in log if "images_per_second" in line]
    if speeds:
        parts += ["<h2>Throughput</h2>", _table({"median images/s": f"{sorted(speeds)[len(speeds) // 2]:.0f}"})]
    sections = {f"{section}.{key}" if isinstance(value, dict) else section: inner
                for section, value in settings.model_dump().items() if section != "description"
                for key, inner in (value.items() if isinstance(value, dict) else [("", value)])}
    parts += ["<h2>Settings</h2>", _table(sections), "<h2>Environment of this report</h2>",
              _table({"Python": platform.python_version(), "torch": torch.__version__, "device": device,
                      "platform": platform.platform()})]
    path = directory / "report.html"
    write_text(path, f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(directory.name)}'
               f"</title><style>{STYLE}</style>\n" + "\n".join(parts) + "</html>\n")
    return path


def kl_per_latent(model, x):
    """Mean over the batch of KL(q(z_d | x) || p(z_d)) in nats, (D,): of Gaussian posteriors against N(0, I) and of bits
    against their prior; None for other models.

    1/2 (mean^2 + exp(logvar) - 1 - logvar); Kingma and Welling 2014, appendix B.
    """
    if hasattr(model, "prior_logits"):
        q, p = model.posterior(x), model.prior()
        if model.n_classes != 2:
            return None
        posterior, prior = (torch.distributions.Bernoulli(logits=t.logits.expand_as(q.logits)) for t in (q, p))
        return torch.distributions.kl_divergence(posterior, prior).flatten(1).mean(0)
    from fastflow.vae import GaussianPosterior

    if type(model.posterior) is not GaussianPosterior or model.prior is not None:
        return None
    mean, log_sigma = model.posterior.moments(model.encoder(x))
    q = torch.distributions.Normal(mean, log_sigma.exp())
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(0)


def curve(title, points):
    """An SVG line through points [(x, y)]; those that are not finite are left out."""
    points = [(x, y) for x, y in points if abs(y) < float("inf")]
    if len(points) < 2:
        return ""
    size = -(-len(points) // MAX_POINTS)
    chunks = [points[i:i + size] for i in range(0, len(points), size)]
    points = [(chunk[-1][0], sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = points[0][0], points[-1][0]
    line = " ".join(f"{LEFT + (x - first) / max(last - first, 1) * (WIDTH - LEFT - 8):.1f},"
                    f"{8 + (high - y) / ((high - low) or 1) * (HEIGHT - BOTTOM - 12):.1f}" for x, y in points)
    labels = [(LEFT - 4, 16, "end", f"{high:.4g}"), (LEFT - 4, HEIGHT - BOTTOM, "end", f"{low:.4g}"),
              (LEFT, HEIGHT - 6, "start", first), (WIDTH - 8, HEIGHT - 6, "end", f"step {last}")]
    texts = "".join(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12">{text}</text>'
                    for x, y, anchor, text in labels)
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><svg xmlns="http://www.w3.org/2000/svg" '
            f'width="{WIDTH}" height="{HEIGHT}"><path d="M{LEFT} 4V{HEIGHT - BOTTOM}H{WIDTH}" fill="none" '
            f'stroke="#999"/><polyline points="{line}" fill="none" stroke="#06c" stroke-width="1.5"/>{texts}'
            "</svg></figure>")


def _bars(values):
    """KL of each latent, largest first."""
    top, step = max(values.max().item(), 1e-9), (WIDTH - LEFT) / len(values)
    bars = "".join(f'<rect x="{LEFT + i * step:.1f}" y="{HEIGHT - BOTTOM - h:.1f}" width="{0.8 * step:.1f}" '
                   f'height="{h:.1f}" fill="#06c"/>'
                   for i, h in enumerate(v / top * (HEIGHT - BOTTOM - 12) for v in values.tolist()))
    return (f'<figure><figcaption>KL per latent, nats, largest first</figcaption><svg '
            f'xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}">{bars}<text x="{LEFT - 4}" y="20" '
            f'text-anchor="end" font-size="12">{top:.3g}</text></svg></figure>')


def _curves(log):
    names = ("bits_per_dim", "elbo", "rate", "distortion", "grad_norm", "images_per_second")
    names = [name for stem in names for name in (stem, f"test_{stem}")]
    return [curve(name, [(line["step"], line[name]) for line in log if name in line]) for name in names]


def _pictures(trained, objective, images, device):
    model, options, folder = trained.model, trained.settings.sample, trained.path.parent.parent / "samples"
    drawn, _ = samples(model, options.count, images.n_bins, device, options.temperature)
    grids = [("samples", drawn, None)]
    if is_vae(model):
        original = images.test[:32]
        made = reconstructions(model, objective, original, device).cpu()
        pairs = torch.stack([original.unflatten(0, (-1, 8)), made.unflatten(0, (-1, 8))], 1).flatten(0, 2)
        grids.append(("reconstructions", pairs, 8))
    if hasattr(model, "traverse"):
        with _aside(model, device, 0):
            x, _ = objective.prepare(model, images.test[:64].to(device))
            kl, z = kl_per_latent(model, x), model.encode(x[:1])[0]
            if kl is not None:
                rows = model.traverse(z, kl.argsort(descending=True)[:TRAVERSED].tolist())
                grids.append(("traversals", levels_of(model, rows.flatten(0, 1), images.n_bins), rows.shape[1]))
    for name, grid, columns in grids:
        path = save_grid(folder / f"report-{name}.png", grid, images.n_bins, columns)
        coded = base64.b64encode(path.read_bytes()).decode()
        yield f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="data:image/png;base64,{coded}"></figure>'


def _table(rows):
    return "<table>" + "".join(f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
                               for key, value in rows.items()) + "</table>"


def _read_log(path):
    """The log's lines; one that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
