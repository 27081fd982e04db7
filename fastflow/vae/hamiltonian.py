"""A VAE whose posterior samples are moved towards the true posterior by Hamiltonian dynamics."""

import math

import torch

from fastflow import checks, functional, reference
from fastflow.autograd.differentiable import outside_inference_mode
from fastflow.one_number import OneNumber, one_number
from fastflow.vae.elbo import Inference
from fastflow.vae.model import VAE

__all__ = ["HamiltonianVAE"]


class HamiltonianVAE(OneNumber, VAE):
    """z_0 from the encoder and a momentum from N(0, I / beta_0) take leapfrog steps on -log p(x, z), each followed by a
    cooling of the momentum, up to inverse temperature 1.

    The steps keep the volume and the cooling scales it by beta_0^(D/2), so that the density of the end (z, m) is known.
    log_qz is log q(z, m | x) - log N(m; 0, I): exp(log_w) is an unbiased estimate of p(x), log_w a bound in
    expectation, and the KL a Monte-Carlo one. ``eps``, if given, is (K, B, 2D, *S), the noise of z_0 and that of the
    momentum. reconstruct starts and ends at the encoder's mean, without steps. torch.compile can't trace the leapfrog
    steps, whose forces are gradients: a TrainStep of one leaves ``compile`` at False.

    Args:
        encoder, decoder, options: as for VAE; the decoder and the likelihood must be twice differentiable.
        n_steps: leapfrog steps, at least 0.
        step_size: of every step at first; its logarithm is learned, parameter ``log_step``.
        beta_zero: inverse temperature of the first momentum, in (0, 1), at first; its logit is learned, parameter
            ``logit_beta``. The temperatures in between follow the quadratic scheme of the reference.

    References:
        Caterini et al., "Hamiltonian variational auto-encoder", 2018, arXiv:1805.11328.
    """

    def __init__(self, encoder, decoder, *, n_steps=3, step_size=0.1, beta_zero=0.9, **options):
        super().__init__(encoder, decoder, **options)
        n_steps = checks.count("n_steps", n_steps)
        if not 0.0 < step_size < math.inf:
            raise ValueError(f"step_size: expected a finite positive number, got {step_size!r}")
        if not 0.0 < beta_zero < 1.0:
            raise ValueError(f"beta_zero: expected a number in (0, 1), got {beta_zero!r}")
        self.n_steps = n_steps
        self.log_step = one_number(math.log(step_size))
        self.logit_beta = one_number(math.log(beta_zero) - math.log1p(-beta_zero))

    @outside_inference_mode
    def evolve(self, x, z, noise, context=None):
        """(z, momentum) at the end, each (K, B, D, *S), from z and standard normals like it."""
        if self.n_steps == 0:
            return z, noise
        step, inverse = torch.exp(self.log_step), torch.rsqrt(torch.sigmoid(self.logit_beta))
        first, momentum = inverse, noise * inverse
        for k in range(1, self.n_steps + 1):
            momentum = momentum + 0.5 * step * self._force(x, z, context)
            z = z + step * momentum
            momentum = momentum + 0.5 * step * self._force(x, z, context)
            following = first + (1.0 - first) * (k / self.n_steps) ** 2  # 1 / sqrt(beta_k)
            momentum, inverse = momentum * (following / inverse), following
        return z, momentum

    @outside_inference_mode
    def _infer(self, x, n_samples, prior, context, *, eps=None, seed=None, generator=None):
        eps, noise = (None, None) if eps is None else eps.chunk(2, 2)
        if eps is None and seed is None:
            seed = reference.draw_seed(x.device, generator)
        params, z, log_qz, _ = super()._infer(x, n_samples, prior, context, eps=eps, seed=seed)
        zeros = torch.zeros_like(z[0])
        offset = -(-z.numel() // 4) if eps is None else 0  # behind the counters that z_0 took, four normals each
        noise, _, log_noise = functional.gaussian_sample_kl((zeros, zeros), eps=noise, seed=seed, offset=offset,
                                                            n_samples=n_samples, return_logq=True)
        z, momentum = self.evolve(x, z, noise, context)
        log_momentum = -0.5 * (momentum * momentum + math.log(2.0 * math.pi)).flatten(2).sum(2)
        return Inference(params, z, log_qz + log_noise - log_momentum, None)

    def _force(self, x, z, context):
        """The gradient of log p(x, z) in z, with gradients of its own where they are wanted."""
        wanted = torch.is_grad_enabled()
        with torch.enable_grad():
            z = z if wanted and z.requires_grad else z.detach().requires_grad_()
            repeated = None if context is None else context.expand(z.shape[0], *context.shape).flatten(0, 1)
            output = self.decode(z.flatten(0, 1), repeated).unflatten(0, z.shape[:2])
            joint = self.likelihood.log_prob(x, output) + self._log_prior(z, context)
            force, = torch.autograd.grad(joint.sum(), z, create_graph=wanted)
        return force
