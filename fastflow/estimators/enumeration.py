"""The objective itself, by a sum over every state."""

import math

import torch

from fastflow import checks
from fastflow.estimators.base import Estimate, Estimator, evaluate, nothing
from fastflow.estimators.latents import MAX_STATES, Discrete, tuples

__all__ = ["Enumeration", "exact"]


def exact(q, f, *, objective="mean", n_samples=1):
    """(B,): E f(b), or for objective="iwae" E log(mean of exp f(b_k)) over n_samples independent b_k, differentiable.

    f is evaluated once at each of the S states; the sum is over S, or S**n_samples, terms.

    Raises:
        TypeError: q is no Bernoulli or Categorical.
        ValueError: more than 65536 terms, or n_samples below 1.
    """
    if not isinstance(q, Discrete):
        raise TypeError(f"q: expected a Bernoulli or Categorical, got {type(q).__name__}")
    checks.choice("objective", objective, ("mean", "iwae"))
    n_samples = checks.count("n_samples", n_samples, 1)
    return _sum(q, f, objective, n_samples)[0]


def _sum(q, f, objective, n_samples):
    states = q.states()
    states = states[:, None].expand(-1, q.logits.shape[0], *states.shape[1:])
    values, log_q = evaluate(f, states), q.log_prob(states)
    weights = log_q.exp()
    counted = torch.where(weights == 0, 0.0, values)  # one of probability zero counts nothing, even where f is infinite
    if objective == "mean":
        return (weights * counted).sum(0), states, values
    if len(states) ** n_samples > MAX_STATES:
        raise ValueError(f"n_samples: expected at most {MAX_STATES} tuples to enumerate, got "
                         f"{len(states)}**{n_samples}")
    drawn = tuples(len(states), n_samples, values.device)
    bounds = torch.logsumexp(counted[drawn], 1) - math.log(n_samples)
    return (log_q[drawn].sum(1).exp() * bounds).sum(0), states, values


class Enumeration(Estimator):
    """E f(b) exactly, from f at every state; n_samples and generator are ignored. Its variance is zero."""

    independent_rows = True

    def estimate(self, q, f, n_samples, generator):
        value, states, values = _sum(q, f, "mean", 1)
        return Estimate(value, states, values, nothing(value))
