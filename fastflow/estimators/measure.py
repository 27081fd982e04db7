"""Bias and variance of an estimator's gradient, against enumeration."""

import copy
import math
from dataclasses import dataclass

import torch

from fastflow import checks
from fastflow.estimators.base import Estimator
from fastflow.estimators.enumeration import exact
from fastflow.estimators.latents import Discrete

__all__ = ["Measurement", "measure"]

CHUNK = 2**20  # elements of the samples of one call


@dataclass(frozen=True)
class Measurement:
    """A gradient estimate's moments over n_repeats calls; each tensor has the shape of what was differentiated.

    Attributes:
        exact: the gradient by enumeration.
        mean: of the estimates.
        bias: mean - exact.
        standard_error: of mean, hence of bias.
        variance: of one estimate, element by element.
        n_repeats: how many calls.
        parameters: one Measurement for each of ``parameters``.
    """

    exact: torch.Tensor
    mean: torch.Tensor
    bias: torch.Tensor
    standard_error: torch.Tensor
    variance: torch.Tensor
    n_repeats: int
    parameters: tuple = ()

    @property
    def largest_deviation(self):
        """The largest |bias| / standard_error of any element, parameters included; rounding alone counts as 0."""
        rounding = 1e3 * torch.finfo(self.exact.dtype).eps * (1.0 + self.exact.abs())
        excess = (self.bias.abs() - rounding).clamp(min=0)
        error = self.standard_error.clamp(min=torch.finfo(self.exact.dtype).tiny)
        # A tensor's maximum, because Python's loses NaN.
        found = [(excess / error).max().item(), *(p.largest_deviation for p in self.parameters)]
        return torch.tensor(found, dtype=torch.float64).max().item()

    def is_unbiased(self, standard_errors=4.0):
        """Whether no element is further from the exact gradient than so many standard errors."""
        return self.largest_deviation <= standard_errors


def measure(estimator, q, f, n_samples=1, n_repeats=1000, *, n_warmup=100, parameters=(), generator=None):
    """Calls the estimator n_repeats times and compares its gradient of sum over B of the objective with enumeration's.

    All repeats run as one batch where the estimator's class has ``independent_rows`` and f sees q's logits only through
    its samples; otherwise, and with ``parameters``, one after another. The estimator itself, its averages and
    parameters, stays as it is.

    Args:
        estimator, q, f, n_samples: as an estimator takes them.
        n_warmup: calls before those that count, of an estimator without ``independent_rows``, in which its averages
            settle.
        parameters: tensors that f depends on, whose gradients are to be measured too.
        generator: torch.Generator, None for torch's own.

    Raises:
        TypeError: the estimator is no Estimator, or q no Bernoulli or Categorical.
        ValueError: q or, for a K-sample objective, its tuples have more than 65536 states.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(f"estimator: expected an Estimator, got {type(estimator).__name__}")
    if not isinstance(q, Discrete):
        raise TypeError(f"q: expected a Bernoulli or Categorical, got {type(q).__name__}")
    n_repeats = checks.count("n_repeats", n_repeats, 2)
    n_warmup = checks.count("n_warmup", n_warmup)
    parameters = tuple(parameters)
    # Read from the class itself: a subclass may average over a call that its parent does not.
    independent = vars(type(estimator)).get("independent_rows", False)
    with torch.inference_mode(False), torch.enable_grad():
        estimator = copy.deepcopy(estimator).requires_grad_(False)
        if not q.logits.requires_grad:
            q = type(q)(q.logits.detach().clone().requires_grad_())  # a clone is no tensor of inference mode
        wanted = (q.logits, *parameters)
        objective = exact(q, f, objective=estimator.objective, n_samples=n_samples)
        truth = _gradients(objective.sum(), wanted)
        moments = None
        if independent and not parameters:
            moments = _batched(estimator, q, f, n_samples, n_repeats, generator)
        if moments is None:
            for _ in range(0 if independent else n_warmup):
                estimator(q, f, n_samples, generator=generator)
            moments = [_Moments(t) for t in wanted]
            for _ in range(n_repeats):
                value = estimator(q, f, n_samples, generator=generator).value
                for moment, gradient in zip(moments, _gradients(value.sum(), wanted), strict=True):
                    moment.add(gradient[None])
    found = [m.result(t) for m, t in zip(moments, truth, strict=True)]
    first = found[0]
    return Measurement(**{**vars(first), "parameters": tuple(found[1:])})


def _batched(estimator, q, f, n_samples, n_repeats, generator):
    """The logits' moments, or None if f reaches them past its samples."""
    batch = q.logits.shape[0]
    moments = _Moments(q.logits)
    size = max(1, min(n_repeats, CHUNK // max(1, q.logits.numel() * n_samples)))
    while moments.n < n_repeats:
        n = min(size, n_repeats - moments.n)
        repeated = type(q)(q.logits.detach().repeat(n, *[1] * (q.logits.dim() - 1)).requires_grad_())

        def together(samples, n=n):
            values = f(samples.unflatten(1, (n, batch)).flatten(0, 1))
            return values.unflatten(0, (len(samples), n)).flatten(1, 2)

        value = estimator(repeated, together, n_samples, generator=generator).value
        gradient, direct = torch.autograd.grad(value.sum(), (repeated.logits, q.logits), allow_unused=True)
        if direct is not None:
            return None
        moments.add(gradient.unflatten(0, (n, batch)))
    return [moments]


def _gradients(value, wanted):
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


class _Moments:
    """Mean and centred square sum of rows as they come."""

    def __init__(self, like):
        self.n, self.mean, self.square = 0, torch.zeros_like(like.detach()), torch.zeros_like(like.detach())

    def add(self, rows):
        n, mean = len(rows), rows.mean(0)
        shift = mean - self.mean
        self.square += ((rows - mean) ** 2).sum(0) + shift**2 * (self.n * n / (self.n + n))
        self.mean += shift * (n / (self.n + n))
        self.n += n

    def result(self, truth):
        variance = self.square / (self.n - 1)
        return Measurement(truth, self.mean, self.mean - truth, variance.sqrt() / math.sqrt(self.n), variance, self.n)
