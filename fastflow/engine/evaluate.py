"""Figures and pictures of a model. Each draws from a seed of its own and leaves torch's generators as they were."""

import math

import torch

from fastflow.engine.aside import aside
from fastflow.engine.distributed import unwrap
from fastflow.engine.objectives import levels_of

__all__ = ["bound", "describe", "evaluate", "is_vae", "reconstructions", "sample_rows", "samples"]

BATCH = 256


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
        {name: float}: bits_per_dim, for a VAE also elbo, rate and distortion in nats per image; of rows log_prob, in
        nats per row.
    """
    sums = {}
    with aside(model, device, seed):
        for batch in images.split(BATCH):
            poll()
            for name, values in objective.report(model, batch.to(device)).items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    return {name: total / len(images) for name, total in sums.items()}


def bound(model, objective, images, device, n_samples, seed=0, poll=lambda: None):
    """The mean of log(1/K sum of K weights), see :meth:`fastflow.engine.objectives.Objective.log_weight`, over all
    images; arguments as for :func:`evaluate`.

    Args:
        n_samples: K, each a forward of its own.

    Returns:
        {"bound": in nats per example, "bound_samples": K}, of images "bound_bits_per_dim" too.
    """
    total = 0.0
    with aside(model, device, seed):
        for batch in images.split(BATCH):
            x, summed = batch.to(device), None
            for _ in range(n_samples):
                poll()
                weight = objective.log_weight(model, x).double()
                summed = weight if summed is None else torch.logaddexp(summed, weight)
            total += (summed - math.log(n_samples)).sum().item()
    figures = {"bound": total / len(images), "bound_samples": n_samples}
    if not images.is_floating_point():
        figures["bound_bits_per_dim"] = -figures["bound"] / (images[0].numel() * math.log(2))
    return figures


def describe(figures):
    """Held-out figures as text."""
    units = {"bits_per_dim": "bits/dim", "elbo": "ELBO", "rate": "rate", "distortion": "distortion",
             "log_prob": "log-likelihood"}
    text = "  ".join(f"{unit} {figures[name]:.4f}" for name, unit in units.items() if name in figures)
    if "bound" in figures:
        text += f"  {figures['bound_samples']}-sample bound {figures['bound']:.4f}"
    return text + (" (nats per image)" if "elbo" in figures else " nats per row" if "log_prob" in figures else "")


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
