"""The priors to which a Gaussian posterior's KL has a closed form."""

import torch
from torch.distributions import Independent, LowRankMultivariateNormal, MultivariateNormal, Normal

from fastflow.flows import DiagonalNormal, FullNormal, StandardNormal
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.priors.gaussian import GaussianPrior

__all__ = ["dense_moments", "has_closed_kl", "is_standard", "kl_by_element", "kl_to_dense", "prior_moments"]

DIAGONAL = (GaussianPrior, DiagonalNormal, Normal)
DENSE = (FullNormal, MultivariateNormal, LowRankMultivariateNormal)


def is_standard(prior):
    """Whether the prior is N(0, I)."""
    return prior is None or isinstance(prior, StandardNormal)


def has_closed_kl(prior):
    """Whether the KL from a diagonal Gaussian to the prior has a closed form."""
    return is_standard(prior) or isinstance(_law(prior), DIAGONAL + DENSE)


def prior_moments(prior, like):
    """(mean, log sigma), with one batch or like's, of N(0, I) or another diagonal Gaussian; None for other priors."""
    if is_standard(prior):
        return like.new_zeros(1, like.shape[1]), like.new_zeros(1, like.shape[1])
    law = _law(prior)
    if isinstance(law, GaussianPrior):
        return promoted(law.mean), promoted(law.sigma_and_log()[1])
    if isinstance(law, DiagonalNormal):
        mean, log_sigma = law.loc, law.log_scale
    elif isinstance(law, Normal):
        mean, log_sigma = law.loc, torch.log(law.scale)
    else:
        return None
    return _placed(mean, like.shape[1:])[None], _placed(log_sigma, like.shape[1:])[None]


def dense_moments(prior, like):
    """(mean (*, D), lower triangular factor of the covariance (*, D, D)) of a Gaussian over the last dimension of like;
    None for other priors."""
    law = _law(prior)
    if not isinstance(law, DENSE):
        return None
    return _placed(law.loc, like.shape[1:]), promoted(law.scale_tril)


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


def _placed(moment, event_shape):
    """``moment`` for each element of one z."""
    shape, event_shape = tuple(moment.shape), tuple(event_shape)
    fits = len(shape) <= len(event_shape) and all(
        size in (1, own) for size, own in zip(reversed(shape), reversed(event_shape), strict=False))
    if not fits:
        raise ValueError(f"prior: expected one over {event_shape}, the shape of z, got {shape}")
    return promoted(moment).expand(event_shape)
