"""Importance-weighted bounds of log p(x), and the gradient estimators that go with them.

Functions of log_w take the (K, B) log-weights of an ELBO and give (B,) nats. Functions of a model take a VAE or a
HierarchicalVAE and x; what they return has the value of the bound named, and the gradient described. Networks are
called again at the samples drawn, which they must not answer at random (dropout).

In a hierarchy z is the latents of all levels together, and q's gradient runs through every network that q is made of:
where q shares some with p (the states between levels; the prior's, in the modes "residual" and "ladder"), they get p's
gradient and q's, each as described.
"""

import math
from typing import NamedTuple

import torch

from fastflow import checks
from fastflow.estimators.base import forward_mode, with_score
from fastflow.vae.elbo import check_beta, iwae
from fastflow.vae.sampled import sampled

__all__ = ["ciwae", "dreg", "miwae", "piwae", "renyi", "stl"]


def miwae(log_w, groups):
    """The mean of the IWAE bounds of ``groups`` groups of K / groups successive samples; it lies between the K-sample
    ELBO (groups = K) and IWAE (groups = 1).

    References:
        Rainforth et al., "Tighter variational bounds are not necessarily better", 2018, arXiv:1802.04537.
    """
    _check_log_w(log_w)
    check_groups(log_w.shape[0], groups)
    return iwae(log_w.unflatten(0, (groups, log_w.shape[0] // groups)).transpose(0, 1)).mean(0)


def ciwae(log_w, beta):
    """beta times the K-sample ELBO plus 1 - beta times IWAE, of the same reference; beta in [0, 1]."""
    _check_log_w(log_w)
    checks.number("beta", beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta!r}")
    if beta == 0.0 or beta == 1.0:  # a bound of weight 0 counts nothing, even at -inf
        return iwae(log_w) if beta == 0.0 else log_w.mean(0)
    return beta * log_w.mean(0) + (1.0 - beta) * iwae(log_w)


def renyi(log_w, alpha):
    """The variational Renyi bound log(mean of w^(1 - alpha)) / (1 - alpha): IWAE at alpha 0, the K-sample ELBO at 1,
    the largest log-weight at -inf, falling as alpha rises. Below log p(x) in expectation for alpha from 0 on.

    References:
        Li and Turner, "Renyi divergence variational inference", 2016, arXiv:1602.02311.
    """
    _check_log_w(log_w)
    if not isinstance(alpha, (int, float)) or alpha != alpha:  # math.isnan takes no number that a graph leaves open
        raise ValueError(f"alpha: expected a number, got {alpha!r}")
    if abs(alpha) == math.inf:
        return log_w.amax(0) if alpha < 0 else log_w.amin(0)
    power = 1.0 - alpha
    if power == 0.0:
        return log_w.mean(0)
    if abs(power) > 1e-2:
        return iwae(power * log_w) / power
    # Near the ELBO the logarithm of a number near 1 is divided by a small power.
    shift = (log_w.amax(0) if power > 0 else log_w.amin(0)).detach()
    shift = torch.where(shift.isfinite(), shift, 0.0)
    return shift + torch.log1p(torch.expm1(power * (log_w - shift)).mean(0)) / power


def stl(model, x, n_samples=1, *, context=None, eps=None, seed=None, generator=None):
    """The K-sample ELBO with a Monte-Carlo KL, (B,), whose encoder gradient comes through z alone ("sticking the
    landing"): the score of q, zero on average, is left out. Unbiased, and zero for every sample where q is the true
    posterior; far from it its variance may be the higher one.

    Args:
        model: a VAE whose posterior has log_prob(params, z) -> (K, B), as those of posteriors/ have; or a
            HierarchicalVAE, which takes no context.
        x: (B, *event).
        n_samples, context, eps, seed, generator: as in the model's elbo.

    Raises:
        TypeError: the posterior has no log_prob, or the model is another one.

    References:
        Roeder et al., "Sticking the landing", 2017, arXiv:1703.09194.
    """
    return stl_terms(model, x, n_samples, context=context, eps=eps, seed=seed, generator=generator)[0]


def dreg(model, x, n_samples=1, *, context=None, eps=None, seed=None, generator=None):
    """IWAE, (B,), with the doubly reparameterised gradient: the encoder's comes through z alone, each sample weighing
    its squared normalised weight. Unbiased for all parameters; near the true posterior far less noisy than IWAE's
    encoder gradient, far from it more so.

    Decoder, likelihood and prior keep IWAE's own gradient, as in Tucker et al.: the score of a prior's own parameters
    stays what it is, sum_k w_k d log p(z_k) with w_k the normalised weights. Bauer and Mnih reparameterise that too
    (GDReG), which is not done here.

    In a hierarchy the estimator is that of all levels' latents as one z: the score that is left out is that of their
    joint density, which depends on the latents above through each level's mean and scale too; the path keeps those.

    Arguments and errors as for :func:`stl`.

    References:
        Tucker et al., "Doubly reparameterized gradient estimators for Monte Carlo objectives", 2019, arXiv:1810.04152;
        Bauer and Mnih, "Generalized doubly reparameterized gradient estimators", 2021, arXiv:2101.11046.
    """
    return dreg_terms(model, x, n_samples, context=context, eps=eps, seed=seed, generator=generator)[0]


def piwae(model, x, n_samples, groups, *, context=None, eps=None, seed=None, generator=None):
    """IWAE of all samples, (B,), whose gradient in the encoder and the posterior is that of :func:`miwae` with
    ``groups``: partially importance-weighted. The networks of p are called twice, for each gradient once. Arguments as
    for :func:`stl`; any reparameterised posterior will do. In a hierarchy the two gradients are those of a p and a q
    that have networks of their own, added.

    References:
        Rainforth et al., as for :func:`miwae`.
    """
    return piwae_terms(model, x, n_samples, groups=groups, context=context, eps=eps, seed=seed, generator=generator)[0]


class Terms(NamedTuple):
    """log p(x | z), log p(z) and log q(z | x) of the samples that a bound was made of, each (K, B)."""

    log_px_z: torch.Tensor
    log_pz: torch.Tensor
    log_qz: torch.Tensor

    def log_w(self, beta):
        """The log-weights with the rate weighed by beta."""
        check_beta(beta, self.log_qz)
        return self.log_px_z + beta * (self.log_pz - self.log_qz)


def stl_terms(model, x, n_samples, beta=1.0, **noise):
    """(:func:`stl` with the rate weighed by beta, its Terms)."""
    _, terms = _path(model, x, n_samples, **noise)
    return terms.log_w(beta).mean(0), terms


def dreg_terms(model, x, n_samples, beta=1.0, **noise):
    """(:func:`dreg` with the rate weighed by beta inside the weights, its Terms).

    The score that is left out counts beta times: each path weighs its w times (1 - beta) + beta w.
    """
    source, latents = _draw(model, x, n_samples, **noise)
    terms = _terms(source, latents)
    log_w = terms.log_w(beta)
    weights = torch.softmax(log_w.detach(), 0)
    factors = [((1.0 - beta) + beta * weights.to(z.dtype)).reshape(*weights.shape, *[1] * (z.dim() - 2))
               for z in latents]
    if forward_mode():  # which knows no hooks
        terms = _terms(source, [z.detach() + factor * (z - z.detach())
                                for z, factor in zip(latents, factors, strict=True)])
        return iwae(terms.log_w(beta)), terms
    for z, factor in zip(latents, factors, strict=True):
        if z.requires_grad:  # on the way to the encoder alone
            z.register_hook(lambda gradient, factor=factor: gradient * factor)
    return iwae(log_w), terms


def piwae_terms(model, x, n_samples, beta=1.0, *, groups, context=None, **noise):
    """(:func:`piwae` with the rate weighed by beta inside the weights, its Terms)."""
    n_samples = checks.count("n_samples", n_samples, 1)
    check_groups(n_samples, groups)
    source = sampled(model, x, context)
    latents, log_q = source.draw(n_samples, **noise)
    terms = Terms(*source.log_joint([z.detach() for z in latents]), log_q)
    bound = iwae(terms._replace(log_qz=log_q.detach()).log_w(beta))
    if not (forward_mode() or any(z.requires_grad for z in latents)):
        return bound, terms
    encoder = miwae(Terms(*source.fixed_log_joint(latents), log_q).log_w(beta), groups)
    return with_score(bound, encoder), terms


def _draw(model, x, n_samples, context=None, **noise):
    """(what to ask for densities, latents that are nobody else's tensors, to hang hooks on)."""
    n_samples = checks.count("n_samples", n_samples, 1)
    source = sampled(model, x, context)
    latents, _ = source.draw(n_samples, **noise)
    return source, [z.view_as(z) for z in latents]


def _terms(source, latents):
    return Terms(*source.log_joint(latents), source.fixed_log_q(latents))


def _path(model, x, n_samples, **options):
    """(the latents, Terms) that reach what q is made of through the latents alone."""
    source, latents = _draw(model, x, n_samples, **options)
    return latents, _terms(source, latents)


def check_groups(k, groups):
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or k % groups:
        raise ValueError(f"groups: expected a divisor of K = {k}, got {groups!r}")


def _check_log_w(log_w):
    checks.tensor("log_w", log_w)
    if log_w.dim() < 1 or log_w.shape[0] < 1:
        raise ValueError(f"log_w: expected shape (K, B) with K >= 1, got {tuple(log_w.shape)}")
