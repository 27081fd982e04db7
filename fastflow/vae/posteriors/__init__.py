"""Approximate posteriors q(z | x) from an encoder's output.

A posterior is called as posterior(params, prior, n_samples, eps=, seed=, generator=) and returns z (K, B, D, *S),
log q(z | x) (K, B) and the KL to the prior (B,), or None for it where there is no closed form; mean(params) is
(B, D, *S). Those here also have log_prob(params, z) -> (K, B) for any z (K, B, D, *S), and n_params(D), the channels
that params need; those of a diagonal Gaussian have packed(parts), which joins the (mean, raw scale) of an encoder that
gives the two apart.
"""

from fastflow.vae.posteriors.delta import DeltaGaussianPosterior
from fastflow.vae.posteriors.flow import FlowPosterior, HouseholderReflections
from fastflow.vae.posteriors.gaussian import (
    DeterministicPosterior,
    FullGaussianPosterior,
    GaussianPosterior,
    LowRankGaussianPosterior,
)
from fastflow.vae.posteriors.mixture import MixturePosterior

__all__ = ["DeltaGaussianPosterior", "DeterministicPosterior", "FlowPosterior", "FullGaussianPosterior",
           "GaussianPosterior", "HouseholderReflections", "LowRankGaussianPosterior", "MixturePosterior"]
