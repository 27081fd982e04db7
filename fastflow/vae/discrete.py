"""A variational autoencoder with discrete latents."""

import math

import torch
from torch import nn

from fastflow import checks, estimators
from fastflow.estimators.base import with_score
from fastflow.vae.elbo import ELBO, check_beta, iwae
from fastflow.vae.generation import check_temperature, encoded, for_network, way
from fastflow.vae.model import LIKELIHOODS, named
from fastflow.vae.priors import BitPrior

__all__ = ["DiscreteVAE"]


class DiscreteVAE(nn.Module):
    """A VAE whose latents are independent bits or classes, trained through a gradient estimator of
    fastflow.estimators. Calling the module is :meth:`elbo`, as for VAE.

    Args:
        encoder: module from x (B, *event) to logits (B, D, *S) of bits, or (B, D*C, *S) of classes.
        decoder: module from latents, bits (N, D, *S) or one-hots packed like the logits (N, D*C, *S), to the
            likelihood's parameters (N, *event). Estimators that relax pass values in between.
        latent_shape: (D, *S), or D.
        n_classes: C; 2 makes bits of one logit each.
        estimator: a name among fastflow.estimators.ESTIMATORS or an Estimator. "vimco" makes the bound IWAE.
        likelihood: as for VAE.
        prior: "uniform"; "learned": independent, of logits that are parameters; for bits also "autoregressive", a
            BitPrior. The KL to that has no closed form: what the estimator estimates is
            log p(x | z) + beta log p(z), to which beta times q's entropy is added, and the rate reported is that at
            samples of its own, see kl_at.

    Attributes:
        prior_logits: (1, D, *S) for bits, (1, D, *S, C) for classes; zeros that nothing uses beside a BitPrior.
        bit_prior: the BitPrior or None.
    """

    def __init__(self, encoder, decoder, latent_shape, n_classes=2, estimator="disarm", likelihood="bernoulli",
                 prior="uniform"):
        super().__init__()
        n_classes = checks.count("n_classes", n_classes, 2)
        checks.choice("prior", prior, ("uniform", "learned", "autoregressive"))
        if prior == "autoregressive" and n_classes != 2:
            raise ValueError(f"prior: 'autoregressive' is for bits, got {n_classes} classes")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = checks.extent("latent_shape", latent_shape)
        self.n_classes = n_classes
        self.likelihood = named("likelihood", likelihood, LIKELIHOODS)
        event_shape = self.latent_shape if n_classes == 2 else (*self.latent_shape, n_classes)
        self.estimator = estimators.create(estimator, event_shape)
        self.prior_logits = nn.Parameter(torch.zeros(1, *event_shape), requires_grad=prior == "learned")
        self.bit_prior = BitPrior(self.latent_shape) if prior == "autoregressive" else None

    def forward(self, x, n_samples=1, beta=1.0, *, generator=None):
        return self.elbo(x, n_samples, beta, generator=generator)

    def posterior(self, x):
        """q(z | x), an estimators.Bernoulli (B, D, *S) or Categorical (B, D, *S, C)."""
        logits = encoded(x, self.encoder, None)
        expected = [x.shape[0], *self.latent_shape]
        if self.n_classes == 2:
            checks.shape("encoder output", logits, expected)
            return estimators.Bernoulli(logits)
        expected[1] *= self.n_classes
        checks.shape("encoder output", logits, expected)
        return estimators.Categorical(logits.unflatten(1, (self.latent_shape[0], self.n_classes)).movedim(2, -1))

    def prior(self):
        """p(z): an estimators.Bernoulli or Categorical with one row, or the BitPrior."""
        return self._family(self.prior_logits) if self.bit_prior is None else self.bit_prior

    def decode(self, z):
        """The likelihood's parameters (N, *event) of latents (N, D, *S) or one-hots (N, D, *S, C)."""
        z = for_network(z, self.decoder)
        return self.decoder(z if self.n_classes == 2 else z.movedim(-1, 2).flatten(1, 2))

    def log_likelihood(self, x, z):
        """log p(x | z) (N, B) of x (B, *event) at latents z (N, B, D, *S) or (N, B, D, *S, C). As f of an estimator, or
        of estimators.measure, its mean under :meth:`posterior` is minus the distortion."""
        output = self.decode(z.flatten(0, 1))
        shape = getattr(self.likelihood, "output_shape", tuple)(x.shape[1:])
        checks.shape("decoder output", output, (z.shape[0] * x.shape[0], *shape))
        return self.likelihood.log_prob(x, output.unflatten(0, z.shape[:2]))

    def elbo(self, x, n_samples=1, beta=1.0, *, generator=None):
        """The bound and its terms, in nats.

        Gradients of encoder, decoder, prior, likelihood and the estimator's own networks come through ``elbo``, to be
        maximised; they are the estimator's. KL is analytic, but for a BitPrior. Without gradients (under no_grad) no
        estimator is needed and the samples are n_samples independent ones, so that iwae(log_w) is the
        importance-weighted bound.

        Args:
            x: (B, *event).
            n_samples: K, as the estimator takes them.
            beta: weight of the rate in ``elbo``.
            generator: torch.Generator, None for torch's own.

        Returns:
            ELBO; log_px_z, log_pz, log_qz and log_w, without gradient, are (N, B) at the samples where the estimator
            evaluated the decoder (N = K, for pairs 2K; relaxed ones for "gumbel-softmax").
        """
        q, p = self.posterior(x), self.prior()
        check_beta(beta, q.logits, 0)
        estimator = self.estimator
        importance = estimator.objective == "iwae"
        if not torch.is_grad_enabled():
            estimator = estimators.REINFORCE()

        weighed = importance and torch.is_grad_enabled()
        # Without a closed KL log p(z) is a part of what is estimated, for its gradient by q.
        joint = self.bit_prior is not None and not importance and torch.is_grad_enabled()

        def objective(z):
            log_px_z = self.log_likelihood(x, z)
            if weighed:
                return log_px_z + beta * (p.log_prob(z) - q.log_prob(z))
            return log_px_z + beta * p.log_prob(z) if joint else log_px_z

        estimate = estimator(q, objective, n_samples, generator=generator)
        if self.bit_prior is None:
            kl = q.kl(p)
        else:
            kl = self.kl_at(q, q.sample(n_samples, generator=generator) if joint else estimate.samples)
        with torch.no_grad():
            log_pz, log_qz = p.log_prob(estimate.samples), q.log_prob(estimate.samples)
            log_px_z = estimate.values.detach()
            if weighed or joint:
                log_px_z = log_px_z - beta * (log_pz - log_qz if weighed else log_pz)
        if joint:
            elbo = estimate.value + beta * q.entropy()
            distortion = -elbo - beta * kl
        elif weighed:
            elbo, distortion = estimate.value, -log_px_z.mean(0)
        elif importance:
            elbo, distortion = iwae(log_px_z + beta * (log_pz - log_qz)), -log_px_z.mean(0)
        else:
            elbo, distortion = estimate.value - beta * kl, -estimate.value
        elbo = with_score(elbo, -estimate.auxiliary)  # to be minimised, where elbo is maximised
        return ELBO(log_px_z=log_px_z, log_pz=log_pz, log_qz=log_qz, log_w=log_px_z + log_pz - log_qz, kl=kl,
                    distortion=distortion, rate=kl, elbo=elbo)

    @torch.no_grad()
    def sample(self, n, *, generator=None, temperature=1.0, mean=False):
        """n draws of x (n, *event): latents from the prior, then x from the likelihood.

        Args:
            generator: torch.Generator, None for torch's own.
            temperature: the prior's logits are divided by it; 0 takes the likeliest latents.
            mean: return the likelihood's mean instead of a draw.
        """
        check_temperature(temperature)
        checks.rng(generator)
        checks.count("n", n)
        if self.bit_prior is not None:
            z = self.bit_prior.sample(n, generator=generator, temperature=temperature)
        elif temperature == 0.0:
            z = self.prior().mode().expand(n, *self.prior_logits.shape[1:])
        else:
            z = self._family(self.prior_logits / temperature).sample(n, generator=generator)[:, 0]
        output = self.decode(z)
        return self.likelihood.mean(output) if mean else self.likelihood.sample(output, generator=generator)

    def reconstruct(self, x):
        """The likelihood's mean (B, *event) at the likeliest latents for each x."""
        return self.likelihood.mean(self.decode(self.posterior(x).mode()))

    @torch.no_grad()
    def traverse(self, z, dims=None):
        """The likelihood's mean as single latents take each of their values while the others stay.

        Args:
            z: (D, *S) bits or (D, *S, C) one-hots, the point to leave from.
            dims: indices into the flattened bits or classes; None for all.

        Returns:
            (len(dims), C, *event), 0 before 1 for bits.
        """
        checks.tensor("z", z)
        checks.shape("z", z, self.prior_logits.shape[1:])
        n_sites = math.prod(self.latent_shape)
        dims = range(n_sites) if dims is None else dims
        for dim in dims:
            if not 0 <= dim < n_sites:
                raise ValueError(f"dims: expected indices from 0 to {n_sites - 1}, got {dim}")
        flat = z.reshape(n_sites, *z.shape[len(self.latent_shape):])
        points = flat.expand(len(dims), self.n_classes, *flat.shape).clone()
        values = self._family(self.prior_logits).from_index(torch.arange(self.n_classes, device=z.device)).to(z)
        for row, dim in enumerate(dims):
            points[row, :, dim] = values
        output = self.decode(points.view(-1, *z.shape))
        return self.likelihood.mean(output).unflatten(0, (len(dims), self.n_classes))

    @torch.no_grad()
    def interpolate(self, start, end, steps=8):
        """The likelihood's mean at the likeliest latents of logits on the straight line between the posteriors' of two
        batches, along which latents change one after the other.

        Args:
            start, end: (B, *event).
            steps: points on each way, both ends included, at least 2.

        Returns:
            (steps, B, *event).
        """
        logits = way(self.posterior(start).logits, self.posterior(end).logits, steps, "lerp")
        return self.likelihood.mean(self.decode(self._family(logits.flatten(0, 1)).mode())).unflatten(0, (steps, -1))

    @torch.no_grad()
    def kl_at(self, q, z):
        """KL(q || p) (B,) in nats, without gradient; under a BitPrior the mean over draws z (K, B, D, *S) from q of
        sum_d KL(q_d || p(z_d | z_<d))."""
        if self.bit_prior is None:
            return q.kl(self.prior())
        return torch.stack([q.kl(self.bit_prior.given(one)) for one in z]).mean(0)

    def _family(self, logits):
        return (estimators.Bernoulli if self.n_classes == 2 else estimators.Categorical)(logits)
