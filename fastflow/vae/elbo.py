"""The evidence lower bound, term by term, and its importance-weighted form."""

import math
from typing import NamedTuple

import torch

from fastflow import checks

__all__ = ["ELBO", "Inference", "LossTerms", "iwae"]


class Inference(NamedTuple):
    """What the encoder says of B examples, and K samples for each.

    Attributes:
        params: the encoder's output (B, ...).
        z: (K, B, D, *S).
        log_qz: (K, B) log q(z | x) in nats.
        kl: (B,) KL(q(z | x) || p(z)) in nats where it has a closed form, else None.
    """

    params: torch.Tensor
    z: torch.Tensor
    log_qz: torch.Tensor
    kl: torch.Tensor | None


class ELBO(NamedTuple):
    """The terms of the bound for B examples and K samples each, in nats. Nothing is averaged over the batch.

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

    @property
    def kl_monte_carlo(self):
        """(B,) the mean of log_qz - log_pz over the samples: what kl is where there is no closed form, and elsewhere an
        unbiased estimate of it."""
        return (self.log_qz - self.log_pz).mean(0)

    @property
    def value(self):
        """(B,) what training maximises."""
        return self.elbo

    @property
    def parts(self):
        """{name: tensor} of further terms in ``value``: none."""
        return {}

    def in_bits(self):
        """The same terms in bits."""
        return ELBO(*(term / math.log(2.0) for term in self))

    def bits_per_dim(self, size, n_bins=1):
        """(distortion + rate) / size in bits, (B,), beta left out.

        Args:
            size: elements of one x, or its shape.
            n_bins: for images dequantised as x / n_bins + const, the number of levels, which counts the change of
                units; 1 for likelihoods of integers or bits.
        """
        size = math.prod(size) if hasattr(size, "__iter__") else checks.count("size", size, 1)
        return (self.distortion + self.rate + size * math.log(n_bins)) / (size * math.log(2.0))


class LossTerms(NamedTuple):
    """What training needs of the bound, where the KL has a closed form; nats, nothing averaged over the batch.

    Attributes:
        distortion: (B,) minus the mean of log p(x | z) over the samples.
        rate: (B,) KL(q(z | x) || p(z)).
        beta: weight of the rate in ``value``.
    """

    distortion: torch.Tensor
    rate: torch.Tensor
    beta: float

    @property
    def value(self):
        """(B,) what training maximises."""
        return -self.distortion - self.beta * self.rate


def check_beta(beta, like, dim=-1):
    """The weight of the rate is a number, a 0-d tensor or one for each of the B examples, which ``like`` counts along
    ``dim``: (B,), float64 if ``like`` is and else not.

    Raises:
        TypeError, ValueError: it is not.
    """
    if type(beta) in (float, int):
        return
    if not isinstance(beta, torch.Tensor):
        checks.number("beta", beta)
    elif beta.dim() == 0:
        if beta.device.type != "cpu":  # from where it counts as a number
            checks.same_device("beta", beta, "x", like)
    elif beta.dim() > 1 or beta.shape[0] != like.shape[dim]:
        raise ValueError(f"beta: expected a number or shape () or ({like.shape[dim]},), got {tuple(beta.shape)}")
    else:
        checks.same_device("beta", beta, "x", like)
        checks.goes_with("beta", beta, "the rate", like)


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
