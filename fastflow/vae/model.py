"""The variational autoencoder."""

import math

import torch
from torch import nn
from torch.distributions import Distribution

from fastflow import checks
from fastflow.flows.base import as_base
from fastflow.vae.elbo import ELBO
from fastflow.vae.likelihoods import BernoulliLikelihood, GaussianLikelihood
from fastflow.vae.posteriors import GaussianPosterior

__all__ = ["VAE"]

POSTERIORS = {"gaussian": GaussianPosterior}
LIKELIHOODS = {"bernoulli": BernoulliLikelihood, "gaussian": GaussianLikelihood}


class VAE(nn.Module):
    """p(x) = integral of p(x | z) p(z), trained through the evidence lower bound. Calling the module is :meth:`elbo`,
    so that wrappers such as DDP, FSDP2 and torch.compile train it.

    Args:
        encoder: module from x (B, *event) to params (B, 2D, *S).
        decoder: module from z (K*B, D, *S) to the likelihood's parameters (K*B, *event).
        posterior: "gaussian" or a posterior object, see posteriors.py.
        prior: None for N(0, I); a GaussianPrior; or, with a Monte-Carlo KL, any flow, base distribution or
            torch.distributions object over (D, *S).
        likelihood: "bernoulli" (the decoder gives logits), "gaussian" (it gives means; one learned sigma) or a
            likelihood object, see likelihoods.py.
        latent_shape: (D, *S), needed by :meth:`sample` where it can be seen neither in the prior, nor in a decoder that
            begins with a linear layer, nor in an earlier call of elbo.

    References:
        Kingma and Welling, "Auto-encoding variational Bayes", 2014, arXiv:1312.6114.
    """

    def __init__(self, encoder, decoder, posterior="gaussian", prior=None, likelihood="bernoulli", *,
                 latent_shape=None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.posterior = _named("posterior", posterior, POSTERIORS)
        self.prior = prior
        self.likelihood = _named("likelihood", likelihood, LIKELIHOODS)
        if prior is not None and not (hasattr(prior, "log_prob") and hasattr(prior, "sample")):
            raise TypeError(f"prior: expected None or an object with log_prob and sample, got {type(prior).__name__}")
        self.latent_shape = None if latent_shape is None else torch.Size(
            [latent_shape] if isinstance(latent_shape, int) else latent_shape)

    def forward(self, x, n_samples=1, beta=1.0, **noise):
        return self.elbo(x, n_samples, beta, **noise)

    def elbo(self, x, n_samples=1, beta=1.0, *, eps=None, seed=None, generator=None):
        """The bound and its terms, with gradients for encoder, decoder, prior and likelihood.

        Args:
            x: (B, *event).
            n_samples: K, samples of z for each x.
            beta: weight of the rate in ``elbo``; nothing else depends on it.
            eps: noise to use, (K, B, D, *S), or None.
            seed, generator: where noise comes from otherwise, as in functional.gaussian_sample_kl.

        Returns:
            ELBO, all terms in nats.
        """
        params = self.encoder(x)
        z, log_qz, kl = self.posterior(params, self.prior, n_samples, eps=eps, seed=seed, generator=generator)
        if self.latent_shape is None and not torch.compiler.is_compiling():
            self.latent_shape = z.shape[2:]
        output = self.decoder(z.flatten(0, 1))
        checks.shape("decoder output", output, (n_samples * x.shape[0], *x.shape[1:]))
        log_px_z = self.likelihood.log_prob(x, output.unflatten(0, (n_samples, x.shape[0])))
        log_pz = self._log_prior(z)
        if kl is None:
            kl = (log_qz - log_pz).mean(0)
        distortion = -log_px_z.mean(0)
        return ELBO(log_px_z=log_px_z, log_pz=log_pz, log_qz=log_qz, log_w=log_px_z + log_pz - log_qz, kl=kl,
                    distortion=distortion, rate=kl, elbo=-distortion - beta * kl)

    @torch.no_grad()
    def sample(self, n, *, generator=None, temperature=1.0, mean=False):
        """n draws of x (n, *event): z from the prior, then x from the likelihood.

        Args:
            generator: torch.Generator, None for torch's own.
            temperature: factor on the prior's standard deviation.
            mean: return the likelihood's mean instead of a draw, as pictures usually do.
        """
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
        if self.prior is not None:
            prior = as_base(self.prior) if isinstance(self.prior, Distribution) else self.prior
            z = prior.sample(n, generator=generator, temperature=temperature)
        else:
            like = next((p for p in self.decoder.parameters()), torch.zeros(()))
            dtype = torch.promote_types(like.dtype, torch.float32)
            device = like.device if generator is None else generator.device
            z = temperature * torch.randn((n, *self._latent_shape()), generator=generator, dtype=dtype, device=device)
            z = z.to(like.device)
        output = self.decoder(z)
        return self.likelihood.mean(output) if mean else self.likelihood.sample(output, generator=generator)

    def reconstruct(self, x):
        """The likelihood's mean (B, *event) at the posterior's mean for each x."""
        return self.likelihood.mean(self.decoder(self.posterior.mean(self.encoder(x))))

    def _log_prior(self, z):
        """(K, B) nats of z (K, B, D, *S)."""
        if self.prior is None:
            size = math.prod(z.shape[2:])
            z = z.to(torch.promote_types(z.dtype, torch.float32))
            return -0.5 * (z * z).flatten(2).sum(2) - 0.5 * size * math.log(2.0 * math.pi)
        prior = as_base(self.prior) if isinstance(self.prior, Distribution) else self.prior
        return prior.log_prob(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def _latent_shape(self):
        if self.latent_shape is not None:
            return self.latent_shape
        first = next((m for m in self.decoder.modules() if not list(m.children())), None)
        if isinstance(first, nn.Linear):
            return (first.in_features,)
        raise ValueError("latent_shape: the shape of z is not known yet; pass VAE(latent_shape=...)")


def _named(name, value, table):
    if not isinstance(value, str):
        return value
    checks.choice(name, value, tuple(table))
    return table[value]()
