"""The linear VAE in closed form: which latents collapse, before anything is trained."""

import math
from typing import NamedTuple

import torch

from fastflow import checks

__all__ = ["LinearOptimum", "data_eigenvalues", "linear_optimum"]


class LinearOptimum(NamedTuple):
    """The optimum of a linear beta-VAE, direction by direction, largest eigenvalue first.

    Attributes:
        rate: (D,) nats, 1/2 log(lambda / s) where that is positive.
        distortion: (D,) mean squared error, min(lambda, s).
        active: (D,) bool, lambda > s; the others must collapse.
        threshold: s = beta * sigma^2, a float in the data's squared units.
    """

    rate: torch.Tensor
    distortion: torch.Tensor
    active: torch.Tensor
    threshold: float

    def summary(self):
        """One line of text."""
        if not self.distortion.isfinite().all():
            return "no prediction of collapse: the data's variances are not finite"
        kept, total = int(self.active.sum()), len(self.active)
        return (f"a linear model keeps {kept} of {total} directions and loses {total - kept} "
                f"(beta * sigma^2 = {self.threshold:.4g}): rate {self.rate.sum().item():.4g} nats, "
                f"squared error {self.distortion.sum().item():.4g}")


def data_eigenvalues(x):
    """Eigenvalues (D,) of the covariance, divided by N, of x (N, *event), largest first, float64."""
    checks.tensor("x", x, floating=False)
    if len(x) < 2:
        raise ValueError(f"x: expected at least 2 examples, got {len(x)}")
    flat = x.flatten(1).double()
    centred = flat - flat.mean(0)
    n, d = flat.shape
    gram = centred.mT @ centred if d <= n else centred @ centred.mT  # of the same eigenvalues but for zeros
    found = torch.linalg.eigvalsh(gram / n).clamp_min(0.0).flip(0)
    return torch.cat([found, found.new_zeros(d - len(found))])


def linear_optimum(eigenvalues, sigma, beta=1.0, latent_features=None):
    """What a linear VAE with decoder N(Wz + b, sigma^2 I) reaches at KL weight beta: reverse water-filling.

    Only s = beta * sigma^2 matters. Directions of less variance than s carry no rate, and a nonlinear VAE that starts
    near a linear one loses them first.

    Args:
        eigenvalues: (D,) of the data's covariance, see :func:`data_eigenvalues`.
        sigma: standard deviation of the likelihood, positive.
        beta: weight of the KL, positive.
        latent_features: latents that the model has, None for D or more; with fewer, the largest eigenvalues go first.

    References:
        Cover and Thomas, "Elements of information theory", section 10.3.3.
        Lucas et al., "Don't blame the ELBO!", 2019, arXiv:1911.02469.
    """
    checks.tensor("eigenvalues", eigenvalues)
    if eigenvalues.dim() != 1:
        raise ValueError(f"eigenvalues: expected shape (D,), got {tuple(eigenvalues.shape)}")
    for name, value in (("sigma", sigma), ("beta", beta)):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: expected a finite positive number, got {value!r}")
    values = eigenvalues.sort(descending=True).values
    s = beta * sigma * sigma
    active = values > s
    if latent_features is not None:
        latent_features = checks.count("latent_features", latent_features)
        active = active & (torch.arange(len(values), device=values.device) < latent_features)
    rate = torch.where(active, 0.5 * torch.log(torch.where(active, values, s) / s), 0.0)
    rate = torch.where(values.isnan(), values, rate)
    return LinearOptimum(rate, torch.where(active, s, values), active, s)
