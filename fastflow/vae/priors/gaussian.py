"""A learned Gaussian and mixtures of Gaussians as priors."""

import math

import torch
from torch import nn

from fastflow import checks, functional, reference
from fastflow.draws import choose, drawn

__all__ = ["GaussianPrior", "MixturePrior"]


def check_z(z, event_shape, parameter):
    """``z`` is (N, *event_shape), on the device of a prior's ``parameter`` and float64 if that is."""
    checks.tensor("z", z)
    checks.events("z", z, event_shape)
    checks.same_device("z", z, "the prior", parameter)
    checks.goes_with("z", z, "the prior", parameter)


class DiagonalGaussian:
    """A diagonal Gaussian over z (D, *S): its ``mean`` and ``raw`` (1, D, *S) or one for each z, and what raw is,
    ``scale``. No module in itself, since a graph can't make one."""

    def sigma_and_log(self):
        """(sigma, log sigma), each like raw."""
        return reference.sigma_and_log(self.raw, self.scale)

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, D, *S) with the standard deviation times ``temperature``."""
        checks.rng(generator)
        noise = drawn(torch.randn, (n, *self.event_shape), self.mean, generator)
        return self.mean + temperature * self.sigma_and_log()[0] * noise


class GaussianPrior(DiagonalGaussian, nn.Module):
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
        self.event_shape = checks.extent("latent_shape", latent_shape)
        self.mean = nn.Parameter(torch.zeros(1, *self.event_shape))
        self.raw = nn.Parameter(torch.full((1, *self.event_shape), self.UNIT.get(scale, 0.0)))

    def log_prob(self, z):
        """(N,) nats of z (N, D, *S)."""
        check_z(z, self.event_shape, self.mean)
        sigma, log_sigma = self.sigma_and_log()
        residual = (z - self.mean) / sigma
        return -(0.5 * residual * residual + log_sigma + 0.5 * math.log(2.0 * math.pi)).flatten(1).sum(1)


class MixturePrior(nn.Module):
    """sum_c w_c N(mean_c, diag(sigma_c^2)) with everything learned: ``logits`` (C,), ``mean`` and ``log_sigma``
    (C, D, *S). The weights start equal, the means as draws of N(0, I), sigma at 1.

    Args:
        latent_shape: (D, *S).
        n_components: C, at least 1.
    """

    def __init__(self, latent_shape, n_components=10):
        super().__init__()
        n_components = checks.count("n_components", n_components, 1)
        self.event_shape = checks.extent("latent_shape", latent_shape)
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.mean = nn.Parameter(torch.randn(n_components, *self.event_shape))
        self.log_sigma = nn.Parameter(torch.zeros(n_components, *self.event_shape))

    def component_log_prob(self, z):
        """(N, C) nats: the logarithms of w_c N_c at z (N, D, *S); normalised over C, the component's posterior."""
        check_z(z, self.event_shape, self.mean)
        residual = (z[:, None] - self.mean) * torch.exp(-self.log_sigma)
        each = -0.5 * residual * residual - self.log_sigma - 0.5 * math.log(2.0 * math.pi)
        return torch.log_softmax(self.logits, 0) + each.flatten(2).sum(2)

    def log_prob(self, z):
        """(N,) nats of z (N, D, *S)."""
        return torch.logsumexp(self.component_log_prob(z), 1)

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, D, *S); ``temperature`` scales the components' standard deviations."""
        checks.rng(generator)
        chosen = choose(torch.softmax(self.logits, 0), n, generator)
        noise = drawn(torch.randn, (n, *self.event_shape), self.mean, generator)
        return self.mean[chosen] + temperature * torch.exp(self.log_sigma[chosen]) * noise
