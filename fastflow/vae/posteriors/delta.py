"""Gaussians that can't collapse: a least KL to the prior, whatever the encoder gives (delta-VAEs)."""

import math

import torch

from fastflow import checks
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.posteriors.closed import is_standard
from fastflow.vae.posteriors.gaussian import GaussianPosterior

__all__ = ["DeltaGaussianPosterior", "ar1_least_rate", "delta_gaussian"]


class DeltaGaussianPosterior(GaussianPosterior):
    """A diagonal Gaussian whose KL to N(0, 1) is at least ``least`` nats for each element; params are (B, 2D, *S), the
    raw mean and scale of :func:`delta_gaussian` packed along dim 1.

    Args:
        least: nats, positive.

    Raises:
        ValueError: when called with a prior other than N(0, I), which the least rate is not to.
    """

    def __init__(self, least):
        super().__init__("logvar")
        self.least = least

    @property
    def least(self):
        return self._least

    @least.setter
    def least(self, value):
        # Found here, because a graph would trace the search step by step; two numbers, because a graph takes those of a
        # tuple for constants.
        self._low, self._high = _log_variances(value)
        self._least = value

    def forward(self, params, prior=None, n_samples=1, **options):
        if not is_standard(prior):
            raise ValueError(f"prior: expected N(0, I) for a DeltaGaussianPosterior, got {type(prior).__name__}")
        return super().forward(self._bounded(params), prior, n_samples, **options)

    def moments(self, params):
        return super().moments(self._bounded(params))

    def mean(self, params):
        return super().mean(self._bounded(params))

    def _bounded(self, params):
        raw = self._halves(promoted(params, "params"))
        return torch.cat(_within(*raw, self._least, self._low, self._high), 1)

    def extra_repr(self):
        return f"least={self.least}"


def delta_gaussian(raw_mean, raw_scale, least):
    """(mean, log-variance), shaped like the raw ones, of Gaussians whose KL to N(0, 1) is at least ``least`` nats for
    each element, whatever the encoder gives (a delta-VAE's posterior).

    sigma lies where log sigma^2 - sigma^2 + 2 least + 1 >= 0, through a sigmoid; the mean's size is the square root of
    that, to which relu(raw_mean) is added. Concatenate the two along dim 1 for GaussianPosterior("logvar").

    References:
        Razavi et al., "Preventing posterior collapse with delta-VAEs", 2019, arXiv:1901.03416.
    """
    return _within(raw_mean, raw_scale, least, *_log_variances(least))


def _within(raw_mean, raw_scale, least, low, high):
    """:func:`delta_gaussian` between the log-variances ``low`` and ``high``."""
    logvar = low + (high - low) * torch.sigmoid(raw_scale)
    # 2 KL is the mean's square plus expm1(v) - v; from 1 + v - exp(v) a small least would be rounding.
    square = 2.0 * least - (torch.expm1(logvar) - logvar)
    # At the ends of the interval it is zero up to rounding; the root's slope there would be infinite.
    return square.clamp(min=torch.finfo(logvar.dtype).eps).sqrt() + torch.relu(raw_mean), logvar


def ar1_least_rate(correlation, length):
    """The least KL in nats, over all independent Gaussians q(z_1) ... q(z_length), to the stationary AR(1) prior of
    unit variance and that correlation: what a delta-VAE on such a sequence can't go below. Per latent channel.

    ((length - 2) log(1 + a^2) - log(1 - a^2)) / 2 for a length of at least 2, else 0; reference as for
    :func:`delta_gaussian`.
    """
    if not -1.0 < correlation < 1.0:
        raise ValueError(f"correlation: expected a number between -1 and 1, got {correlation!r}")
    length = checks.count("length", length, 1)
    square = correlation**2
    return 0.0 if length == 1 else 0.5 * ((length - 2) * math.log1p(square) - math.log1p(-square))


def _log_variances(least):
    """(low, high), the least and the largest log-variance of a Gaussian whose KL to N(0, 1) may be ``least`` nats.

    Raises:
        ValueError: ``least`` is no finite positive number.
    """
    if not 0.0 < least < math.inf:
        raise ValueError(f"least: expected a finite number > 0, got {least!r}")
    # From 2 on exp(v) - v is at least exp(v)/2.
    above = max(2.0, math.log(2.0) + math.log1p(2.0 * least))
    return _root(least, -2.0 * least - 2.0, 0.0), _root(least, above, 0.0)


def _root(least, outside, inside):
    """The root of v - exp(v) + 2 least + 1 between log-variances, negative at the first, positive at the second."""
    for _ in range(200):
        middle = 0.5 * (outside + inside)
        if middle - math.exp(middle) + 2.0 * least + 1.0 < 0.0:
            outside = middle
        else:
            inside = middle
    return inside
