"""What diagonal Gaussian posteriors do with their latents: rates, active units, the aggregate posterior, information.

The aggregate posterior of a data set is the mixture q(z) = 1/N sum_n q(z | x_n). The mean rate is what the latents know
of x plus how far that mixture is from the prior: E KL(q(z|x) || p) = I(x; z) + KL(q(z) || p).
"""

import math
from typing import NamedTuple

import torch

from fastflow import checks
from fastflow.draws import drawn
from fastflow.vae import VAE
from fastflow.vae.model import draws_from_posterior
from fastflow.vae.penalties import decompose_kl
from fastflow.vae.posteriors.closed import is_standard, kl_by_element, prior_moments
from fastflow.vae.posteriors.gaussian import log_normal

__all__ = ["InformationTerms", "active_units", "aggregate_log_prob", "dimension_kl", "draw_error", "information",
           "information_terms", "marginal_kl", "minibatch_information", "posterior_moments"]

CHUNK = 2**22  # numbers in the largest table at a time


class InformationTerms(NamedTuple):
    """The rate in two, 0-d tensors in nats, with the standard errors of their Monte-Carlo estimates.

    All are of the data set as it is, whose aggregate posterior is known: the errors are those of drawing z alone, not
    of having drawn the examples from a population.

    Attributes:
        kl: E log q(z|x) - log p(z), the sum of the next two to rounding.
        mutual_information: I(x; z), at most log N.
        aggregate_kl: KL(q(z) || p(z)).
        mutual_information_error, aggregate_kl_error, kl_error: standard errors, see :func:`draw_error`.
    """

    kl: torch.Tensor
    mutual_information: torch.Tensor
    aggregate_kl: torch.Tensor
    mutual_information_error: torch.Tensor
    aggregate_kl_error: torch.Tensor
    kl_error: torch.Tensor


def has_moments(model):
    """Whether the model's z are draws of diagonal Gaussians, by which nothing moves them afterwards."""
    return hasattr(getattr(model, "posterior", None), "moments") and (
        not isinstance(model, VAE) or draws_from_posterior(model))


def params_of(model, x, context=None):
    """The params of the posterior of x, of a VAE or a model like one."""
    if isinstance(model, VAE):
        return model._encoded(x, context)
    return model.encoder(x) if context is None else model.encoder(x, context)


def check_bound(model):
    """The model has an ELBO."""
    if not hasattr(model, "elbo"):
        raise TypeError(f"model: expected one with elbo, as those of fastflow.vae, got {type(model).__name__}")


def check_moments(model):
    """The model is one of those."""
    if not has_moments(model):
        raise TypeError(f"model: expected a VAE with a GaussianPosterior whose draws nothing moves, got a "
                        f"{type(model).__name__} with {type(getattr(model, 'posterior', None)).__name__}")


@torch.no_grad()
def posterior_moments(model, x, context=None, *, batch_size=1024):
    """(mean, log sigma), each (N, D) with the latent's shape flattened, of q(z | x) for x (N, *event).

    Args:
        context: (N, ...) for a conditional model.
        batch_size: examples that go through the encoder at a time.

    Raises:
        TypeError: the model's posterior is no diagonal Gaussian, or z is moved after it was drawn from it.
    """
    return latents_and_kl(model, x, context, batch_size=batch_size)[:2]


@torch.no_grad()
def latents_and_kl(model, x, context=None, *, batch_size=1024):
    """(mean, log sigma, KL), each (N, D) as of :func:`posterior_moments`, the KL that of :func:`kl_to_prior`."""
    checks.tensor("x", x, floating=False)
    if len(x) < 1:
        raise ValueError("x: expected at least one example, got none")
    batch_size = checks.count("batch_size", batch_size, 1)
    check_moments(model)
    parts = []
    for i in range(0, len(x), batch_size):
        some = slice(i, i + batch_size)
        given = None if context is None else context[some]
        mean, log_sigma = model.posterior.moments(params_of(model, x[some], given))
        prior = model.prior.given(given) if hasattr(model.prior, "given") else model.prior
        parts.append((mean.flatten(1), log_sigma.flatten(1), kl_to_prior(mean, log_sigma, prior)))
    return tuple(torch.cat(t) for t in zip(*parts, strict=True))


def kl_to_prior(mean, log_sigma, prior):
    """KL (B, D) in nats of each latent of posteriors (B, D, *S), flattened, to its prior: any diagonal Gaussian, those
    of a context among them, of which ``prior`` is the one for these; N(0, 1) in the place of any other prior."""
    moments = None if is_standard(prior) else prior_moments(prior, mean)
    if moments is None:
        moments = mean.new_zeros(()), mean.new_zeros(())
    return kl_by_element(mean, log_sigma, *moments).flatten(1)


def dimension_kl(mean, log_sigma, prior=None):
    """KL(q(z_d | x) || p(z_d)) (N, D) in nats, never negative, of posteriors with mean and log sigma (N, D).

    Args:
        prior: None for N(0, I), or a GaussianPrior.
    """
    return kl_by_element(mean, log_sigma, *_prior(prior, mean, log_sigma))


def active_units(mean, threshold=0.01):
    """(D,) bool: whether the variance over the data of the posterior's mean (N, D) exceeds ``threshold``.

    References:
        Burda et al., "Importance weighted autoencoders", 2016, arXiv:1509.00519, section 5.
    """
    checks.tensor("mean", mean)
    if mean.dim() != 2 or len(mean) < 2:
        raise ValueError(f"mean: expected shape (N, D) with N >= 2, got {tuple(mean.shape)}")
    return mean.var(0, correction=1) > threshold


def aggregate_log_prob(z, mean, log_sigma):
    """log 1/N sum_n q(z | x_n) (M,) in nats at z (M, D): exact for the data set behind mean and log_sigma (N, D)."""
    _check_moments(mean, log_sigma)
    checks.tensor("z", z)
    checks.shape("z", z, (len(z), mean.shape[1]))
    rows = max(1, CHUNK // max(1, mean.numel()))
    parts = [torch.logsumexp(log_normal(part[:, None], mean, log_sigma).sum(2), 1) for part in z.split(rows)]
    return torch.cat(parts) - math.log(len(mean))


@torch.no_grad()
def information(mean, log_sigma, prior=None, *, n_samples=1, log_prior=None, generator=None):
    """InformationTerms over a whole data set: the aggregate posterior is exact, the expectation over z is sampled.

    Args:
        mean, log_sigma: (N, D).
        prior: None for N(0, I), or a GaussianPrior.
        n_samples: draws of z for each example; from 2 on the errors are no longer upper bounds.
        log_prior: function from z (M, D) to log p(z) (M,), for any other prior.
        generator: torch.Generator or None.
    """
    _check_moments(mean, log_sigma)
    checks.rng(generator)
    n_samples = checks.count("n_samples", n_samples, 1)
    if log_prior is None:
        mean_p, log_sigma_p = _prior(prior, mean, log_sigma)

        def log_prior(z):
            return log_normal(z, mean_p, log_sigma_p).sum(1)
    z = mean + torch.exp(log_sigma) * drawn(torch.randn, (n_samples, *mean.shape), mean, generator)
    own = log_normal(z, mean, log_sigma).sum(2)
    flat = z.flatten(0, 1)
    marginal, target = (t.unflatten(0, own.shape) for t in (aggregate_log_prob(flat, mean, log_sigma), log_prior(flat)))
    return information_terms(own - marginal, marginal - target, draw_error)


def minibatch_information(z, mean, log_sigma, log_pz, dataset_size, method="stratified"):
    """InformationTerms from one batch of a larger data set, with gradients: for training curves.

    log q(z) is that of an estimate of q(z), and so biased low (Jensen): the mutual information is overestimated and
    the aggregate KL underestimated, "weighted" by far more than "stratified". :func:`information` has no such bias.
    The errors are those of the batch as a sample of the data set, from the spread over its examples; of that bias and
    of what the examples share through the estimate of q(z) they know nothing.

    Args:
        z: (K, B, D). mean, log_sigma: (B, D). log_pz: (K, B).
        dataset_size: N.
        method: "stratified" or "weighted", see vae.penalties.minibatch_weights.
    """
    terms = decompose_kl(z, mean, log_sigma, log_pz, dataset_size, method)
    return information_terms(terms.mutual_information, terms.total_correlation + terms.dimension_kl, sample_error)


@torch.no_grad()
def marginal_kl(mean, log_sigma, n_points=2001):
    """KL(q(z_d) || N(0, 1)) (D,) in nats of each latent's aggregate posterior, by the trapezoidal rule.

    A latent of large mean KL and a marginal KL near 0 is well used; both near 0: collapsed. Posteriors narrower than
    the grid's step, the range of z over n_points, need more points.
    """
    _check_moments(mean, log_sigma)
    if n_points < 3:
        raise ValueError(f"n_points: expected at least 3, got {n_points!r}")
    mean, log_sigma = mean.double(), log_sigma.double()
    reach = 9.0 * torch.exp(log_sigma)
    low, high = (mean - reach).amin(0), (mean + reach).amax(0)
    result = []
    for d in range(mean.shape[1]):
        z = torch.linspace(low[d].item(), high[d].item(), n_points, dtype=torch.float64, device=mean.device)[:, None]
        log_q = aggregate_log_prob(z, mean[:, d:d + 1], log_sigma[:, d:d + 1])
        ratio = log_q + 0.5 * z[:, 0].square() + 0.5 * math.log(2.0 * math.pi)
        result.append(torch.trapezoid(torch.exp(log_q) * ratio, z[:, 0]))
    return torch.stack(result)


def information_terms(mutual, aggregate, error):
    """InformationTerms of (K, N) each; ``error`` makes a standard error of the mean of such values."""
    kl = mutual + aggregate
    return InformationTerms(kl.mean(), mutual.mean(), aggregate.mean(), error(mutual), error(aggregate), error(kl))


def draw_error(values):
    """The standard error of the mean of values (K, N), K independent draws for each of N examples that are fixed:
    sqrt(mean_n s_n^2 / (K N)), s_n^2 the variance of one example's draws. A single draw doesn't show its own variance:
    with K = 1 the spread over the examples stands in, which holds what they differ by as well, an upper bound."""
    return (values.var(0).mean() / values.numel()).sqrt() if len(values) > 1 else sample_error(values)


def sample_error(values):
    """The standard error of the mean of values (K, N) whose N examples are a sample: the spread of their means."""
    per_example = values.mean(0)
    return per_example.std() / math.sqrt(len(per_example))


def _check_moments(mean, log_sigma):
    checks.tensor("mean", mean)
    checks.tensor("log_sigma", log_sigma)
    if mean.dim() != 2 or len(mean) < 1:
        raise ValueError(f"mean: expected shape (N, D) with N >= 1, got {tuple(mean.shape)}")
    checks.shape("log_sigma", log_sigma, mean.shape)
    checks.no_mixed_double([("mean", mean), ("log_sigma", log_sigma)])


def _prior(prior, mean, log_sigma):
    _check_moments(mean, log_sigma)
    moments = prior_moments(prior, mean)
    if moments is None:
        raise TypeError(f"prior: expected None or a GaussianPrior, got {type(prior).__name__}")
    return [t.flatten(1) for t in moments]
