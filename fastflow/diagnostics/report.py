"""Everything about a trained VAE in one object."""

import math
from dataclasses import dataclass

import torch

from fastflow import checks
from fastflow.diagnostics.discrete import (
    CodeUsage,
    active_sites,
    code_information,
    code_usage,
    discrete_information,
)
from fastflow.diagnostics.kl import discrete_kl, kl_per_latent
from fastflow.diagnostics.latents import (
    InformationTerms,
    active_units,
    check_bound,
    has_moments,
    information,
    latents_and_kl,
    marginal_kl,
)
from fastflow.diagnostics.linear import LinearOptimum, data_eigenvalues, linear_optimum
from fastflow.diagnostics.mode import in_eval
from fastflow.diagnostics.rate_distortion import RateDistortion, Traversal, rate_distortion, traversal_grid
from fastflow.vae import DiscreteVAE, GaussianLikelihood, HierarchicalVAE, QuantizedVAE, SemiSupervisedVAE

__all__ = ["Diagnosis", "diagnose"]

ACTIVE_NATS = 0.01  # mean KL above which a latent of a hierarchy counts as active
LEVEL_IMAGES = 8


@dataclass(frozen=True)
class Diagnosis:
    """A VAE measured on N examples. What a kind of model does not have is None, and of one example what is measured on
    several: the ELBO's error is NaN, active units (but a hierarchy's), information and prediction are None.

    Of a HamiltonianVAE, whose z are no draws of a posterior of known density, the latents are left out.

    Attributes:
        n_examples, size: N, and the numbers in one example.
        point: RateDistortion.
        unit: what one latent is: "latent", "bit", "class", "latent" of a level or "code position".
        kl: (D,) mean KL of each latent in nats, see kl_per_latent.
        marginal_kl: (D,) KL(q(z_d) || N(0, 1)) of each latent's aggregate posterior, for Gaussians with prior N(0, I).
        active: (D,) bool: Burda et al.'s active units for Gaussians, bits and classes; a mean KL above 0.01 nats for
            hierarchies.
        level_sizes: of hierarchies, how many of the D latents each level has, from the top down.
        codes: CodeUsage of quantised models.
        information: InformationTerms; None for hierarchies.
        traversal: Traversal of Gaussians, bits and classes; None for conditional models.
        level_images: (L + 1, V, *event) of hierarchies: V reconstructions with the uppermost 0 to L levels inferred
            and those below at their priors' means.
        prediction: LinearOptimum of a linear model on these data, for Gaussian likelihoods with one sigma.
    """

    n_examples: int
    size: int
    point: RateDistortion
    unit: str = "latent"
    kl: torch.Tensor | None = None
    marginal_kl: torch.Tensor | None = None
    active: torch.Tensor | None = None
    level_sizes: tuple | None = None
    codes: CodeUsage | None = None
    information: InformationTerms | None = None
    traversal: Traversal | None = None
    level_images: torch.Tensor | None = None
    prediction: LinearOptimum | None = None

    @property
    def level_kl(self):
        """[float] mean KL of each level of a hierarchy in nats, from the top down; None for other models."""
        return None if self.level_sizes is None else [part.sum().item() for part in self.kl.split(self.level_sizes)]

    @property
    def bits_per_dim(self):
        """-ELBO in bits for each number of an example."""
        return -self.point.elbo / (self.size * math.log(2.0))

    def summary(self):
        """A few lines of text."""
        point = self.point
        one = self.n_examples == 1
        error = "" if one else f" +- {point.elbo_error:.2g}"
        lines = [f"{self.n_examples} example{'' if one else 's'} of {self.size} numbers",
                 f"ELBO {point.elbo:.6g}{error} nats ({self.bits_per_dim:.4g} bits/dim): rate {point.rate:.5g}, "
                 f"distortion {point.distortion:.6g}"]
        if one:
            lines.append("one example alone does not show how examples differ: what is measured on several is left out")
        if self.active is not None:
            active, total = int(self.active.sum()), len(self.kl)
            # A NaN is not above any threshold, and no collapse.
            verdict = "" if active else ": posterior collapse" if self.kl.isfinite().all() else ": KLs are not finite"
            lines.append(f"active units {active} of {total}{verdict}")
        if self.codes is not None:
            lines.append(f"codes in use {self.codes.used} of {len(self.codes.counts)}, perplexity "
                         f"{self.codes.perplexity:.4g}" + (": codebook collapse" if self.codes.used == 1 else ""))
        if self.level_sizes is not None:
            levels = ", ".join(f"{kl:.3g} in {n}" for kl, n in zip(self.level_kl, self.level_sizes, strict=True))
            lines.append(f"KL of each level from the top down, nats in latents: {levels}")
        elif self.kl is not None:
            top = ", ".join(f"{i}: {self.kl[i].item():.3g}" for i in self.kl.argsort(descending=True)[:8].tolist())
            lines.append(f"largest KLs, {self.unit}: nats: {top}")
        if self.information is not None:
            terms = self.information
            lines.append(f"rate = mutual information {terms.mutual_information.item():.4g} + aggregate KL "
                         f"{terms.aggregate_kl.item():.4g} (+- {terms.aggregate_kl_error.item():.2g}) nats; the "
                         f"first is at most log N = {math.log(self.n_examples):.4g}")
        if self.prediction is not None:
            lines.append(self.prediction.summary())
        return "\n".join(lines)


@torch.no_grad()
def diagnose(model, x, context=None, *, beta=1.0, constant=0.0, n_samples=1, n_dims=10, max_examples=2000,
             batch_size=1024, generator=None):
    """Diagnosis of a model with ``elbo`` on data x (N, *event), as the model takes them; it runs in eval mode.

    Args:
        context: (N, ...) for a conditional model; of a SemiSupervisedVAE labels that are unknown, None or -1, are those
            that its classifier thinks likeliest.
        beta: the KL weight that it was trained with, for the prediction of collapse.
        constant: nats to add to the distortion, such as D log(n_bins) for images dequantised to a range of 1, so that
            the ELBO bounds the log-probability of the integers.
        n_samples: draws of z for each example.
        n_dims: latents in the traversal.
        batch_size: examples that go through the networks at a time.
        max_examples: only the first so many are used; the aggregate posterior takes time in their square.
        generator: of the draws of z, or None.
    """
    check_bound(model)
    checks.tensor("x", x, floating=False)
    if len(x) < 1:
        raise ValueError("x: expected at least one example, got none")
    max_examples, batch_size = checks.count("max_examples", max_examples, 1), checks.count("batch_size", batch_size, 1)
    n_samples, n_dims = checks.count("n_samples", n_samples, 1), checks.count("n_dims", n_dims, 1)
    x = x[:max_examples]
    context = None if context is None else context[:max_examples]
    with in_eval(model):
        if isinstance(model, SemiSupervisedVAE):
            likeliest = torch.cat([model.classify(batch).argmax(1) for batch in x.split(batch_size)])
            context = likeliest if context is None else torch.where(context < 0, likeliest, context)
        point = rate_distortion(model, x, context, n_samples=n_samples, batch_size=batch_size, beta=beta,
                                generator=generator)
        point = point._replace(distortion=point.distortion + constant, elbo=point.elbo - constant)
        options = {"n_samples": n_samples, "n_dims": n_dims, "batch_size": batch_size, "generator": generator}
        latents = {}
        if has_moments(model):
            latents = _gaussian(model, x, context, **options)
        elif isinstance(model, DiscreteVAE):
            latents = _discrete(model, x, **options)
        elif isinstance(model, HierarchicalVAE):
            latents = _hierarchical(model, x, batch_size, generator)
        elif isinstance(model, QuantizedVAE):
            latents = _quantized(model, x, batch_size)
        return Diagnosis(len(x), x[0].numel(), point, prediction=_prediction(model, x, beta, latents), **latents)


def _gaussian(model, x, context, n_samples, n_dims, batch_size, generator):
    mean, log_sigma, kl = latents_and_kl(model, x, context, batch_size=batch_size)
    found = {"kl": kl.mean(0)}
    if len(x) > 1:
        found["active"] = active_units(mean)
    if model.prior is None:
        found["marginal_kl"] = marginal_kl(mean, log_sigma)
    if context is None:
        shape = model.encode(x[:1]).shape[1:]

        def log_prior(z):
            return model._log_prior(z.view(1, -1, *shape))[0]
        if len(x) > 1:
            found["information"] = information(mean, log_sigma, n_samples=n_samples, log_prior=log_prior,
                                               generator=generator)
        found["traversal"] = traversal_grid(model, x, n_dims)
    return found


def _discrete(model, x, n_samples, n_dims, batch_size, generator):
    posteriors = [model.posterior(batch) for batch in x.split(batch_size)]
    q, p = type(posteriors[0])(torch.cat([part.logits for part in posteriors])), model.prior()
    kl = discrete_kl(model, q, generator=generator).mean(0)
    dims = kl.argsort(descending=True, stable=True)[:n_dims]
    images = model.traverse(q.mode()[0], dims.tolist())
    found = {"unit": "bit" if model.n_classes == 2 else "class", "kl": kl,
             "traversal": Traversal(dims, kl[dims], torch.arange(model.n_classes), images)}
    if len(x) > 1:
        found |= {"active": active_sites(q),
                  "information": discrete_information(q, p, n_samples=n_samples, generator=generator)}
    return found


def _hierarchical(model, x, batch_size, generator):
    kl = kl_per_latent(model, x, batch_size=batch_size, generator=generator)
    sizes = tuple(z[0].numel() for z in model.encode(x[:1]))  # the means, which draw nothing
    images = torch.stack([model.reconstruct(x[:LEVEL_IMAGES], n) for n in range(len(sizes) + 1)])
    return {"kl": kl, "active": kl > ACTIVE_NATS, "level_sizes": sizes, "level_images": images}


def _quantized(model, x, batch_size):
    codes = torch.cat([model.codes(batch) for batch in x.split(batch_size)])
    log_probs = torch.cat([model.code_log_probs(part) for part in codes.split(batch_size)])
    found = {"unit": "code position", "kl": -log_probs.mean(0), "codes": code_usage(codes, model.quantizer.n_codes)}
    if len(x) > 1:
        found["information"] = code_information(codes, log_probs.sum(1))
    return found


def _prediction(model, x, beta, latents):
    likelihood = getattr(model, "likelihood", None)
    if len(x) < 2 or isinstance(model, (DiscreteVAE, HierarchicalVAE, QuantizedVAE)) or not beta > 0.0 \
            or not isinstance(likelihood, GaussianLikelihood) or likelihood.mode == "decoder":
        return None
    sigma = math.exp(float(likelihood._log_scale(None)))
    return linear_optimum(data_eigenvalues(x), sigma, beta, len(latents["kl"]) if latents else None)
