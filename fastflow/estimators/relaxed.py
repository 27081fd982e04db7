"""Estimators that differentiate through a continuous stand-in for the sample: low variance, biased."""

import math

from fastflow.estimators.base import Estimate, Estimator, evaluate, nothing
from fastflow.one_number import one_number

__all__ = ["GumbelSoftmax", "StraightThrough"]


class GumbelSoftmax(Estimator):
    """f at relaxed samples (Gumbel-softmax; binary concrete for bits), differentiated as they are. The value is that of
    the relaxed problem, biased as the gradient is; both biases vanish with the temperature while the variance grows.

    Args:
        temperature: a positive number.
        hard: evaluate f at the hard sample, and let the gradient pass as if it were the relaxed one (straight-through
            Gumbel-softmax); the value is then unbiased, the gradient not.

    References:
        Jang et al., "Categorical reparameterization with Gumbel-softmax", 2017, arXiv:1611.01144; Maddison et al.,
        "The concrete distribution", 2017, arXiv:1611.00712.
    """

    independent_rows = True

    def __init__(self, temperature=0.5, *, hard=False):
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.hard = hard

    def estimate(self, q, f, n_samples, generator):
        z = q.perturb(q.noise(n_samples, generator))
        samples = q.relax(z, self.temperature)
        if self.hard:
            samples = q.harden(z).detach() + (samples - samples.detach())
        values = evaluate(f, samples)
        return Estimate(values.mean(0), samples.detach(), values, nothing(values))


class StraightThrough(Estimator):
    """f at hard samples; the gradient passes as if they were q's probabilities. The value is unbiased, the gradient
    only for f linear in each element given the others.

    References:
        Bengio et al., "Estimating or propagating gradients through stochastic neurons", 2013, arXiv:1308.3432.
    """

    independent_rows = True

    def estimate(self, q, f, n_samples, generator):
        samples = q.sample(n_samples, generator=generator)
        values = evaluate(f, samples + (q.probs - q.probs.detach()))
        return Estimate(values.mean(0), samples, values, nothing(values))


def check_temperature(temperature):
    if not (isinstance(temperature, (int, float)) and 0.0 < temperature < math.inf):
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")


def temperature_parameter(temperature):
    """log(temperature), to learn."""
    check_temperature(temperature)
    return one_number(math.log(temperature))
