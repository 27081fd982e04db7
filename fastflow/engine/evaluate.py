"""Figures and pictures of a model. Each draws from a seed of its own and leaves torch's generators as they were."""

import torch

from fastflow.engine.aside import aside
from fastflow.engine.distributed import unwrap
from fastflow.engine.labels import classes_of, given, known, predicted
from fastflow.engine.objectives import levels_of
from fastflow.vae import SemiSupervisedVAE

__all__ = ["describe", "evaluate", "is_vae", "reconstructions", "sample_rows", "samples"]

BATCH = 256
FEW_SAMPLES = 16  # of the latents, that a whole batch is evaluated with; with more of them batches are smaller


def is_vae(model):
    """Whether the model is one that encodes and decodes."""
    return hasattr(unwrap(model), "elbo")


def evaluate(model, objective, images, device, seed=0, poll=lambda: None, labels=None):
    """Means over all images of what the objective reports, with one dequantisation each.

    Args:
        model: a Flow or a VAE.
        objective: as from :func:`fastflow.engine.objectives.objective_for`.
        images: (N, C, H, W) uint8, or the rows (N, D) of a table.
        device: where to compute.
        seed: of the dequantisation and of a VAE's draws.
        poll: called between batches; may raise to stop.
        labels: (N,) int64 of the images, for models that take them.

    Returns:
        {name: float}: bits_per_dim, for a VAE also elbo, rate and distortion in nats per image, and iwae_K with K > 1
        samples of the latents; of rows log_prob, in nats per row. With labels the ELBO is that given the label, of a
        semi-supervised model that without it; and accuracy the share of the images whose class the model finds.
    """
    sums = {}
    size = max(1, BATCH * FEW_SAMPLES // max(FEW_SAMPLES, objective.draws(model)))
    with aside(model, device, seed):
        for start in range(0, len(images), size):
            poll()
            x = images[start:start + size].to(device)
            classes = None if labels is None else labels[start:start + size].to(device)
            for name, values in _report(model, objective, x, classes).items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    return {name: total / len(images) for name, total in sums.items()}


def _report(model, objective, x, labels):
    """{name: (B,)} of a batch."""
    # What a semi-supervised model is asked about is the image alone.
    beside = {} if isinstance(unwrap(model), SemiSupervisedVAE) else given(model, labels)
    found = objective.report(model, x, **beside)
    if labels is not None and (classes := predicted(model, objective.prepare(model, x)[0])) is not None:
        found["accuracy"] = classes == labels
    return found


def describe(figures):
    """Held-out figures as text: bits/dim, and the others in nats per image; of rows nats per row."""
    if "log_prob" in figures:
        return f"log-likelihood {figures['log_prob']:.4f} nats per row"
    names = {"elbo": "ELBO", "rate": "rate", "distortion": "distortion"}
    names |= {name: f"bound of {name.removeprefix('iwae_')} samples" for name in figures if name.startswith("iwae_")}
    nats = [f"{label} {figures[name]:.2f}" for name, label in names.items() if name in figures]
    right = f"  accuracy {100 * figures['accuracy']:.1f} %" if "accuracy" in figures else ""
    return "  ".join([f"bits/dim {figures['bits_per_dim']:.4f}", *nats]) + (" nats" if nats else "") + right


def samples(model, n, n_bins, device, temperature=1.0, seed=0):
    """(images, n_broken): n images of integer levels, uint8, drawn from the model, from a VAE the likelihood's means
    without its noise; and how many of them hold a value that is not finite. Of a model of images given their class one
    class follows the other, as many of each, n or a little more in all."""
    options, classes = {"mean": True} if is_vae(model) else {}, classes_of(model)
    with aside(model, device, seed):
        if classes:
            n = -(-n // classes)
            options["context"] = torch.arange(classes, device=device)
        x = model.sample(n, temperature=temperature, **options)
        x = x.flatten(0, 1) if classes else x
        return levels_of(model, x, n_bins), len(x) - int(torch.isfinite(x).flatten(1).all(1).sum())


def sample_rows(model, n, device, temperature=1.0, seed=0):
    """(rows, n_broken): n rows (n, D) of a table drawn from the model, in the table's units; and how many of them hold
    a value that is not finite."""
    with aside(model, device, seed):
        x = model.sample(n, temperature=temperature)
        return x.cpu(), n - int(torch.isfinite(x).all(1).sum())


def reconstructions(model, objective, images, device, seed=0, labels=None):
    """What a VAE makes of images (N, C, H, W), given their labels (N,) if it takes them: integer levels, uint8."""
    with aside(model, device, seed):
        x, _ = objective.prepare(model, images.to(device))
        context = known(model, x, None if labels is None else labels.to(device))
        return levels_of(model, model.reconstruct(x, **({} if context is None else {"context": context})),
                         objective.n_bins)
