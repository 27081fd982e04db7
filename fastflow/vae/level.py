"""One level of a hierarchical VAE: its prior, its posterior, and the way to the next."""

from typing import NamedTuple

import torch
from torch import nn

from fastflow import checks, functional, reference
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.posteriors.gaussian import log_normal

__all__ = ["Level", "LevelParams", "log_priors"]


class Level(nn.Module):
    """One group of latents: p(z | h) of the state h that comes from above, q(z | h, d) with features d of the data.

    Both Gaussians go through the fused two-Gaussian sample and KL. All modules work on a batch; "cat" is along dim 1.

    Args:
        prior: module from h (B, H, *S) to mean and raw scale (B, 2D, *S), packed along dim 1.
        posterior: module from cat(h, d), for "ladder" from d alone, to (B, 2D, *S).
        merge: module from cat(h, z) to the next level's h; it may change the resolution.
        mode: what the posterior's output is. "residual" (NVAE): what is added to the prior's mean and raw scale, so
            that zeros make the KL zero. "absolute" (VDVAE): mean and raw scale. "ladder": mean and raw scale of a
            Gaussian likelihood of z, multiplied with the prior, so that precisions add.
        scale: what raw scales are, as in functional.gaussian_sample_kl; "soft_tanh" bounds log sigma by 5.

    References:
        Vahdat and Kautz, "NVAE", 2020, arXiv:2007.03898, section 3.2.
        Child, "Very deep VAEs", 2021, arXiv:2011.10650.
        Sonderby et al., "Ladder variational autoencoders", 2016, arXiv:1602.02282.
    """

    def __init__(self, prior, posterior, merge, *, mode="residual", scale="soft_tanh"):
        super().__init__()
        checks.choice("mode", mode, reference.LEVEL_MODES)
        checks.choice("scale", scale, functional.SCALES)
        self.prior, self.posterior, self.merge = prior, posterior, merge
        self.mode, self.scale = mode, scale

    def infer(self, h, d, **options):
        """(z (B, D, *S), kl and log q, each (B,) nats, the LevelParams, next h) for h (B, H, *S) and features d
        (B, F, *S); ``options`` are gaussian_sample_kl's for the noise, and reduce="none" for a kl like z."""
        params = self.gaussians(h, d)
        z, kl, log_q = functional.gaussian_sample_kl(params.posterior, scale=params.scale, return_logq=True,
                                                     prior=(params.mean, params.raw), **options)
        return z, kl, log_q, params, self.down(h, z)

    def gaussians(self, h, d):
        """The LevelParams of q(z | h, d) and p(z | h)."""
        prior = promoted(self.prior(h))
        params = promoted(self.posterior(d if self.mode == "ladder" else torch.cat([h, d], 1)))
        params, prior, scale = reference.level_gaussians(prior, params, self.mode, self.scale)
        return LevelParams(params, *prior, scale)

    def down(self, h, z):
        """The next level's h."""
        return self.merge(torch.cat([h, z.to(h.dtype)], 1))

    def generate(self, h, noise, temperature=1.0):
        """(z, next h) from the prior, its standard deviation times ``temperature``; ``noise`` makes standard normals
        like a tensor."""
        mean, _, log_sigma = self._prior(h)
        z = mean if temperature == 0.0 else mean + temperature * torch.exp(log_sigma) * noise(mean)
        return z, self.down(h, z)

    def _prior(self, h):
        mean, raw = promoted(self.prior(h)).chunk(2, 1)
        return mean, raw, reference.sigma_and_log(raw, self.scale)[1]

    def extra_repr(self):
        return f"mode={self.mode!r}, scale={self.scale!r}"


class LevelParams(NamedTuple):
    """q(z | h, d), packed (B, 2D, *S) or a pair; mean and raw scale (B, D, *S) of p(z | h); what raw scales are."""

    posterior: torch.Tensor | tuple
    mean: torch.Tensor
    raw: torch.Tensor
    scale: str

    def moments(self):
        """(mean, log sigma) of q, each (B, D, *S)."""
        mean, raw = self.posterior if isinstance(self.posterior, tuple) else self.posterior.chunk(2, 1)
        return mean, reference.sigma_and_log(raw, self.scale)[1]


def log_priors(latents, priors):
    """log p(z | h), (B,) nats, for the latents (B, D, *S) and the LevelParams of each level. Levels of one shape go
    together: small tensors cost their launches."""
    alike, found = {}, [None] * len(latents)
    for index, (z, prior) in enumerate(zip(latents, priors, strict=True)):
        alike.setdefault((z.shape[1:], prior.scale), []).append(index)
    for (_, scale), indices in alike.items():
        z = torch.stack([latents[i] for i in indices])
        mean, raw = (torch.stack([getattr(priors[i], name) for i in indices]) for name in ("mean", "raw"))
        log_p = log_normal(z, mean, reference.sigma_and_log(raw, scale)[1]).flatten(2).sum(2)
        for index, row in zip(indices, log_p.unbind(0), strict=True):
            found[index] = row
    return found
