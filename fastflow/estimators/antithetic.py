"""Estimators of pairs: b from uniform u and its antithetic twin from 1 - u. Categorical latents are first written as
sticks, independent bits of which the first that is 1 names the class."""

import math

import torch
import torch.nn.functional as F

from fastflow.estimators.base import Estimate, Estimator, evaluate, nothing, with_gradient
from fastflow.estimators.latents import Bernoulli

__all__ = ["ARM", "DisARM"]


class Antithetic(Estimator):
    """n_samples counts the pairs, so that f is evaluated 2 * n_samples times."""

    def estimate(self, q, f, n_samples, generator):
        return self.at(q, f, _bits(q).noise(n_samples, generator))

    def at(self, q, f, u):
        """The estimate from uniform u (K, B, *event), for a categorical q (K, B, *sites, C - 1)."""
        bits = _bits(q)
        with torch.no_grad():
            logit = torch.log(u) - torch.log1p(-u)
            pair = torch.stack([bits.harden(bits.logits + logit), bits.harden(bits.logits - logit)])
            samples = pair if bits is q else _first(pair)
        values = evaluate(f, samples.flatten(0, 1))
        difference = (values[: len(u)] - values[len(u):]).detach()
        weight = self.weight(bits.logits.detach(), u, *pair)
        if bits is not q:
            # No bit after both firsts has any part in f: its term is zero on average.
            weight = weight * _matters(samples)
        gradient = (difference.reshape(*difference.shape, *[1] * (weight.dim() - 2)) * weight).mean(0)
        value = with_gradient(values.mean(0), bits.logits, gradient)
        return Estimate(value, samples.flatten(0, 1), values, nothing(values))


class ARM(Antithetic):
    """(f(b) - f(b~)) (u - 1/2), unbiased.

    References:
        Yin and Zhou, "ARM: augment-REINFORCE-merge gradient for stochastic binary networks", 2019, arXiv:1807.11143.
    """

    independent_rows = True

    def weight(self, logits, u, b, twin):
        return u - 0.5


class DisARM(Antithetic):
    """ARM with u integrated out given the pair: (f(b) - f(b~)) (-1)^b~ [b != b~] sigmoid(|logit|) / 2. Unbiased, its
    variance is never above ARM's. For a categorical q it is DisARM-SB, in the order of the classes.

    References:
        Dong et al., "DisARM: an antithetic gradient estimator for binary latent variables", 2020, arXiv:2006.10680;
        Dong et al., "Coupled gradient estimators for discrete latent variables", 2021, arXiv:2106.08056.
    """

    independent_rows = True

    def weight(self, logits, u, b, twin):
        return 0.5 * (b - twin) * torch.sigmoid(logits.abs())


def _bits(q):
    """q itself, or the sticks of a categorical q: bit i is 1 with the probability of class i given that it is none of
    the earlier ones."""
    if isinstance(q, Bernoulli):
        return q
    logits = q.logits
    never = logits.detach().amax(-1, keepdim=True) - 1e3  # for -inf, that differences and gradients stay numbers
    logits = torch.where(logits == -math.inf, never, logits)
    later = torch.logcumsumexp(logits.flip(-1), -1).flip(-1)[..., 1:]
    return Bernoulli(logits[..., :-1] - later)


def _first(bits):
    """One-hots (..., C) of the first 1 among bits (..., C - 1), the last class if there is none."""
    bits = torch.cat([bits, bits.new_ones(*bits.shape[:-1], 1)], -1)
    return F.one_hot(bits.argmax(-1), bits.shape[-1]).to(bits.dtype)


def _matters(samples):
    """(K, B, *sites, C - 1) of a pair of one-hots (2, K, B, *sites, C): 1 up to the later of the two classes."""
    last = samples.argmax(-1).amax(0)
    return (torch.arange(samples.shape[-1] - 1, device=samples.device) <= last[..., None]).to(samples.dtype)
