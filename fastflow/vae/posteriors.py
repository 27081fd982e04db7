"""Approximate posteriors q(z | x) from an encoder's output.

A posterior is called as posterior(params, prior, n_samples, eps=, seed=, generator=) and returns z (K, B, D, *S),
log q(z | x) (K, B) and the KL to the prior (B,), or None for it where there is no closed form; mean(params) is
(B, D, *S).
"""

import torch
from torch import nn

from fastflow import functional, reference
from fastflow.flows import StandardNormal
from fastflow.nn import GaussianSample
from fastflow.vae.priors import GaussianPrior

__all__ = ["GaussianPosterior"]


class GaussianPosterior(nn.Module):
    """A diagonal Gaussian; params are (B, 2D, *S), mean and raw scale packed along dim 1.

    Args:
        scale: what the raw scale is: "logvar", "logstd", "std", "softplus" or "soft_tanh".
        layout, order: how params are packed, as in functional.gaussian_sample_kl.
    """

    def __init__(self, scale="logvar", *, layout="chunk", order="mean_scale"):
        super().__init__()
        GaussianSample(scale, layout=layout, order=order)  # checks the options
        self.scale = scale
        self.layout = layout
        self.order = order

    def forward(self, params, prior=None, n_samples=1, *, eps=None, seed=None, generator=None):
        params = params.to(torch.promote_types(params.dtype, torch.float32))
        gaussian = isinstance(prior, GaussianPrior)
        if gaussian and prior.scale != self.scale:
            raise ValueError(f"prior: expected scale {self.scale!r} like the posterior's, got {prior.scale!r}")
        z, kl, log_qz = functional.gaussian_sample_kl(
            params, scale=self.scale, layout=self.layout, order=self.order, eps=eps, seed=seed, generator=generator,
            prior=(prior.mean, prior.raw) if gaussian else None, n_samples=n_samples, return_logq=True)
        closed = prior is None or gaussian or isinstance(prior, StandardNormal)
        return z, log_qz, kl if closed else None

    def mean(self, params):
        """The mean (B, D, *S), also the mode."""
        return reference.split_params(params, self.layout, self.order == "mean_scale")[0]
