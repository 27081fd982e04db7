"""Everything about a trained VAE in one object."""

import math
from dataclasses import dataclass

import torch

from fastflow import checks
from fastflow.diagnostics.latents import (
    InformationTerms,
    active_units,
    dimension_kl,
    information,
    marginal_kl,
    posterior_moments,
)
from fastflow.diagnostics.linear import LinearOptimum, data_eigenvalues, linear_optimum
from fastflow.diagnostics.rate_distortion import RateDistortion, Traversal, rate_distortion, traversal_grid
from fastflow.vae import GaussianLikelihood
from fastflow.vae.posteriors.gaussian import prior_moments

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """A VAE measured on N examples. What only diagonal Gaussian posteriors have is None for others.

    Attributes:
        n_examples, size: N, and the numbers in one example.
        point: RateDistortion.
        kl: (D,) mean KL of each latent to N(0, 1) or a GaussianPrior, nats.
        marginal_kl: (D,) KL(q(z_d) || N(0, 1)) of each latent's aggregate posterior; None for other priors.
        active: (D,) bool, Burda et al.'s active units.
        information: InformationTerms.
        traversal: Traversal; None for conditional models too.
        prediction: LinearOptimum of a linear model on these data, for Gaussian likelihoods with one sigma.
    """

    n_examples: int
    size: int
    point: RateDistortion
    kl: torch.Tensor | None = None
    marginal_kl: torch.Tensor | None = None
    active: torch.Tensor | None = None
    information: InformationTerms | None = None
    traversal: Traversal | None = None
    prediction: LinearOptimum | None = None

    @property
    def bits_per_dim(self):
        """-ELBO in bits for each number of an example."""
        return -self.point.elbo / (self.size * math.log(2.0))

    def summary(self):
        """A few lines of text."""
        point = self.point
        lines = [f"{self.n_examples} examples of {self.size} numbers",
                 f"ELBO {point.elbo:.4g} +- {point.elbo_error:.2g} nats ({self.bits_per_dim:.4g} bits/dim): "
                 f"rate {point.rate:.4g}, distortion {point.distortion:.4g}"]
        if self.kl is not None:
            active, total = int(self.active.sum()), len(self.kl)
            top = ", ".join(f"{i}: {self.kl[i].item():.3g}" for i in self.kl.argsort(descending=True)[:8].tolist())
            lines += [f"active units {active} of {total}" + (": posterior collapse" if active == 0 else ""),
                      f"largest KLs, latent: nats: {top}"]
        if self.information is not None:
            terms = self.information
            lines.append(f"rate = mutual information {terms.mutual_information.item():.4g} + aggregate KL "
                         f"{terms.aggregate_kl.item():.4g} (+- {terms.aggregate_kl_error.item():.2g}) nats; the "
                         f"first is at most log N = {math.log(self.n_examples):.4g}")
        if self.prediction is not None:
            lines.append(self.prediction.summary())
        return "\n".join(lines)


@torch.no_grad()
def diagnose(model, x, context=None, *, beta=1.0, n_samples=1, n_dims=10, max_examples=2000, batch_size=1024,
             generator=None):
    """Diagnosis of a model with ``elbo`` on data x (N, *event), as the model takes them; it runs in eval mode.

    Args:
        context: (N, ...) for a conditional model.
        beta: the KL weight that it was trained with, for the prediction of collapse.
        n_samples: draws of z for each example.
        n_dims: latents in the traversal.
        max_examples: only the first so many are used; the aggregate posterior takes time in their square.
        generator: of the draws of z, or None.
    """
    checks.tensor("x", x, floating=False)
    if len(x) < 2:
        raise ValueError(f"x: expected at least 2 examples, got {len(x)}")
    x = x[:max_examples]
    context = None if context is None else context[:max_examples]
    training = model.training
    model.eval()
    try:
        point = rate_distortion(model, x, context, n_samples=n_samples, batch_size=batch_size, beta=beta,
                                generator=generator)
        latents = {}
        if hasattr(getattr(model, "posterior", None), "moments"):
            latents = _latents(model, x, context, n_samples, n_dims, batch_size, generator)
        return Diagnosis(len(x), x[0].numel(), point, prediction=_prediction(model, x, beta, latents), **latents)
    finally:
        model.train(training)


def _latents(model, x, context, n_samples, n_dims, batch_size, generator):
    mean, log_sigma = posterior_moments(model, x, context, batch_size=batch_size)
    found = {"active": active_units(mean)}
    closed = not hasattr(model.prior, "given") and prior_moments(model.prior, mean) is not None
    found["kl"] = dimension_kl(mean, log_sigma, model.prior if closed else None).mean(0)
    if model.prior is None:
        found["marginal_kl"] = marginal_kl(mean, log_sigma)
    if context is None:
        shape = model.encode(x[:1]).shape[1:]
        log_prior = None if closed else lambda z: model._log_prior(z.view(1, -1, *shape))[0]
        found["information"] = information(mean, log_sigma, model.prior if closed else None, n_samples=n_samples,
                                           log_prior=log_prior, generator=generator)
        found["traversal"] = traversal_grid(model, x, n_dims)
    return found


def _prediction(model, x, beta, latents):
    likelihood = getattr(model, "likelihood", None)
    if not isinstance(likelihood, GaussianLikelihood) or likelihood.mode == "decoder":
        return None
    sigma = math.exp(float(likelihood._log_scale(None)))
    return linear_optimum(data_eigenvalues(x), sigma, beta, len(latents["kl"]) if latents else None)
