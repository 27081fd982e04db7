"""Rate against distortion, and traversals of the latents ranked by what they carry."""

import math
from typing import NamedTuple

import torch

from fastflow import checks
from fastflow.diagnostics.latents import active_units, check_bound, has_moments, latents_and_kl, posterior_moments

__all__ = ["RateDistortion", "Traversal", "rate_distortion", "rate_distortion_sweep", "traversal_grid"]


class RateDistortion(NamedTuple):
    """One model's mean rate and distortion over a data set, floats in nats for one example.

    Attributes:
        rate: E KL(q(z|x) || p(z)), in closed form where there is one.
        distortion: -E log p(x|z).
        elbo: -rate - distortion.
        elbo_error: its standard error over the examples.
        active: number of active units, None where z is not drawn from a diagonal Gaussian.
        beta: that it was trained with, None if unknown.
    """

    rate: float
    distortion: float
    elbo: float
    elbo_error: float
    active: int | None = None
    beta: float | None = None


class Traversal(NamedTuple):
    """Latents that each move alone, those with the largest KL first.

    Attributes:
        dims: (R,) their indices in the flattened latent.
        kl: (R,) their mean KL in nats.
        values: (V,) that each takes.
        images: (R, V, *event) the likelihood's means.
    """

    dims: torch.Tensor
    kl: torch.Tensor
    values: torch.Tensor
    images: torch.Tensor


@torch.no_grad()
def rate_distortion(model, x, context=None, *, n_samples=1, batch_size=1024, beta=None, generator=None):
    """RateDistortion of a model with ``elbo`` over x (N, *event), in the mode (train or eval) that it is in.

    Args:
        context: (N, ...) for a conditional model.
        n_samples: draws of z for each example.
        batch_size: examples that go through the networks at a time.
        beta: kept in the result; the ELBO is unweighted.
        generator: of the draws of z, or None.
    """
    check_bound(model)
    checks.tensor("x", x, floating=False)
    if len(x) < 1:
        raise ValueError("x: expected at least one example, got none")
    batch_size = checks.count("batch_size", batch_size, 1)
    rates, distortions = [], []
    for i in range(0, len(x), batch_size):
        options = {} if context is None else {"context": context[i:i + batch_size]}
        if generator is not None:
            options["generator"] = generator
        bound = model.elbo(x[i:i + batch_size], n_samples, **options)
        rates.append(bound.rate.double())
        distortions.append(bound.distortion.double())
    rate, distortion = torch.cat(rates), torch.cat(distortions)
    elbo = -rate - distortion
    error = elbo.std().item() / math.sqrt(len(elbo)) if len(elbo) > 1 else math.nan
    active = None
    if has_moments(model) and len(x) > 1:
        active = int(active_units(posterior_moments(model, x, context, batch_size=batch_size)[0]).sum())
    return RateDistortion(rate.mean().item(), distortion.mean().item(), elbo.mean().item(), error, active, beta)


def rate_distortion_sweep(fit, betas, x, **options):
    """[RateDistortion] of models trained with several KL weights, in the order of ``betas``.

    Args:
        fit: function from beta to a trained model.
        betas: positive numbers.
        x: (N, *event) that is measured, held-out as a rule.
        options: of :func:`rate_distortion`.

    References:
        Alemi et al., "Fixing a broken ELBO", 2018, arXiv:1711.00464.
    """
    betas = list(betas)
    for beta in betas:
        if not 0.0 < beta < math.inf:
            raise ValueError(f"betas: expected finite positive numbers, got {beta!r}")
    return [rate_distortion(fit(beta), x, beta=beta, **options) for beta in betas]


@torch.no_grad()
def traversal_grid(model, x, n_dims=10, values=None, *, index=0):
    """Traversal of the ``n_dims`` latents with the largest mean KL over x (N, *event), from example ``index``'s mean.

    Args:
        model: a VAE with a GaussianPosterior; where the prior is no diagonal Gaussian, the KL to N(0, I) ranks them.
        values: (V,) that each latent takes; None for 7 from -3 to 3.
    """
    kl = latents_and_kl(model, x)[2].mean(0)
    n_dims = checks.count("n_dims", n_dims, 1)
    if not 0 <= index < len(x):
        raise ValueError(f"index: expected one from 0 to {len(x) - 1}, got {index!r}")
    dims = kl.argsort(descending=True, stable=True)[:n_dims]
    values = torch.linspace(-3.0, 3.0, 7) if values is None else torch.as_tensor(values)
    start = model.encode(x[index:index + 1])[0]
    return Traversal(dims, kl[dims], values, model.traverse(start, dims.tolist(), values))
