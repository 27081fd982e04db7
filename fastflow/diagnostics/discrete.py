"""What discrete latents carry: bits, classes and codes."""

import math
from typing import NamedTuple

import torch

from fastflow import checks
from fastflow.diagnostics.latents import CHUNK, draw_error, information_terms

__all__ = ["CodeUsage", "active_sites", "code_information", "code_usage", "discrete_information"]


class CodeUsage(NamedTuple):
    """How a quantised model uses its codebook over a data set.

    Attributes:
        counts: (n_codes,) int64, how often each code occurs, at all positions together.
        used: how many occur at all.
        perplexity: exp of the entropy of their shares: n_codes if all are equally frequent, 1 if only one occurs.
    """

    counts: torch.Tensor
    used: int
    perplexity: float


def code_usage(codes, n_codes):
    """CodeUsage of codes, an int64 tensor of any shape with values from 0 to n_codes - 1.

    References:
        van den Oord et al., "Neural discrete representation learning", 2017, arXiv:1711.00937.
    """
    if not isinstance(codes, torch.Tensor) or codes.dtype != torch.int64:
        raise TypeError("codes: expected an int64 tensor")
    if not codes.numel() or codes.min() < 0 or codes.max() >= n_codes:
        raise ValueError(f"codes: expected at least one, all from 0 to {n_codes - 1}")
    counts = torch.bincount(codes.flatten(), minlength=n_codes)
    shares = counts.double() / counts.sum()
    return CodeUsage(counts, int((counts > 0).sum()), torch.exp(-torch.special.xlogy(shares, shares).sum()).item())


def active_sites(q, threshold=0.01):
    """(sites,) bool of an estimators.Bernoulli or Categorical with N >= 2 rows: whether the variance over the rows of
    the probabilities, summed over the classes but the first, exceeds ``threshold``. For bits it is the criterion of
    :func:`active_units`, at most N / (4 (N - 1))."""
    probs = q.table().exp()
    if len(probs) < 2:
        raise ValueError(f"q: expected at least 2 rows, got {len(probs)}")
    return probs[:, :, 1:].var(0, correction=1).sum(1) > threshold


@torch.no_grad()
def discrete_information(q, p, *, n_samples=1, generator=None):
    """InformationTerms of posteriors q of N examples against the prior p of one row, both estimators.Bernoulli or
    Categorical: the aggregate posterior 1/N sum_n q(z | x_n) is exact, the expectation over z is sampled.

    Args:
        n_samples: draws of z for each example; from 2 on the errors are no longer upper bounds.
        generator: torch.Generator or None.
    """
    z = q.sample(checks.count("n_samples", n_samples, 1), generator=generator)
    own, target = q.log_prob(z).double(), p.log_prob(z).double()
    table = q.table().double().flatten(1).clamp_min(-1e300)  # for 0 times the -inf of a class that a row never has
    picked = q.one_hot(z.flatten(0, 1)).double().flatten(1)
    rows = max(1, CHUNK // max(1, len(table)))
    marginal = torch.cat([torch.logsumexp(part @ table.mT, 1) for part in picked.split(rows)])
    marginal = marginal.unflatten(0, own.shape) - math.log(len(table))
    return information_terms(own - marginal, marginal - target, draw_error)


@torch.no_grad()
def code_information(codes, log_pz):
    """InformationTerms of codes (N, *S) that the encoder is certain of, with log p(codes) (N,) nats. The aggregate
    posterior is their empirical distribution, so that the mutual information is its entropy; nothing is drawn, and the
    errors are 0."""
    checks.tensor("log_pz", log_pz)
    _, group, counts = torch.unique(codes, dim=0, return_inverse=True, return_counts=True)
    marginal = torch.log(counts[group].double() / len(codes))
    return information_terms(-marginal[None], (marginal - log_pz.double())[None], lambda values: values.new_zeros(()))
