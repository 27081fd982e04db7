"""Likelihoods of bits, of numbers between 0 and 1, of classes and of counts."""

import math

import torch
import torch.nn.functional as F

from fastflow import checks, functional
from fastflow.draws import drawn
from fastflow.flows.special import STIRLING_FROM, log1p_ratio, stirling_tail
from fastflow.vae.likelihoods.base import Likelihood

__all__ = ["BernoulliLikelihood", "CategoricalLikelihood", "ContinuousBernoulliLikelihood",
           "NegativeBinomialLikelihood", "PoissonLikelihood"]

NEAR_HALF = 0.1  # |logit| / 2 below which the continuous Bernoulli's formulas are series


class BernoulliLikelihood(Likelihood):
    """Independent bits; the decoder's output is their logits. Data between 0 and 1 are accepted, but only for bits is
    this a normalised likelihood: ContinuousBernoulliLikelihood is one for them."""

    def log_density(self, x, logits):
        return -F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none")

    def total(self, x, logits):
        return functional.bernoulli_log_prob(x, logits)

    def mean_of(self, logits):
        return torch.sigmoid(logits)

    def draw(self, generator, logits):
        return torch.bernoulli(torch.sigmoid(logits), generator=generator)


class ContinuousBernoulliLikelihood(Likelihood):
    """Independent numbers in [0, 1] with density proportional to exp(h x), h the decoder's output (a logit).

    The density is exp(h x - A(h)) with A(h) = log((exp(h) - 1) / h), a series near h = 0, where the law is uniform.

    References:
        Loaiza-Ganem and Cunningham, "The continuous Bernoulli", 2019, arXiv:1907.06845.
    """

    def log_density(self, x, logits):
        value = logits * x - 0.5 * logits - _log_sinhc(0.5 * logits.abs())
        return torch.where((x < 0.0) | (x > 1.0), -math.inf, value)

    def mean_of(self, logits):
        # A'(h) = 1/2 + (coth(h/2) - 2/h)/2
        half = 0.5 * logits
        near = half.abs() < NEAR_HALF
        safe = torch.where(near, 1.0, half)
        small = torch.where(near, half, 0.0)  # the series of a large one, and so its gradient, would not be finite
        square = small.square()
        series = small * (1.0 / 3.0 - square * (1.0 / 45.0 - square * (2.0 / 945.0 - square * (
            1.0 / 4725.0 - square * 2.0 / 93555.0))))
        return 0.5 + 0.5 * torch.where(near, series, 1.0 / torch.tanh(safe) - 1.0 / safe)

    def draw(self, generator, logits):
        # The quantile log(1 + u (exp(h) - 1)) / h for h < 0; the law of -h is its mirror image.
        u = drawn(torch.rand, logits.shape, logits, generator)
        h = -logits.abs()
        flat = h > -1e-3
        safe = torch.where(flat, -1.0, h)
        x = torch.where(flat, u + 0.5 * h * u * (1.0 - u), torch.log1p(u * torch.expm1(safe)) / safe)
        return torch.where(logits > 0, 1.0 - x, x).clamp(0.0, 1.0)


def _log_sinhc(y):
    """log(sinh(y) / y) for y >= 0, accurate in value and slope."""
    near = y < NEAR_HALF
    safe = torch.where(near, 1.0, y)
    square = torch.where(near, y, 0.0).square()
    series = square * (1.0 / 6.0 - square * (1.0 / 180.0 - square * (1.0 / 2835.0 - square * (
        1.0 / 37800.0 - square / 467775.0))))
    return torch.where(near, series, safe + torch.log(-torch.expm1(-2.0 * safe)) - torch.log(2.0 * safe))


class CategoricalLikelihood(Likelihood):
    """Independent classes 0..n_classes-1; the output's n_classes groups of channels are their logits.

    x is (B, C, *S), or (B,) for one label each, any dtype; the output (*, B, n_classes*C, *S). ``mean`` is the
    likeliest class, since classes have no mean.

    Args:
        n_classes: at least 2.
    """

    takes_integers = True

    def __init__(self, n_classes):
        super().__init__()
        self.params_per_element = checks.count("n_classes", n_classes, 2)

    def log_density(self, x, *logits):
        log_p = torch.log_softmax(torch.stack(logits, -1), -1)
        index = x.to(torch.int64)
        inside = (index == x) & (index >= 0) & (index < self.params_per_element)
        index = torch.where(inside, index, 0).expand(log_p.shape[:-1])
        nan = x.isnan()
        found = log_p.gather(-1, index[..., None])[..., 0] * torch.where(nan, math.nan, 1.0)  # so are its gradients
        return torch.where(inside | nan, found, -math.inf)

    def probs(self, output):
        """(N, C, *S, n_classes) of output (N, n_classes*C, *S)."""
        return torch.softmax(torch.stack(self._params(output, 1), -1), -1)

    def mean_of(self, *logits):
        return torch.stack(logits, -1).argmax(-1)

    def draw(self, generator, *logits):
        probs = torch.softmax(torch.stack(logits, -1), -1)
        chosen = torch.multinomial(probs.flatten(0, -2), 1, generator=generator)
        return chosen.view(probs.shape[:-1])


class PoissonLikelihood(Likelihood):
    """Independent counts with rates exp(output)."""

    takes_integers = True

    def log_density(self, x, log_rate):
        return _counts(x, x * log_rate - torch.exp(log_rate) - torch.lgamma(x.clamp_min(0.0) + 1.0))

    def mean_of(self, log_rate):
        return torch.exp(log_rate)

    def draw(self, generator, log_rate):
        return torch.poisson(torch.exp(log_rate), generator=generator)


class NegativeBinomialLikelihood(Likelihood):
    """Independent overdispersed counts: a Poisson law whose rate has a gamma law.

    The output has twice x's channels: log m and log r, mean m and variance m + m^2/r. As r grows it is Poisson's.
    """

    params_per_element = 2
    takes_integers = True

    def log_density(self, x, log_mean, log_r):
        """log of Gamma(x + r) / Gamma(r), plus x log(m / (m + r)), minus r log(1 + m/r), minus log x!. For a large r x
        log r goes from the second term to the first, so that none grows with r."""
        count, logit = x.clamp_min(0.0), log_mean - log_r
        growth = -F.logsigmoid(-logit)  # log(1 + m/r)
        large = log_r > math.log(STIRLING_FROM)
        few = logit < 0.0  # m < r
        shared = torch.where(few, torch.exp(torch.where(few, log_mean, 0.0)) * log1p_ratio(
            torch.exp(torch.where(few, logit, 0.0))), torch.exp(torch.where(few, 0.0, log_r)) * growth)
        each = torch.where(large, log_mean - growth, F.logsigmoid(logit))
        return _counts(x, _log_rising(count, log_r, large) + count * each - shared - torch.lgamma(count + 1.0))

    def mean_of(self, log_mean, log_r):
        return torch.exp(log_mean)

    def draw(self, generator, log_mean, log_r):
        log_r = log_r.clamp_max(30.0)  # from where on the law is Poisson's to any precision
        gamma = torch._standard_gamma(torch.exp(log_r), generator=generator)
        return torch.poisson(gamma * torch.exp(log_mean - log_r), generator=generator)


def _log_rising(count, log_r, large):
    """log of Gamma(x + r) / Gamma(r) for counts x; for a ``large`` r less x log r, by Stirling's series, whose large
    terms cancel in closed form: it goes to 0 as r grows."""
    near = torch.where(large, 0.0, log_r)
    r = torch.exp(near)
    exact = torch.lgamma(count.clamp_min(1.0) + r) - torch.lgamma(1.0 + r) + near
    exact = torch.where(count > 0.0, exact, 0.0)
    inverse = torch.exp(-torch.where(large, log_r, math.log(STIRLING_FROM)))
    t = count * inverse  # x / r
    growth = torch.log1p(t)
    series = count * (growth + log1p_ratio(t) - 1.0) - 0.5 * growth
    return torch.where(large, series + stirling_tail(inverse / (1.0 + t)) - stirling_tail(inverse), exact)


def _counts(x, value):
    """-inf where x is not a count; NaN compares with nothing and stays."""
    return torch.where((x < 0.0) | (x > torch.floor(x)) | (x == math.inf), -math.inf, value)
