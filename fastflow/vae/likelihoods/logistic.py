"""Likelihoods of integer levels, as pixels are: the discretised logistic law and mixtures of it."""

import math

import torch
import torch.nn.functional as F

from fastflow import checks
from fastflow.draws import drawn
from fastflow.vae.likelihoods.base import Likelihood, operands, promoted, sum_event

__all__ = ["DiscretizedLogisticLikelihood", "LogisticMixtureLikelihood"]

LEAST_LOG_SCALE = -7.0


def _bounded(raw):
    """A log-scale above -7, smoothly."""
    return LEAST_LOG_SCALE + F.softplus(raw - LEAST_LOG_SCALE)


def _log_mass(x, mean, log_scale, n_bins):
    """log of the logistic law's mass on the bin of level x in 0..n_bins-1; the outermost bins are open outwards.

    Levels lie at 2 x / (n_bins - 1) - 1. The difference of sigmoids is computed as
    s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), which does not cancel.
    """
    inverse, half = torch.exp(-log_scale), 1.0 / (n_bins - 1)
    centred = (2.0 * half * x - 1.0 - mean) * inverse
    upper, lower = centred + half * inverse, centred - half * inverse
    first, last = x == 0, x == n_bins - 1
    above = torch.where(last, 0.0, F.logsigmoid(torch.where(last, 0.0, upper)))
    below = torch.where(first, 0.0, F.logsigmoid(torch.where(first, 0.0, -lower)))
    width = torch.where(first | last, 0.0, _log_one_minus_exp(math.log(2.0 * half) - log_scale))
    outside = (x < 0) | (x > n_bins - 1) | (x > torch.floor(x))  # NaN is none of these and stays
    return torch.where(outside, -math.inf, above + below + width)


def _log_one_minus_exp(log_v):
    """log(1 - exp(-v)) of log v, also where v underflows."""
    near = log_v < math.log(1e-3)
    v = torch.exp(log_v)
    return torch.where(near, log_v - 0.5 * v + v * v / 24.0, torch.log(-torch.expm1(-torch.where(near, 1.0, v))))


def _level(position, n_bins):
    """The level whose bin holds the position."""
    return torch.round((position + 1.0) * 0.5 * (n_bins - 1)).clamp(0, n_bins - 1)


def _logistic(like, generator):
    tiny = torch.finfo(like.dtype).tiny
    u = drawn(torch.rand, like.shape, like, generator).clamp_min(tiny)
    return torch.log(u) - torch.log1p(-u)


class DiscretizedLogisticLikelihood(Likelihood):
    """Independent levels 0..n_bins-1, each with the mass that a logistic law has on its bin.

    x holds integers in any dtype. The output has twice x's channels: the mean, in units where the levels span -1..1,
    and r, log scale = softplus(r + 7) - 7. ``mean`` is the logistic law's own, clipped to the levels.

    References:
        Kingma et al., "Improving variational inference with inverse autoregressive flow", 2016, arXiv:1606.04934.
    """

    params_per_element = 2
    takes_integers = True

    def __init__(self, n_bins=256):
        super().__init__()
        self.n_bins = checks.count("n_bins", n_bins, 2)

    def log_density(self, x, mean, raw):
        return _log_mass(x, mean, _bounded(raw), self.n_bins)

    def mean_of(self, mean, raw):
        return ((mean + 1.0) * 0.5 * (self.n_bins - 1)).clamp(0, self.n_bins - 1)

    def draw(self, generator, mean, raw):
        return _level(mean + torch.exp(_bounded(raw)) * _logistic(mean, generator), self.n_bins)


class LogisticMixtureLikelihood(Likelihood):
    """A mixture of discretised logistics for each pixel, whose channels depend on those before them.

    Channel c of component m has mean m_mc + sum over j < c of tanh(k_mcj) times channel j in units of -1..1. x is
    (B, C, *S) of levels 0..n_bins-1; the output has M (1 + 2 C + C (C - 1)/2) channels: component by component its
    logit, C means, C raw log-scales, and the coefficients k for (c, j) = (1,0), (2,0), (2,1), ...

    Args:
        channels: C.
        n_components: M.
        n_bins: number of levels.

    References:
        Salimans et al., "PixelCNN++", 2017, arXiv:1701.05517.
    """

    takes_integers = True

    def __init__(self, channels, n_components=10, n_bins=256):
        super().__init__()
        for name, value in (("channels", channels), ("n_components", n_components)):
            checks.count(name, value, 1)
        self.channels, self.n_components = channels, n_components
        self.n_bins = checks.count("n_bins", n_bins, 2)
        self.params_per_component = 1 + 2 * channels + channels * (channels - 1) // 2

    def output_shape(self, event_shape):
        channels, *spatial = event_shape
        if channels != self.channels:
            raise ValueError(f"x: expected {self.channels} channels, got {channels}")
        return (self.n_components * self.params_per_component, *spatial)

    def log_prob(self, x, output):
        x, output = operands(x, output, True)
        expected = (x.shape[0], *self.output_shape(x.shape[1:]))
        if output.shape[-x.dim():] != expected:
            raise ValueError(f"output: expected shape (*, {', '.join(map(str, expected))}), got {tuple(output.shape)}")
        dim = 1 - x.dim()
        logits, means, raws, coefficients = self._split(output, dim)
        scaled = 2.0 * x / (self.n_bins - 1) - 1.0
        log_mass = 0.0  # components take the place of the channels
        for c, (mean, raw) in enumerate(zip(means, raws, strict=True)):
            mean = mean + sum(k * scaled.narrow(dim, j, 1) for j, k in enumerate(coefficients[c]))
            log_mass = log_mass + _log_mass(x.narrow(dim, c, 1), mean, _bounded(raw), self.n_bins)
        value = torch.logsumexp(torch.log_softmax(logits, dim) + log_mass, dim)
        return sum_event(value, x.dim() - 2)

    def mean(self, output):
        """(N, C, *S), the mean of the mixture before it is made discrete, clipped to the levels."""
        logits, means, _, coefficients = self._split(promoted(output, "output"), 1)
        weights, found = torch.softmax(logits, 1), []
        for c, mean in enumerate(means):
            found.append(mean + sum(k * value for k, value in zip(coefficients[c], found, strict=True)))
        positions = torch.stack([(weights * mean).sum(1) for mean in found], 1)
        return ((positions + 1.0) * 0.5 * (self.n_bins - 1)).clamp(0, self.n_bins - 1)

    def sample(self, output, *, generator=None):
        """(N, C, *S) levels, channel after channel of a component drawn for each pixel."""
        checks.rng(generator)
        logits, means, raws, coefficients = self._split(promoted(output, "output"), 1)
        u = drawn(torch.rand, logits.shape, logits, generator).clamp_min(torch.finfo(logits.dtype).tiny)
        gumbel = -torch.log(-torch.log(u))
        chosen = (logits + gumbel).argmax(1, keepdim=True)
        levels = []
        for c, (mean, raw) in enumerate(zip(means, raws, strict=True)):
            mean, log_scale = mean.gather(1, chosen)[:, 0], _bounded(raw.gather(1, chosen)[:, 0])
            for k, level in zip(coefficients[c], levels, strict=True):
                mean = mean + k.gather(1, chosen)[:, 0] * (2.0 * level / (self.n_bins - 1) - 1.0)
            levels.append(_level(mean + torch.exp(log_scale) * _logistic(mean, generator), self.n_bins))
        return torch.stack(levels, 1)

    def _split(self, output, dim):
        """Logits, means and raw scales for each channel, coefficients [c][j], each with M at ``dim``."""
        size = output.shape[dim]
        if size != self.n_components * self.params_per_component:
            raise ValueError(f"output: expected {self.n_components * self.params_per_component} channels, got {size}")
        dim = dim % output.dim()
        values = output.unflatten(dim, (self.n_components, self.params_per_component)).unbind(dim + 1)
        c = self.channels
        rest = [torch.tanh(k) for k in values[1 + 2 * c:]]
        coefficients = [rest[i * (i - 1) // 2:i * (i + 1) // 2] for i in range(c)]
        return values[0], values[1:1 + c], values[1 + c:1 + 2 * c], coefficients
