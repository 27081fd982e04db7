"""The priors to which a Gaussian posterior's KL has a closed form."""

import math

import torch
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from fastflow.flows import DiagonalNormal, FullNormal, StandardNormal
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.priors.gaussian import DiagonalGaussian

__all__ = ["dense_moments", "has_closed_kl", "is_diagonal", "is_standard", "kl_by_element", "kl_to_dense",
           "misplaced", "prior_moments"]

DIAGONAL = (DiagonalGaussian, DiagonalNormal, Normal)
DENSE = (FullNormal, MultivariateNormal, LowRankMultivariateNormal)


def is_standard(prior):
    """Whether the prior is N(0, I)."""
    return prior is None or isinstance(prior, StandardNormal)


def is_diagonal(prior):
    """Whether the prior is a Gaussian whose elements are independent."""
    return is_standard(prior) or isinstance(_law(prior), DIAGONAL)


def has_closed_kl(prior):
    """Whether the KL from a diagonal Gaussian to the prior has a closed form."""
    return is_diagonal(prior) or isinstance(_law(prior), DENSE)


def prior_moments(prior, like):
    """(mean, log sigma), with one batch or like's, of N(0, I) or another diagonal Gaussian; None for other priors."""
    if is_standard(prior):
        return like.new_zeros(1, like.shape[1]), like.new_zeros(1, like.shape[1])
    law, event = _law(prior), like.shape[1:]
    if isinstance(law, DiagonalGaussian):
        if math.prod(law.event_shape) != math.prod(event):
            raise misplaced(law.event_shape, event)
        return promoted(law.mean), promoted(law.sigma_and_log()[1])
    if isinstance(law, DiagonalNormal):
        mean, log_sigma, shape = law.loc, law.log_scale, law.event_shape
    elif isinstance(law, Normal):
        mean, log_sigma, shape = law.loc, torch.log(law.scale), law.batch_shape
    else:
        return None
    if shape not in (event, torch.Size()):  # a law of one number is that of every element
        raise misplaced(shape, event)
    return promoted(mean).expand(1, *event), promoted(log_sigma).expand(1, *event)


def dense_moments(prior, like):
    """(mean (*, D), lower triangular factor of the covariance (*, D, D)) of a Gaussian over the last dimension of like;
    None for other priors."""
    law = _law(prior)
    if not isinstance(law, DENSE):
        return None
    shape, event = tuple(law.loc.shape), tuple(like.shape[1:])
    fits = len(shape) <= len(event) and all(
        size in (1, own) for size, own in zip(reversed(shape[:-1]), reversed(event[:-1]), strict=False))
    if not fits or shape[-1:] != event[-1:]:
        raise misplaced(shape, event)
    return promoted(law.loc).expand(event), promoted(law.scale_tril)


def kl_by_element(mean, log_sigma, prior_mean, prior_log_sigma):
    """KL(N(mean, sigma^2) || N(prior_mean, prior_sigma^2)) in nats, element by element, never negative."""
    difference = 2.0 * (log_sigma - prior_log_sigma)
    squares = ((mean - prior_mean) * torch.exp(-prior_log_sigma)).square()
    return 0.5 * (squares + (torch.expm1(difference) - difference).clamp_min(0.0))


def kl_to_dense(mean, root, half_log_det, prior_mean, prior_lower):
    """(B,) nats from N(mean, root root'), mean (B, *, D) and root (B, *, D, R), to the Gaussian that
    :func:`dense_moments` gives; ``half_log_det`` (B,) is log det(root root') / 2."""
    columns = torch.cat([(mean - prior_mean)[..., None], root], -1)
    columns, prior_lower = (t.to(torch.promote_types(columns.dtype, prior_lower.dtype)) for t in (columns, prior_lower))
    whitened = torch.linalg.solve_triangular(prior_lower, columns, upper=False).flatten(1)
    log_diagonal = torch.log(prior_lower.diagonal(dim1=-2, dim2=-1)).expand(mean.shape).flatten(1)
    return 0.5 * (whitened.square().sum(1) - log_diagonal.shape[1]) + log_diagonal.sum(1) - half_log_det


def _law(prior):
    """The distribution itself: how many of its dimensions make an event does not matter to the sum."""
    while isinstance(prior, Independent):
        prior = prior.base_dist
    return prior


def misplaced(shape, event):
    """The error of a prior over ``shape`` where z has the shape ``event``."""
    return ValueError(f"prior: expected one over {tuple(event)}, the shape of z, got {tuple(shape)}")
