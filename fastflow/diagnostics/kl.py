"""The KL of every single latent, for each kind of VAE."""

import math

import torch

from fastflow import checks
from fastflow.diagnostics.latents import has_moments, latents_and_kl
from fastflow.vae import DiscreteVAE, HierarchicalVAE, QuantizedVAE

__all__ = ["kl_per_latent"]


@torch.no_grad()
def kl_per_latent(model, x, context=None, *, batch_size=1024, generator=None):
    """Mean over x (N, *event) of the KL of each latent between posterior and prior, (D,) nats; None where the posterior
    has no such terms. They sum to the mean rate. The model runs in the mode (train or eval) that it is in. What counts
    as one latent:

    ====================================  ==========================================================================
    VAE with a GaussianPosterior          a dimension of the flattened z; against N(0, 1), for which the sum is no
                                          longer the rate, where the prior is no diagonal Gaussian. None where z is
                                          moved after it was drawn, as a HamiltonianVAE's
    DiscreteVAE                           a bit or class, given the bits before it under a BitPrior
    HierarchicalVAE                       a dimension of a level's z given the levels above, the top level's first
    QuantizedVAE                          a position of the map of codes: -log p(c_t | c_<t), for q is certain
    ====================================  ==========================================================================

    Args:
        context: (N, ...) for a conditional model.
        batch_size: examples that go through the encoder at a time.
        generator: of the samples of a hierarchy, or of bits under a BitPrior, or None.
    """
    checks.tensor("x", x, floating=False)
    if len(x) < 1:
        raise ValueError("x: expected at least one example, got none")
    batch_size = checks.count("batch_size", batch_size, 1)
    if has_moments(model):
        return latents_and_kl(model, x, context, batch_size=batch_size)[2].mean(0)
    if isinstance(model, HierarchicalVAE):
        def of(batch):
            return torch.cat([kl.flatten(1) for kl in model.latent_kl(batch, generator=generator)], 1)
    elif isinstance(model, QuantizedVAE):
        def of(batch):
            return -model.code_log_probs(model.codes(batch))
    elif isinstance(model, DiscreteVAE):
        def of(batch):
            return discrete_kl(model, model.posterior(batch), generator=generator)
    else:
        return None
    return torch.cat([of(batch) for batch in x.split(batch_size)]).mean(0)


def discrete_kl(model, q, *, generator=None):
    """KL (B, sites) in nats of each bit or class of a DiscreteVAE's posteriors q to its prior; under a BitPrior that of
    each bit given those before it, at one draw of them."""
    prior = model.prior()
    return site_kl(q, prior if model.bit_prior is None else prior.given(q.sample(generator=generator)[0]))


def site_kl(q, p):
    """KL (B, sites) in nats of each element of q (B rows) to that of p (one row or B), estimators.Bernoulli or
    Categorical: sum_c q_c (log q_c - log p_c) + p_c - q_c, whose terms are not negative."""
    log_q, log_p = q.table().double(), p.table().double()
    ratio = torch.where(log_q == -math.inf, 0.0, log_q - log_p)  # of a class that q never has nothing counts but p_c
    return (log_q.exp() * ratio + log_p.exp() - log_q.exp()).clamp_min(0.0).sum(2)
