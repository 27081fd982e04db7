"""Figures and pictures of a model. Each draws from a seed of its own and leaves torch's generators as they were."""

import torch

from fastflow.engine.aside import aside
from fastflow.engine.distributed import unwrap
from fastflow.engine.objectives import levels_of

__all__ = ["describe", "evaluate", "is_vae", "reconstructions", "sample_rows", "samples"]

BATCH = 256
FEW_SAMPLES = 16  # of the latents, that a whole batch is evaluated with; with more of them batches are smaller


def is_vae(model):
    """Whether the model is one that encodes and decodes."""
    return hasattr(unwrap(model), "elbo")


def evaluate(model, objective, images, device, seed=0, poll=lambda: None):
    """Means over all images of what the objective reports, with one dequantisation each.

    Args:
        model: a Flow or a VAE.
        objective: as from :func:`fastflow.engine.objectives.objective_for`.
        images: (N, C, H, W) uint8, or the rows (N, D) of a table.
        device: where to compute.
        seed: of the dequantisation and of a VAE's draws.
        poll: called between batches; may raise to stop.

    Returns:
        {name: float}: bits_per_dim, for a VAE also elbo, rate and distortion in nats per image, and iwae_K with K > 1
        samples of the latents; of rows log_prob, in nats per row.
    """
    sums = {}
    n_samples = max(FEW_SAMPLES, getattr(objective, "n_samples", 1))
    with aside(model, device, seed):
        for batch in images.split(max(1, BATCH * FEW_SAMPLES // n_samples)):
            poll()
            for name, values in objective.report(model, batch.to(device)).items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    return {name: total / len(images) for name, total in sums.items()}


def describe(figures):
    """Held-out figures as text: bits/dim, and the others in nats per image; of rows nats per row."""
    if "log_prob" in figures:
        return f"log-likelihood {figures['log_prob']:.4f} nats per row"
    names = {"elbo": "ELBO", "rate": "rate", "distortion": "distortion"}
    names |= {name: f"bound of {name.removeprefix('iwae_')} samples" for name in figures if name.startswith("iwae_")}
    nats = [f"{label} {figures[name]:.2f}" for name, label in names.items() if name in figures]
    return "  ".join([f"bits/dim {figures['bits_per_dim']:.4f}", *nats]) + (" nats" if nats else "")


def samples(model, n, n_bins, device, temperature=1.0, seed=0):
    """(images, n_broken): n images of integer levels, uint8, drawn from the model, from a VAE the likelihood's means
    without its noise; and how many of them hold a value that is not finite."""
    options = {"mean": True} if is_vae(model) else {}
    with aside(model, device, seed):
        x = model.sample(n, temperature=temperature, **options)
        return levels_of(model, x, n_bins), n - int(torch.isfinite(x).flatten(1).all(1).sum())


def sample_rows(model, n, device, temperature=1.0, seed=0):
    """(rows, n_broken): n rows (n, D) of a table drawn from the model, in the table's units; and how many of them hold
    a value that is not finite."""
    with aside(model, device, seed):
        x = model.sample(n, temperature=temperature)
        return x.cpu(), n - int(torch.isfinite(x).all(1).sum())


def reconstructions(model, objective, images, device, seed=0):
    """What a VAE makes of images (N, C, H, W): integer levels, uint8."""
    with aside(model, device, seed):
        x, _ = objective.prepare(model, images.to(device))
        return levels_of(model, model.reconstruct(x), objective.n_bins)
