"""Priors p(z). Any object with log_prob(z) over (N, D, *S) and sample(n, generator=, temperature=) can be one; N(0, I)
and the one here give the KL in closed form."""

import math

import torch
from torch import nn

from fastflow import checks, functional, reference

__all__ = ["GaussianPrior"]


class GaussianPrior(nn.Module):
    """A learned diagonal Gaussian, parameters ``mean`` and ``raw`` (1, D, *S); it starts near N(0, I).

    Args:
        latent_shape: (D, *S).
        scale: what raw is, the same as the posterior's: "logvar", "logstd", "std", "softplus" or "soft_tanh".
    """

    UNIT = {"std": 1.0, "softplus": math.log(math.expm1(1.0))}  # raw of sigma 1 where that is not 0

    def __init__(self, latent_shape, scale="logvar"):
        super().__init__()
        checks.choice("scale", scale, functional.SCALES)
        self.scale = scale
        self.event_shape = torch.Size([latent_shape] if isinstance(latent_shape, int) else latent_shape)
        self.mean = nn.Parameter(torch.zeros(1, *self.event_shape))
        self.raw = nn.Parameter(torch.full((1, *self.event_shape), self.UNIT.get(scale, 0.0)))

    def log_prob(self, z):
        """(N,) nats of z (N, D, *S)."""
        sigma, log_sigma = reference.sigma_and_log(self.raw, self.scale)
        residual = (z - self.mean) / sigma
        return -(0.5 * residual * residual + log_sigma + 0.5 * math.log(2.0 * math.pi)).flatten(1).sum(1)

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, D, *S) with the standard deviation times ``temperature``."""
        noise = torch.randn((n, *self.event_shape), generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + temperature * reference.sigma_and_log(self.raw, self.scale)[0] * noise
