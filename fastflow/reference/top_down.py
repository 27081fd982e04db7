"""The top-down pass of a hierarchy of latents with small networks, in eager PyTorch."""

import math
from dataclasses import dataclass

import torch

from fastflow import reference

__all__ = ["LEVEL_MODES", "LatentLevel", "MLPBlock", "level_gaussians", "normal_log_prob", "top_down"]

LEVEL_MODES = ("residual", "absolute", "ladder")


@dataclass(eq=False)
class MLPBlock:
    """A fully connected network; with ``residual`` its first inputs, as many as it has outputs, are added.

    Args:
        weights: the (out, in) matrices, first to last.
        biases: the (out,) biases.
        activation: between the layers: "relu", "silu" or "tanh".
    """

    weights: tuple
    biases: tuple
    activation: str = "silu"
    residual: bool = False

    @property
    def parameters(self):
        """weight and bias of every layer, in turn."""
        return tuple(t for pair in zip(self.weights, self.biases, strict=True) for t in pair)

    def __call__(self, x):
        y = reference.mlp(x, self.weights, self.biases, activation=self.activation)
        return x[:, :y.shape[1]] + y if self.residual else y


@dataclass(eq=False)
class LatentLevel:
    """D latents of a hierarchy, under a state h (B, H) from above and features d (B, F) of the data.

    Args:
        prior: MLPBlock from h to (B, 2D), mean and raw scale.
        posterior: MLPBlock from cat(h, d), for "ladder" from d alone, to (B, 2D).
        merge: MLPBlock from cat(h, z) to the next level's h.
        mode: what the posterior's outputs are, see :func:`level_gaussians`.
        scale: what raw scales are, as in functional.gaussian_sample_kl.
    """

    prior: MLPBlock
    posterior: MLPBlock
    merge: MLPBlock
    mode: str = "residual"
    scale: str = "soft_tanh"

    @property
    def networks(self):
        """(prior, posterior, merge)."""
        return self.prior, self.posterior, self.merge


def level_gaussians(prior, params, mode, scale):
    """(mean and raw of the posterior packed or as a pair, mean and raw of the prior, their scale) as
    gaussian_sample_kl takes them, of what two networks return, each (B, 2D, *S).

    mode: "residual": params are added to the prior's mean and raw scale. "absolute": they are the posterior's.
    "ladder": mean and raw scale of a Gaussian likelihood of z, which is multiplied with the prior: precisions add.
    """
    mean_p, raw_p = prior.chunk(2, 1)
    if mode == "residual":
        return prior + params, (mean_p, raw_p), scale
    if mode == "absolute":
        return params, (mean_p, raw_p), scale
    mean, raw = params.chunk(2, 1)
    log_sigma, log_sigma_p = (reference.sigma_and_log(r, scale)[1] for r in (raw, raw_p))
    raw = -0.5 * torch.logaddexp(-2.0 * log_sigma, -2.0 * log_sigma_p)
    mean = mean * torch.exp(2.0 * (raw - log_sigma)) + mean_p * torch.exp(2.0 * (raw - log_sigma_p))
    return (mean, raw), (mean_p, log_sigma_p), "logstd"


def normal_log_prob(z, mean, log_sigma):
    """log N(z; mean, sigma^2) of each element, in nats."""
    return -0.5 * (((z - mean) * torch.exp(-log_sigma)).square() + math.log(2.0 * math.pi)) - log_sigma


def top_down(h, features, levels, *, eps=None, seed=None, offset=0, generator=None):
    """The levels one after the other; see functional.top_down."""
    latents, terms = [], []
    if eps is None and seed is None:
        seed = reference.draw_seed(h.device, generator)
    with reference.full_precision(h.device.type):
        for index, (level, d) in enumerate(zip(levels, features, strict=True)):
            params = level.posterior(d if level.mode == "ladder" else torch.cat([h, d], 1))
            params, prior, scale = level_gaussians(level.prior(h), params, level.mode, level.scale)
            noise = {"seed": seed, "offset": offset} if eps is None else {"eps": eps[index]}
            z, kl, log_q = reference.gaussian_sample_kl(params, scale=scale, prior=prior, return_logq=True, **noise)
            offset += -(-z.numel() // 4)  # four normals come of one counter
            log_p = normal_log_prob(z, prior[0], reference.sigma_and_log(prior[1], scale)[1]).sum(1)
            latents.append(z)
            terms.append((kl, log_q, log_p))
            h = level.merge(torch.cat([h, z], 1))
    return (h, latents, *(torch.stack(t) for t in zip(*terms, strict=True)))
