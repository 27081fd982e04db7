"""Data that a model makes, as training data: augmentation, and what happens when models train on their own samples."""

import math
from typing import NamedTuple

import torch

from fastflow import checks

__all__ = ["Chain", "GaussianChain", "augment", "self_consuming_chain"]


def augment(model, x, ratio, *, context=None, temperature=1.0, generator=None):
    """A data set of which the share ``ratio`` is synthetic: all of x, then samples of the model.

    Args:
        model: anything with ``sample(n, generator=, temperature=)`` to (n, *event), as VAEs and flows have.
        x: (N, *event).
        ratio: share of the result that is synthetic, 0 to below 1.
        context: (M, ...) labels of the synthetic examples, for a conditional model with M contexts; the number of
            synthetic examples must be M.
        temperature, generator: as for the model's sample.

    Raises:
        ValueError: x is of integers, and the samples are not, or are none that its dtype holds.

    Returns:
        (data (N + M, *event), synthetic (N + M,) bool) with M = round(N * ratio / (1 - ratio)).
    """
    checks.tensor("x", x, floating=False)
    if not 0.0 <= ratio < 1.0:
        raise ValueError(f"ratio: expected a number from 0 to below 1, got {ratio!r}")
    n = round(len(x) * ratio / (1.0 - ratio))
    if context is not None and len(context) != n:
        raise ValueError(f"context: expected {n} contexts, one for each synthetic example, got {len(context)}")
    synthetic = torch.zeros(len(x) + n, dtype=torch.bool, device=x.device)
    synthetic[len(x):] = True
    if n == 0:
        return x, synthetic
    if context is None:
        made = model.sample(n, generator=generator, temperature=temperature)
    else:
        made = model.sample(1, context, generator=generator, temperature=temperature)[0]
    checks.shape("model.sample's result", made, (n, *x.shape[1:]))
    return torch.cat([x, _like(made, x)]), synthetic


def _like(made, x):
    """Samples in x's dtype."""
    taken = made.to(x)
    if not x.is_floating_point() and not torch.equal(taken.to(made), made):
        raise ValueError(f"model.sample's result: expected whole numbers within {x.dtype} like x, got "
                         f"{made.dtype} from {made.min().item():g} to {made.max().item():g}")
    return taken


class Chain(NamedTuple):
    """What self_consuming_chain returns.

    Attributes:
        models: the model of each generation, generations + 1 of them.
        figures: what ``measure`` said of each.
    """

    models: list
    figures: list


def self_consuming_chain(fit, sample, fresh, n, generations, *, fresh_fraction=0.0, measure=None):
    """Generation 0 is fitted to n real examples; each next one to n, of which a share is real and new and the rest
    come from the model before.

    Args:
        fit: function from data (n, *event) to a model.
        sample: function (model, m) to (m, *event).
        fresh: function from m to (m, *event) new real examples.
        n: examples for each generation.
        generations: how many follow the first.
        fresh_fraction: share of each later generation's examples that is real, 0 to 1, rounded to whole examples.
        measure: function from a model to a figure that is kept; None for the model itself.

    References:
        Alemohammad et al., "Self-consuming generative models go MAD", 2023, arXiv:2307.01850.
    """
    n_fresh = _n_fresh(n, fresh_fraction)
    generations = checks.count("generations", generations)
    models = [fit(fresh(n))]
    for _ in range(generations):
        parts = [fresh(n_fresh)] if n_fresh else []
        if n_fresh < n:
            parts.append(sample(models[-1], n - n_fresh))
        models.append(fit(torch.cat(parts)))
    return Chain(models, [model if measure is None else measure(model) for model in models])


class GaussianChain:
    """The chain of Gaussians fitted by maximum likelihood, in one dimension, with its moments in closed form.

    A generation draws n examples, the share a from the truth N(m, s^2) and the rest from N(mean, temperature^2 v) of
    the generation before. With S = a s^2 + (1 - a) temperature^2 v the expectations go

        E v'          = (1 - 1/n) S + a (1 - a) E (mean - m)^2
        E (mean'-m)^2 = S / n + (1 - a)^2 E (mean - m)^2

    which is linear, so that one matrix says whether the chain settles. Without fresh data at temperature 1 the variance
    decays by (n - 1)/n a generation and the mean walks randomly; at temperatures above sqrt(n/(n-1)) it explodes.

    Args:
        n: examples for each generation, at least 2.
        fresh_fraction: share of real examples, 0 to 1, rounded to whole examples.
        temperature: factor on the standard deviation of the model's samples, not negative.
        variance: s^2, positive.

    References:
        Shumailov et al., "AI models collapse when trained on recursively generated data", Nature 631, 2024.
        Bertrand et al., "On the stability of iterative retraining of generative models on their own data", 2024,
        arXiv:2310.00429.
    """

    def __init__(self, n, *, fresh_fraction=0.0, temperature=1.0, variance=1.0):
        self.n_fresh = _n_fresh(n, fresh_fraction)
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
        if not 0.0 < variance < math.inf:
            raise ValueError(f"variance: expected a finite positive number, got {variance!r}")
        self.n, self.temperature, self.variance = n, temperature, variance
        a, kept = self.n_fresh / n, 1.0 - 1.0 / n
        t2 = (1.0 - a) * temperature * temperature
        self._matrix = torch.tensor([[kept * t2, a * (1.0 - a)], [t2 / n, (1.0 - a) ** 2]], dtype=torch.float64)
        self._constant = a * variance * torch.tensor([kept, 1.0 / n], dtype=torch.float64)

    @property
    def decay(self):
        """Factor on the variance from one generation to the next, the fresh data's contribution left out."""
        return self._matrix[0, 0].item()

    @property
    def rate(self):
        """Largest modulus of the recursion's eigenvalues: 1 or more, and the chain does not settle."""
        return torch.linalg.eigvals(self._matrix).abs().max().item()

    @property
    def settles(self):
        """Whether variance and mean tend to a limit whose variance is not 0."""
        return self.n_fresh > 0 and self.rate < 1.0

    def expected(self, generations):
        """(generations + 1, 2) float64: E v and E (mean - m)^2 of each, the first fitted to real data alone."""
        state = self.variance * torch.tensor([1.0 - 1.0 / self.n, 1.0 / self.n], dtype=torch.float64)
        states = [state]
        for _ in range(checks.count("generations", generations)):
            state = self._matrix @ state + self._constant
            states.append(state)
        return torch.stack(states)

    def limit(self):
        """(E v, E (mean - m)^2) in the limit, floats; (inf, inf) where it explodes; 0 and how far
        the mean has walked by then where it dies out."""
        if self.settles:
            eye = torch.eye(2, dtype=torch.float64)
            return tuple(torch.linalg.solve(eye - self._matrix, self._constant).tolist())
        if self.n_fresh == 0 and self.decay < 1.0:
            # The mean's walk ends as the variance does: sum of the steps S / n.
            start = self.expected(0)[0]
            walked = start[1] + self._matrix[1, 0] * start[0] / (1.0 - self.decay)
            return 0.0, walked.item()
        return math.inf, math.inf

    def log_drift(self, unbiased=False):
        """E log v' - log v without fresh data, nats a generation: the typical rate, below log(decay) because v's law
        is skewed. ``unbiased``: with the variance's estimate divided by n - 1 instead of n."""
        if self.n_fresh or self.temperature == 0.0:
            raise ValueError("log_drift: expected a chain without fresh data, at a temperature above 0")
        half = torch.tensor(0.5 * (self.n - 1), dtype=torch.float64)
        divisor = self.n - 1 if unbiased else self.n
        return (torch.digamma(half) - math.log(0.5 * divisor)).item() + 2.0 * math.log(self.temperature)

    @classmethod
    def least_fresh_fraction(cls, n, tolerance=0.05, **options):
        """The smallest share of fresh data whose limit's variance is within ``tolerance`` (relative) of the truth's
        (1 - 1/n) s^2, in steps of 1/n; other options as for the class."""
        if not tolerance > 0:
            raise ValueError(f"tolerance: expected a positive number, got {tolerance!r}")
        for count in range(1, n + 1):
            chain = cls(n, fresh_fraction=count / n, **options)
            aim = (1.0 - 1.0 / n) * chain.variance
            if chain.settles and abs(chain.limit()[0] - aim) <= tolerance * aim:
                return count / n
        return 1.0


def _n_fresh(n, fraction):
    n = checks.count("n", n, 2)
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fresh_fraction: expected a number from 0 to 1, got {fraction!r}")
    return round(fraction * n)
