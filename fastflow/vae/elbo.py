"""The evidence lower bound, term by term, and its importance-weighted form."""

import math
from typing import NamedTuple

import torch

from fastflow import checks

__all__ = ["ELBO", "iwae"]


class ELBO(NamedTuple):
    """The terms of the bound for B examples and K samples each, in nats.

    Attributes:
        log_px_z: (K, B) log p(x | z).
        log_pz: (K, B) log p(z).
        log_qz: (K, B) log q(z | x).
        log_w: (K, B) log_px_z + log_pz - log_qz, whatever beta is.
        kl: (B,) KL(q(z | x) || p(z)), analytic where it has a closed form, else the mean of log_qz - log_pz.
        distortion: (B,) minus the mean of log_px_z over the samples.
        rate: (B,) the same as kl.
        elbo: (B,) -distortion - beta * rate.
    """

    log_px_z: torch.Tensor
    log_pz: torch.Tensor
    log_qz: torch.Tensor
    log_w: torch.Tensor
    kl: torch.Tensor
    distortion: torch.Tensor
    rate: torch.Tensor
    elbo: torch.Tensor


def iwae(log_w):
    """The importance-weighted bound logsumexp over dim 0 of log_w (K, B) minus log K: (B,) nats.

    It rises with K in expectation and never exceeds log p(x) in expectation. Its gradient weighs the samples by their
    normalised weights.

    References:
        Burda et al., "Importance weighted autoencoders", 2016, arXiv:1509.00519.
    """
    checks.tensor("log_w", log_w)
    if log_w.dim() < 1 or log_w.shape[0] < 1:
        raise ValueError(f"log_w: expected shape (K, B) with K >= 1, got {tuple(log_w.shape)}")
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])
