"""The unordered set estimator: samples without replacement, each weighed by the chance of its set."""

import math

import torch

from fastflow.estimators.base import Estimate, Estimator, evaluate, nothing, with_score
from fastflow.estimators.latents import uniform

__all__ = ["UnorderedSet"]


class UnorderedSet(Estimator):
    """n_samples different states, drawn without replacement from the joint q by stochastic beam search; state s weighs
    q(s) P(set | s first) / P(set), its baseline the same estimate with s known. Unbiased; with n_samples at or above
    the number of states the estimate is exact. The value is a weighted sum of ``values``, not their mean.

    References:
        Kool et al., "Estimating gradients for discrete random variables by sampling without replacement", 2020,
        arXiv:2002.06043; "Stochastic beams and where to find them", 2019, arXiv:1903.06059.
    """

    independent_rows = True

    def estimate(self, q, f, n_samples, generator):
        index = _without_replacement(q.table().detach().double(), n_samples, generator)
        return self.at(q, f, q.from_index(index.reshape(*index.shape[:2], *q.sites)))

    def at(self, q, f, samples):
        """The estimate from given different samples (K, B, *event), the set of one draw for each example."""
        values, log_q = evaluate(f, samples), q.log_prob(samples)
        # There are so few states that some of probability zero are in the set: they count nothing, whatever f is there.
        never = log_q == -math.inf
        counted, log_q = torch.where(never, 0.0, values), torch.where(never, 0.0, log_q)
        log_weights, log_inner = _log_weights(torch.where(never, -math.inf, log_q).detach().double())
        weights, signal = log_weights.exp().to(values.dtype), counted.detach()
        if len(values) > 1:
            signal = signal - (log_inner.exp().to(values.dtype) * signal).sum(1)
        score = (weights * signal * log_q).sum(0)
        return Estimate(with_score((weights * counted).sum(0), score), samples, values, nothing(values))


def _without_replacement(table, k, generator):
    """(k', B, sites) class indices of the k' = min(k, states) largest Gumbel-perturbed states of the factorised
    log-probabilities (B, sites, C)."""
    batch, sites, classes = table.shape
    log_q = table.new_zeros(batch, 1)
    gumbel = table.new_zeros(batch, 1)  # the maximum's own value has no bearing on the order
    index = torch.zeros(batch, 1, 0, dtype=torch.long, device=table.device)
    for site in range(sites):
        child = log_q[..., None] + table[:, None, site]
        perturbed = child - torch.log(-torch.log(uniform(child.shape, child, generator)))
        # Given that the largest of the children is their parent's value.
        gap = perturbed - perturbed.amax(-1, keepdim=True)
        shift = gumbel[..., None] - perturbed + torch.log(-torch.expm1(gap))
        perturbed = gumbel[..., None] - shift.clamp(min=0) - torch.log1p(torch.exp(-shift.abs()))
        perturbed = torch.where(child == -math.inf, child, perturbed)
        gumbel, chosen = perturbed.flatten(1).topk(min(k, perturbed.shape[1] * classes), 1)
        log_q = child.flatten(1).gather(1, chosen)
        parent = (chosen // classes)[..., None].expand(-1, -1, site)
        index = torch.cat([index.gather(1, parent), (chosen % classes)[..., None]], 2)
    return index.transpose(0, 1)


def _log_weights(log_q):
    """Of log-probabilities (K, B) of a set: (K, B) log of q(s) P(set | s first) / P(set), and (K, K, B) at [s, t] log
    of q(t) P(set | s, t first) / P(set | s first), on the diagonal log q(s)."""
    k = len(log_q)
    log_rest = torch.log((1.0 - log_q.exp().sum(0)).clamp(min=1e-300))
    # P(set) is the integral of exp(-t) times the product of 1 - exp(-t q(s)/rest): positive throughout, and by the
    # trapezoidal rule in log t accurate to rounding. The integrand's peak lies at t <= K + 1 and is, in log t, no
    # narrower than about 1/sqrt(K + 1).
    step = min(0.25, 0.7 / math.sqrt(k + 1))
    end = math.log(k + 1 + 9.0 * math.sqrt(k + 1) + 40.0)
    log_t = torch.arange(-40.0, end + step, step, dtype=log_q.dtype, device=log_q.device)[:, None, None]
    log_x = log_t + log_q - log_rest
    x = log_x.exp()
    factors = torch.where(x > 1e-8, torch.log(-torch.expm1(-x)), log_x - 0.5 * x)  # (T, K, B)
    factors = torch.where(log_q == -math.inf, 0.0, factors)
    whole = log_t[:, 0] - log_t[:, 0].exp() + factors.sum(1)
    one_less = whole[:, None] - factors
    without = torch.logsumexp(one_less, 0)
    log_weights = log_q + without - torch.logsumexp(whole, 0)
    # Row by row: all pairs at once would take K times the memory of the factors.
    pairs = torch.stack([torch.logsumexp(row[:, None] - factors, 0) for row in one_less.unbind(1)])
    diagonal = torch.eye(k, dtype=torch.bool, device=log_q.device)[..., None]
    return log_weights, log_q[None] + torch.where(diagonal, 0.0, pairs - without[:, None])
