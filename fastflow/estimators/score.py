"""Score-function estimators: the gradient of log q(b), weighed by f(b) less a baseline that b does not move."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.estimators.base import Estimate, Estimator, called, evaluate, nothing, with_score

__all__ = ["NVIL", "REINFORCE", "RLOO", "VIMCO", "MovingAverage", "NeuralBaseline", "baseline_network"]


class REINFORCE(Estimator):
    """f(b) grad log q(b), without a baseline: unbiased, and of high variance.

    References:
        Williams, "Simple statistical gradient-following algorithms", 1992.
    """

    independent_rows = True

    def estimate(self, q, f, n_samples, generator):
        return self.at(q, f, q.sample(n_samples, generator=generator))

    def at(self, q, f, samples):
        """The estimate from given samples (K, B, *event), as if they had been drawn from q."""
        values = evaluate(f, samples)
        signal, auxiliary = self.signal(q, values.detach())
        value = values.mean(0)
        score = (signal * q.log_prob(samples)).mean(0)
        return Estimate(with_score(value, score), samples, values, auxiliary)

    def signal(self, q, values):
        """(K, B) what weighs each sample's score, and the auxiliary loss."""
        return values, nothing(values)


class RLOO(REINFORCE):
    """The baseline of a sample is the mean of f over the others (leave one out): unbiased, n_samples at least 2.

    References:
        Kool et al., "Buy 4 REINFORCE samples, get a baseline for free!", 2019.
    """

    least_samples = 2
    independent_rows = True

    def signal(self, q, values):
        k = len(values)
        return (values - values.mean(0)) * (k / (k - 1)), nothing(values)


class MovingAverage(REINFORCE):
    """The baseline is an exponential moving average of f over earlier calls, 0 at first. The samples it is used on have
    no part in it, which is what keeps the estimate unbiased.

    Args:
        decay: of the average, in [0, 1).
    """

    def __init__(self, decay=0.9):
        super().__init__()
        _check_decay(decay)
        self.decay = decay
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("weight", torch.zeros(()))

    def signal(self, q, values):
        # Divided by the weight gathered so far, it is not drawn towards zero.
        average, weight = _until_now(self.average), _until_now(self.weight)
        signal = values - average / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        if self.training and values.numel():
            mean = values.mean().to(self.average)
            _follow(self.weight, torch.where(mean.isfinite(), 1.0, self.weight), self.decay)
            _follow(self.average, mean, self.decay)
        return signal, nothing(values)


class NeuralBaseline(REINFORCE):
    """The baseline is a network of q's logits, fitted to f by least squares: unbiased, each example has its own.

    Args:
        network: module from logits (B, *event), detached, to (B,); see :func:`baseline_network`.
    """

    independent_rows = True

    def __init__(self, network):
        super().__init__()
        self.network = network

    def signal(self, q, values):
        with torch.enable_grad():
            baseline = called(self.network, q.logits.detach(), values.shape[1])
            auxiliary = ((values - baseline) ** 2).mean()
        return values - baseline.detach(), auxiliary


class NVIL(NeuralBaseline):
    """A neural baseline, then a moving average of what is left, then division by its moving standard deviation where
    that is above 1. The division changes the gradient's length, not its direction: ``normalise=False`` is unbiased.
    What depends on q's logits beside the samples is not divided, the closed KL of a DiscreteVAE among it, which so
    weighs the more.

    References:
        Mnih and Gregor, "Neural variational inference and learning in belief networks", 2014, arXiv:1402.0030.
    """

    def __init__(self, network, *, decay=0.8, normalise=True):
        super().__init__(network)
        _check_decay(decay)
        self.decay = decay
        self.normalise = normalise
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("variance", torch.zeros(()))

    def signal(self, q, values):
        centred, auxiliary = super().signal(q, values)
        signal = centred - _until_now(self.average)
        if self.normalise:
            signal = signal / _until_now(self.variance).sqrt().clamp(min=1.0)
        if self.training and values.numel():
            _follow(self.average, centred.mean(), self.decay)
            _follow(self.variance, centred.var(correction=0), self.decay)
        return signal, auxiliary


class VIMCO(REINFORCE):
    """The gradient of E log(mean of exp f(b_k)); f gives log-weights, log p(x, b) - log q(b). The baseline of a sample
    is the same objective with its f replaced by the mean of the others'. Unbiased, n_samples at least 2.

    References:
        Mnih and Rezende, "Variational inference for Monte Carlo objectives", 2016, arXiv:1602.06725.
    """

    objective = "iwae"
    least_samples = 2
    independent_rows = True

    def at(self, q, f, samples):
        values = evaluate(f, samples)
        k = len(values)
        bound = torch.logsumexp(values, 0) - math.log(k)
        fixed = values.detach()
        own = torch.eye(k, dtype=torch.bool, device=fixed.device)[..., None]
        # Not the sum less the own one, of which nothing would be left beside a huge or infinite one.
        others = torch.where(own, 0.0, fixed).sum(1) / (k - 1)
        replaced = torch.where(own, others, fixed[:, None])
        signal = bound.detach() - (torch.logsumexp(replaced, 0) - math.log(k))
        score = (signal * q.log_prob(samples)).sum(0)
        return Estimate(with_score(bound, score), samples, values, nothing(values))


def baseline_network(event_shape, hidden=(64,)):
    """A fully connected network from logits (B, *event_shape) to (B,)."""
    layers, width = [nn.Flatten() if event_shape else nn.Unflatten(0, (-1, 1))], math.prod(event_shape)
    for size in checks.counts("hidden", hidden, 1):
        layers += [nn.Linear(width, size), nn.SiLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Flatten(0))


@torch.library.custom_op("fastflow::until_now", mutates_args=())
def _copy(average: torch.Tensor) -> torch.Tensor:
    return average.clone()


_copy.register_fake(torch.empty_like)


def _until_now(average):
    """The average before this call moves it. In a compiled graph an operator of its own copies it: what backward needs
    of it would else be computed anew there, from a buffer that has moved by then."""
    return _copy(average) if torch.compiler.is_compiling() else average


def _follow(average, seen, decay):
    """Moves the average towards what was seen. A batch that is not finite, whose step a trainer leaves out, may not
    spoil it for good."""
    seen = seen.to(average)
    average.lerp_(torch.where(seen.isfinite(), seen, average), 1.0 - decay)


def _check_decay(decay):
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
