"""What a step minimises, in nats per example, and what an evaluation reports."""

import math

import torch

from fastflow.engine.distributed import unwrap
from fastflow.flows import bits_per_dim, dequantize
from fastflow.vae import BernoulliLikelihood

__all__ = ["NegativeELBO", "NegativeLogLikelihood", "objective_for"]


def objective_for(model, *, n_bins=256, n_samples=1, beta=1.0):
    """The objective that suits the model: the negative ELBO if it has ``elbo``, the negative log-likelihood if it has
    ``log_prob``; otherwise a TypeError."""
    inner = unwrap(model)
    if callable(getattr(inner, "elbo", None)):
        return NegativeELBO(n_bins, n_samples, beta)
    if callable(getattr(inner, "log_prob", None)):
        return NegativeLogLikelihood(n_bins)
    raise TypeError(f"model: expected a Flow (with log_prob) or a VAE (with elbo), got {type(inner).__name__}")


class Objective:
    """The mean over the batch of a negative log-likelihood or of a bound on it, in nats.

    For integer images the likelihood is that of the integers: uniform dequantisation bounds it from below, and the
    constant D*log(n_bins) that the change of units costs is counted.
    """

    def __init__(self, n_bins):
        if not isinstance(n_bins, int) or n_bins < 2:
            raise ValueError(f"n_bins: expected an integer of at least 2, got {n_bins!r}")
        self.n_bins = n_bins

    def prepare(self, model, x):
        """(x, constant in nats): integer images dequantised to x/n_bins - 0.5 + U/n_bins, or for the bits of a
        Bernoulli likelihood scaled to [0, 1]; floating x as it is, as are the integers of a flow that dequantises them
        itself."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_floating_point():
            return x, 0.0
        if x.dtype == torch.bool or x.is_complex():
            raise TypeError(f"x: expected a floating or integer dtype, got {x.dtype}")
        inner = unwrap(model)
        if getattr(inner, "dequantization", None) is not None:
            inner.check_bins(self.n_bins)
            return x, 0.0
        parameter = next(inner.parameters(), None)
        dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
        if isinstance(getattr(inner, "likelihood", None), BernoulliLikelihood):
            return x.to(dtype) / (self.n_bins - 1), 0.0
        return dequantize(x, self.n_bins, dtype=dtype), x[0].numel() * math.log(self.n_bins)


class NegativeLogLikelihood(Objective):
    """-log p(x), the loss of a flow."""

    name = "negative log-likelihood"

    def __call__(self, model, x, context=None):
        """(loss, parts): 0-d tensors; parts is empty."""
        x, constant = self.prepare(model, x)
        log_prob = model(x) if context is None else model(x, context)
        return constant - log_prob.mean(), {}

    def report(self, model, x):
        """{name: (B,) tensor} over a batch of integer images."""
        x, constant = self.prepare(model, x)
        if not x.is_floating_point():
            return {"bits_per_dim": (constant - model(x)) / (x[0].numel() * math.log(2.0))}
        return {"bits_per_dim": bits_per_dim(model(x), x[0].numel(), self.n_bins)}


class NegativeELBO(Objective):
    """distortion + beta*rate, the loss of a VAE."""

    name = "negative ELBO"

    def __init__(self, n_bins, n_samples=1, beta=1.0):
        super().__init__(n_bins)
        if not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples: expected a positive integer, got {n_samples!r}")
        if not (math.isfinite(beta) and beta >= 0):
            raise ValueError(f"beta: expected a finite number, not negative, got {beta!r}")
        self.n_samples, self.beta = n_samples, beta

    def __call__(self, model, x, context=None):
        """(loss, parts): 0-d tensors; parts holds the mean rate and distortion."""
        if context is not None:
            raise ValueError("context: a VAE takes none")
        x, constant = self.prepare(model, x)
        bound = model(x, n_samples=self.n_samples, beta=self.beta)
        rate, distortion = bound.rate.mean(), bound.distortion.mean() + constant
        return constant - bound.elbo.mean(), {"rate": rate.detach(), "distortion": distortion.detach()}

    def report(self, model, x):
        """{name: (B,) tensor} over a batch of integer images, the ELBO unweighted whatever beta training uses."""
        x, constant = self.prepare(model, x)
        bound = model(x, n_samples=self.n_samples, beta=1.0)
        elbo = bound.elbo - constant
        return {"elbo": elbo, "rate": bound.rate, "distortion": bound.distortion + constant,
                "bits_per_dim": -elbo / (x[0].numel() * math.log(2))}
