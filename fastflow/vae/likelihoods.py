"""Likelihoods p(x | z) of a decoder's output. Each is a normalised density, with every constant.

A likelihood has log_prob(x, output) -> (*, B) summed over the event, where x is (B, *event) and output (*, B, *event);
mean(output); and sample(output, generator=None).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["BernoulliLikelihood", "GaussianLikelihood"]


def _sum_event(values, x):
    """Sum over the event dimensions of x (B, *event), which come last in ``values``."""
    lead = values.dim() - x.dim() + 1
    return values.flatten(lead).sum(lead) if values.dim() > lead else values


def _promoted(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class BernoulliLikelihood(nn.Module):
    """Independent bits; the decoder's output is their logits. Data between 0 and 1 are accepted, but only for bits is
    this a normalised likelihood."""

    def log_prob(self, x, output):
        output = _promoted(output)
        target = x.to(output.dtype).expand(output.shape)
        return -_sum_event(F.binary_cross_entropy_with_logits(output, target, reduction="none"), x)

    def mean(self, output):
        return torch.sigmoid(_promoted(output))

    def sample(self, output, *, generator=None):
        return torch.bernoulli(self.mean(output), generator=generator)


class GaussianLikelihood(nn.Module):
    """Independent Gaussians around the decoder's output with one standard deviation.

    Args:
        sigma: a positive number, fixed; None learns it, parameter ``log_sigma``, from 1.
    """

    def __init__(self, sigma=None):
        super().__init__()
        if sigma is not None and not 0.0 < sigma < math.inf:
            raise ValueError(f"sigma: expected a positive number or None, got {sigma!r}")
        # Fixed, it is a number: a buffer would be rounded by .to().
        self.log_sigma = nn.Parameter(torch.zeros(())) if sigma is None else math.log(sigma)

    def log_prob(self, x, output):
        output = _promoted(output)
        residual = (x.to(output.dtype) - output) * self._inverse_sigma()
        size = math.prod(x.shape[1:])
        return -0.5 * _sum_event(residual * residual, x) - size * (self.log_sigma + 0.5 * math.log(2.0 * math.pi))

    def mean(self, output):
        return _promoted(output)

    def sample(self, output, *, generator=None):
        mean = self.mean(output)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + noise / self._inverse_sigma()

    def _inverse_sigma(self):
        return math.exp(-self.log_sigma) if isinstance(self.log_sigma, float) else torch.exp(-self.log_sigma)
