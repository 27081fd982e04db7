"""A Gaussian prior that depends on labels or another context."""

import math

from torch import nn

from fastflow import checks, functional
from fastflow.vae.priors.gaussian import DiagonalGaussian

__all__ = ["ConditionalGaussianPrior"]


class GaussianAt(DiagonalGaussian):
    """The Gaussian of one context for each example: mean and raw (B, D, *S) are given, not parameters."""

    def __init__(self, mean, raw, scale):
        self.mean, self.raw, self.scale, self.event_shape = mean, raw, scale, mean.shape[1:]

    def log_prob(self, z):
        """(B,) of z (B, D, *S), or (K, B) of z (K, B, D, *S)."""
        checks.tensor("z", z)
        sigma, log_sigma = self.sigma_and_log()
        residual = (z - self.mean) / sigma
        each = -(0.5 * residual * residual + log_sigma + 0.5 * math.log(2.0 * math.pi))
        return each.flatten(z.dim() - self.mean.dim() + 1).sum(-1)


class ConditionalGaussianPrior(nn.Module):
    """p(z | context), a diagonal Gaussian whose mean and raw scale ``network`` makes of the context, packed along
    dim 1. With a Gaussian posterior of the same scale the KL is analytic.

    Args:
        latent_shape: (D, *S).
        network: module from the context (B, ...) to (B, 2D, *S); for labels (B,) int64 an ``nn.Embedding`` of 2D
            columns makes one Gaussian for each class.
        scale: what raw is, the same as the posterior's.
    """

    conditional = True

    def __init__(self, latent_shape, network, scale="logvar"):
        super().__init__()
        checks.choice("scale", scale, functional.SCALES)
        self.event_shape = tuple(checks.extent("latent_shape", latent_shape))
        self.network = network
        self.scale = scale

    def given(self, context):
        """The prior for these contexts (B, ...), one Gaussian for each example."""
        if context is None:
            raise ValueError("context: expected a tensor for a ConditionalGaussianPrior, got None")
        checks.tensor("context", context, floating=False)
        params = self.network(context)
        checks.shape("network output", params, (context.shape[0], 2 * self.event_shape[0], *self.event_shape[1:]))
        return GaussianAt(*params.chunk(2, 1), self.scale)

    def log_prob(self, z, context=None):
        """(B,) nats of z (B, D, *S)."""
        return self.given(context).log_prob(z)

    def sample(self, n, *, context=None, generator=None, temperature=1.0):
        """(n, D, *S), one for each of n contexts."""
        return self.given(context).sample(n, generator=generator, temperature=temperature)
