"""Reparameterised Gaussian samples and their KL divergence as a layer."""

from torch import nn

from fastflow import checks, functional

__all__ = ["GaussianSample"]


class GaussianSample(nn.Module):
    """``layer(params) -> (z, kl)``: functional.gaussian_sample_kl with its options fixed at construction.

    Args:
        scale: what the encoder's raw scale is: "logvar", "logstd", "std", "softplus" or "soft_tanh".
        layout: "chunk" or "interleave", how params are packed along dim 1.
        order: "mean_scale" or "scale_mean", what comes first in params.
        n_samples: K for z (K, B, D, *S), or None for z like the mean.
        reduce: "sample" for kl (B,), "channel" for (B, D), "none" for kl like the mean.
        return_logq: also return log q(z | x).
    """

    def __init__(self, scale="logvar", *, layout="chunk", order="mean_scale", n_samples=None, reduce="sample",
                 return_logq=False):
        super().__init__()
        checks.choice("scale", scale, functional.SCALES)
        checks.choice("layout", layout, functional.LAYOUTS)
        checks.choice("order", order, ("mean_scale", "scale_mean"))
        checks.choice("reduce", reduce, functional.REDUCTIONS)
        self.scale = scale
        self.layout = layout
        self.order = order
        self.n_samples = None if n_samples is None else checks.count("n_samples", n_samples)
        self.reduce = reduce
        self.return_logq = return_logq

    def forward(self, params, *, prior=None, eps=None, seed=None, offset=0, generator=None):
        """(z, kl) or (z, kl, logq) of params (B, 2D, *S) or a pair (mean, raw); the rest as in the function."""
        return functional.gaussian_sample_kl(
            params, scale=self.scale, layout=self.layout, order=self.order, prior=prior, eps=eps, seed=seed,
            offset=offset, generator=generator, n_samples=self.n_samples, reduce=self.reduce,
            return_logq=self.return_logq)

    def extra_repr(self):
        return (f"scale={self.scale!r}, layout={self.layout!r}, order={self.order!r}, n_samples={self.n_samples}, "
                f"reduce={self.reduce!r}, return_logq={self.return_logq}")
