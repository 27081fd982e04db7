"""The variational autoencoder."""

import math

import torch
from torch.distributions import Distribution

from fastflow import checks
from fastflow.flows.base import Anchored, as_base
from fastflow.vae.elbo import ELBO, Inference, LossTerms, check_beta
from fastflow.vae.generation import Generation, check_input, for_network, repeated, with_context
from fastflow.vae.likelihoods import (
    BernoulliLikelihood,
    ContinuousBernoulliLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    PoissonLikelihood,
)
from fastflow.vae.one_node import one_node
from fastflow.vae.posteriors import FullGaussianPosterior, GaussianPosterior, LowRankGaussianPosterior
from fastflow.vae.posteriors.closed import has_closed_kl, misplaced

__all__ = ["VAE"]

POSTERIORS = {"gaussian": GaussianPosterior, "low_rank": LowRankGaussianPosterior, "full": FullGaussianPosterior}
LIKELIHOODS = {"bernoulli": BernoulliLikelihood, "continuous_bernoulli": ContinuousBernoulliLikelihood,
               "gaussian": GaussianLikelihood, "laplace": LaplaceLikelihood, "poisson": PoissonLikelihood}
KL = ("auto", "analytic", "monte_carlo")
# What a training loss leaves out that a subclass may have replaced: always, and where the networks run as one node.
BOUND = ("elbo", "_infer", "_terms", "_log_joint")
NETWORKS = ("_encoded", "decode", "_log_likelihood")


class VAE(Generation, Anchored):
    """p(x) = integral of p(x | z) p(z), trained through the evidence lower bound. Calling the module is :meth:`elbo`,
    or the objective if one is given, so that wrappers such as DDP, FSDP2 and torch.compile train it.

    Args:
        encoder: module from x (B, *event) to params (B, 2D, *S), or what another posterior needs. A diagonal Gaussian
            takes a pair (mean, raw scale) too, each (B, D, *S); the raw scale of "gaussian" is the log-variance.
        decoder: module from z (K*B, D, *S) to the likelihood's parameters (K*B, *event), or of the shape that the
            likelihood's output_shape says.
        posterior: "gaussian", "low_rank" (of rank 1), "full" or a posterior object, see posteriors/.
        prior: None for N(0, I); a Gaussian, be it a GaussianPrior, a base distribution or a torch.distributions
            object; or, with a Monte-Carlo KL, any other of these, prior of priors/ or flow, over (D, *S). A
            torch.distributions object over single numbers is the law of every element; another library's flow has
            log_prob(z) and sample(n).
        likelihood: "bernoulli" (the decoder gives logits), "gaussian" (it gives means; one learned sigma),
            "continuous_bernoulli", "laplace", "poisson" or a likelihood object, see likelihoods/.
        latent_shape: (D, *S), needed by :meth:`sample` where it can be seen neither in the prior, nor in a decoder that
            begins with a linear layer, nor in an earlier call of elbo.
        objective: what training maximises instead of the ELBO, see objectives.py, or None.
        conditional_prior: whether the prior takes the context; None: if it says so (``prior.conditional``).

    With a ``context`` (labels or other variables, one for each x) the model is a conditional one, p(x | context):
    encoder and decoder are called with it as second argument, and so is a conditional prior.

    References:
        Kingma and Welling, "Auto-encoding variational Bayes", 2014, arXiv:1312.6114.
        Sohn et al., "Learning structured output representation using deep conditional generative models", 2015.
    """

    event_shape = None  # of one x, in models that come with their networks

    def __init__(self, encoder, decoder, posterior="gaussian", prior=None, likelihood="bernoulli", *,
                 latent_shape=None, objective=None, conditional_prior=None):
        super().__init__()
        posterior, likelihood = named("posterior", posterior, POSTERIORS), named("likelihood", likelihood, LIKELIHOODS)
        for name, value in (("encoder", encoder), ("decoder", decoder), ("posterior", posterior)):
            if not callable(value):
                raise TypeError(f"{name}: expected a module or another callable, got {type(value).__name__}")
        if not hasattr(likelihood, "log_prob"):
            raise TypeError(f"likelihood: expected a name or an object with log_prob, got {type(likelihood).__name__}")
        self.encoder = encoder
        self.decoder = decoder
        self.posterior = posterior
        self.prior = prior
        self.likelihood = likelihood
        if prior is not None and not (hasattr(prior, "log_prob") and hasattr(prior, "sample")):
            raise TypeError(f"prior: expected None or an object with log_prob and sample, got {type(prior).__name__}")
        if objective is not None and not callable(objective):
            raise TypeError(f"objective: expected None or a callable, got {type(objective).__name__}")
        self.objective = objective
        self.conditional_prior = bool(getattr(prior, "conditional", False)
                                      if conditional_prior is None else conditional_prior)
        self.latent_shape = None if latent_shape is None else checks.extent("latent_shape", latent_shape)
        self._shape_given = latent_shape is not None
        if hasattr(prior, "bind"):
            prior.bind(self)

    def forward(self, x, n_samples=1, beta=1.0, context=None, *, targets=None, loss_only=False, bound_only=False,
                **noise):
        """The ELBO; with an objective what that returns: an object with ``value`` (B,), which training maximises,
        ``parts``, and the ELBO's rate and distortion. ``targets`` are for the objective's tasks, see labels.Task.

        ``loss_only`` asks for the value, the rate and the distortion alone: a LossTerms of the same figures where
        there is no objective and the KL has a closed form, so that log q(z | x) and log p(z) need not be computed.
        ``bound_only`` asks for the ELBO, whatever the objective.
        """
        if targets is not None:
            if self.objective is None:
                raise ValueError("targets: this VAE maximises the plain ELBO, which has no task; give it an objective")
            noise |= {} if bound_only else {"targets": targets}
        if self.objective is None or bound_only:
            bound = self._loss_terms if loss_only else self.elbo
            return bound(x, n_samples, beta, context=context, **noise)
        return self.objective(self, x, n_samples, beta, context=context, **noise)

    def infer(self, x, n_samples=1, *, context=None, eps=None, seed=None, generator=None):
        """The posterior of each x and n_samples draws from it, an Inference; arguments as for :meth:`elbo`."""
        return self._infer(x, n_samples, self._prior(context), context, eps=eps, seed=seed, generator=generator)

    def elbo(self, x, n_samples=1, beta=1.0, *, context=None, kl="auto", eps=None, seed=None, generator=None):
        """The bound and its terms, with gradients for encoder, decoder, prior and likelihood.

        Args:
            x: (B, *event).
            n_samples: K, samples of z for each x.
            beta: weight of the rate in ``elbo``, a number or a tensor, 0-d or (B,); nothing else depends on it.
            context: (B, ...) that p(x | context) is conditioned on, or None.
            kl: "auto", in closed form where there is one; "analytic", an error where there is none; "monte_carlo".
            eps: noise to use, (K, B, D, *S), or None.
            seed, generator: where noise comes from otherwise, as in functional.gaussian_sample_kl.

        Returns:
            ELBO, all terms in nats, none averaged over the batch.
        """
        checks.choice("kl", kl, KL)
        prior = self._prior(context)
        inference = self._infer(x, n_samples, prior, context, eps=eps, seed=seed, generator=generator)
        return self._terms(x, inference, prior, context, beta, kl)

    def elbo_of(self, x, inference, beta=1.0, *, context=None, kl="auto"):
        """:meth:`elbo` at samples that :meth:`infer` has drawn."""
        checks.choice("kl", kl, KL)
        return self._terms(x, inference, self._prior(context), context, beta, kl)

    def decode(self, z, context=None):
        """The decoder's output for z (N, D, *S), given N contexts if the model is conditional."""
        z = for_network(z, self.decoder)
        return self.decoder(z) if context is None else with_context(self.decoder, z, context, "decoder")

    def _loss_terms(self, x, n_samples, beta, *, context=None, kl="auto", **noise):
        """The LossTerms where the KL has a closed form, else the ELBO."""
        prior = self._prior(context)
        if (self._replaces(BOUND) or kl != "auto" or type(self.posterior) is not GaussianPosterior
                or not has_closed_kl(prior)):
            return self.elbo(x, n_samples, beta, context=context, kl=kl, **noise)
        check_input(x, self.encoder, self.event_shape)
        single = n_samples == 1 and noise.get("eps") is None
        if (single and context is None and prior is None and not self._replaces(NETWORKS)
                and (terms := one_node(self, x, **noise)) is not None):
            check_beta(beta, terms[1])
            return LossTerms(-terms[0], terms[1], beta)
        params = self._encoded(x, context)
        z, _, rate = self.posterior(params, prior, None if single else n_samples, want_log_qz=False, **noise)
        lead = () if single else z.shape[:1]
        if self.latent_shape is None and not torch.compiler.is_compiling():
            self.latent_shape = z.shape[len(lead) + 1:]
        log_px_z = self._log_likelihood(x, z, context, lead)
        check_beta(beta, rate)
        return LossTerms(-(log_px_z if single else log_px_z.mean(0)), rate, beta)

    def _replaces(self, names):
        """Whether one of these methods is not the VAE's own, by a subclass or on this object."""
        own, mine = type(self), vars(self)
        return any(getattr(own, name) is not getattr(VAE, name) or name in mine for name in names)

    def _infer(self, x, n_samples, prior, context, **noise):
        checks.count("n_samples", n_samples, 1)
        params = self._encoded(x, context)
        z, log_qz, kl = self.posterior(params, prior, n_samples, **noise)
        if self.latent_shape is None and not torch.compiler.is_compiling():
            self.latent_shape = z.shape[2:]
        return Inference(params, z, log_qz, kl)

    def _terms(self, x, inference, prior, context, beta, kl_method):
        z, log_qz, kl = inference.z, inference.log_qz, inference.kl
        log_px_z, log_pz = self._log_joint(x, z, context, prior)
        if kl is None and kl_method == "analytic":
            raise ValueError(f"kl: expected 'auto' or 'monte_carlo', because there is no closed form between a "
                             f"{type(self.posterior).__name__} and this prior, got 'analytic'")
        if kl is None or kl_method == "monte_carlo":
            kl = (log_qz - log_pz).mean(0)
        check_beta(beta, kl)
        distortion = -log_px_z.mean(0)
        return ELBO(log_px_z=log_px_z, log_pz=log_pz, log_qz=log_qz, log_w=log_px_z + log_pz - log_qz, kl=kl,
                    distortion=distortion, rate=kl, elbo=-distortion - beta * kl)

    def _log_likelihood(self, x, z, context, lead):
        """log p(x | z), (*lead, B) nats, of z (*lead, B, D, *S); lead is (K,) or nothing."""
        batch = z.shape[len(lead)]
        if lead:
            z = z.flatten(0, 1)
            context = None if context is None else repeated(context, lead)
        output = self.decode(z, context)
        shape = getattr(self.likelihood, "output_shape", tuple)(x.shape[1:])
        checks.shape("decoder output", output, (z.shape[0], *shape))
        return self.likelihood.log_prob(x, output.unflatten(0, (*lead, batch)) if lead else output)

    def _log_joint(self, x, z, context=None, prior=None):
        """(log p(x | z), log p(z)), (K, B) nats each, of any z (K, B, D, *S)."""
        return self._log_likelihood(x, z, context, z.shape[:1]), self._log_prior(z, context, prior)

    def _log_posterior(self, params, z):
        """log q(z | x) (K, B) nats of any z (K, B, D, *S)."""
        if not hasattr(self.posterior, "log_prob"):
            raise TypeError(f"posterior: expected log_prob(params, z), which {type(self.posterior).__name__} has not")
        return self.posterior.log_prob(params, z)

    def _encoded(self, x, context):
        check_input(x, self.encoder, self.event_shape)
        output = self.encoder(x) if context is None else with_context(self.encoder, x, context, "encoder")
        if isinstance(output, torch.Tensor) or not hasattr(self.posterior, "n_params"):  # another's own
            return output
        if not (isinstance(output, (tuple, list)) and hasattr(self.posterior, "packed")):
            raise TypeError(f"encoder output: expected a torch.Tensor for a {type(self.posterior).__name__}, got "
                            f"{type(output).__name__}; torch.cat(parts, 1) makes one of several")
        return self.posterior.packed(output)

    def _prior(self, context):
        """The prior for this context."""
        return self.prior.given(context) if hasattr(self.prior, "given") else self.prior

    def _log_prior(self, z, context=None, prior=None):
        """(K, B) nats of z (K, B, D, *S); ``prior`` is the one for the context, if known already."""
        if self.prior is None:
            size = math.prod(z.shape[2:])
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            return -0.5 * (z * z).flatten(2).sum(2) - 0.5 * size * math.log(2.0 * math.pi)
        if hasattr(self.prior, "given"):
            return (self._prior(context) if prior is None else prior).log_prob(z)
        prior, options = self.prior, {}
        prior = as_base(prior) if isinstance(prior, Distribution) else prior
        if tuple(getattr(prior, "event_shape", ())) not in ((), z.shape[2:]):
            raise misplaced(prior.event_shape, z.shape[2:])
        if self.conditional_prior:
            if context is None:
                raise ValueError("context: expected a tensor for a conditional prior, got None")
            options["context"] = repeated(context, z.shape[:1])
        return prior.log_prob(z.flatten(0, 1), **options).unflatten(0, z.shape[:2])


def draws_from_posterior(model):
    """Whether the model is a VAE whose z are draws of its posterior, moved by nothing afterwards."""
    return isinstance(model, VAE) and type(model)._infer is VAE._infer


def named(name, value, table):
    if not isinstance(value, str):
        return value
    checks.choice(name, value, tuple(table))
    return table[value]()


def likelihood_of(value):
    """The likelihood of that name, or ``value``, which is checked to be one."""
    likelihood = named("likelihood", value, LIKELIHOODS)
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"likelihood: expected a Likelihood, got {type(likelihood).__name__}")
    return likelihood
