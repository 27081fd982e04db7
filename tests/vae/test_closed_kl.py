"""The KL of Gaussian posteriors to Gaussian priors of every kind, against torch's closed forms in float64."""

import pytest
import torch
from gaussian_models import perturb, randn
from torch import nn
from torch.distributions import (
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Uniform,
    kl_divergence,
)

from fastflow import flows, vae

D = 3
POSTERIORS = [vae.GaussianPosterior(), vae.LowRankGaussianPosterior(2), vae.FullGaussianPosterior()]
LOC, SCALE = randn(D, seed=7), 0.5 * randn(D, seed=8).exp()
ROOT = torch.tril(randn(D, D, seed=9), -1) + torch.diag(SCALE)


def params_of(posterior):
    return 0.7 * randn(4, posterior.n_params(D), seed=0)


def law_of(posterior, params):
    """The same Gaussian, by its covariance."""
    mean, spread = params[:, :D], params[:, D:2 * D]
    if isinstance(posterior, vae.FullGaussianPosterior):
        rows, columns = torch.tril_indices(D, D, -1)
        lower = torch.diag_embed(spread.exp()).index_put((torch.arange(4)[:, None], rows, columns), params[:, 2 * D:])
        return MultivariateNormal(mean, scale_tril=lower)
    factor = params[:, 2 * D:].reshape(4, D, (params.shape[1] - 2 * D) // D)
    return MultivariateNormal(mean, torch.diag_embed(spread.exp()) + factor @ factor.mT)


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def normal():
    loc, scale = leaves(LOC, SCALE)
    return Normal(loc, scale), [loc, scale], lambda: (loc, torch.diag(scale))


def scalar():
    loc, scale = leaves(LOC[0], SCALE[0])
    return Normal(loc, scale), [loc, scale], lambda: (loc.expand(D), scale * torch.eye(D, dtype=loc.dtype))


def independent():
    law, given, moments = normal()
    return Independent(law, 1), given, moments


def multivariate():
    loc, lower = leaves(LOC, ROOT)
    return MultivariateNormal(loc, scale_tril=lower), [loc, lower], lambda: (loc, torch.tril(lower))


def low_rank():
    loc, scale = leaves(LOC, SCALE)
    law = LowRankMultivariateNormal(loc, ROOT[:, :1], scale)
    return law, [loc, scale], lambda: (loc, torch.linalg.cholesky(ROOT[:, :1] @ ROOT[:, :1].mT + torch.diag(scale)))


def diagonal():
    law = perturb(flows.DiagonalNormal(D).double())
    return law, list(law.parameters()), lambda: (law.loc, torch.diag(law.log_scale.exp()))


def full():
    law = perturb(flows.FullNormal(D).double())
    return law, [law.loc, law.lower, law.log_diagonal], lambda: (law.loc, law.scale_tril)


def another_scale():
    law = perturb(vae.GaussianPrior(D, "logstd").double())
    return law, list(law.parameters()), lambda: (law.mean[0], torch.diag(law.raw[0].exp()))


@pytest.mark.parametrize("make", [normal, scalar, independent, multivariate, low_rank, diagonal, full, another_scale])
@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda p: type(p).__name__)
def test_kl_and_gradients_are_torchs(posterior, make):
    prior, given, moments = make()
    params = params_of(posterior).requires_grad_()
    loc, lower = moments()
    expected = kl_divergence(law_of(posterior, params), MultivariateNormal(loc, lower @ lower.mT))
    _, _, kl = posterior(params, prior, 2)
    assert kl.dtype == torch.float64
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-10)
    weights = randn(len(kl), seed=3)
    torch.testing.assert_close(torch.autograd.grad((weights * kl).sum(), [params, *given]),
                               torch.autograd.grad((weights * expected).sum(), [params, *given]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("make", [normal, multivariate, full, another_scale])
def test_the_bound_and_training_take_it(make):
    prior = make()[0]
    model = vae.VAE(nn.Linear(4, 2 * D), nn.Linear(D, 4), prior=prior, likelihood="gaussian").double()
    x = randn(5, 4, seed=1)
    bound, terms = model.elbo(x, 3, kl="analytic", seed=1), model(x, 3, loss_only=True, seed=1)
    torch.testing.assert_close(bound.kl, terms.rate)
    torch.testing.assert_close(bound.distortion, terms.distortion)
    many = model.elbo(x[:1].expand(20_000, 4), kl="monte_carlo", seed=2).kl
    assert (many.mean() - bound.kl[0]).abs() < 4 * many.std() / 20_000**0.5


def test_latents_with_positions_and_per_channel_moments():
    posterior, params = vae.GaussianPosterior(), randn(4, 6, 2, 2, seed=1)
    prior = perturb(flows.DiagonalNormal((3, 2, 2), per_channel=True).double())
    mean, log_variance = params.chunk(2, 1)
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(prior.loc, prior.log_scale.exp()))
    torch.testing.assert_close(posterior(params, prior, 1)[2], expected.flatten(1).sum(1))


def test_in_float32_it_is_float32_and_another_law_has_none():
    params = params_of(POSTERIORS[0]).float()
    assert POSTERIORS[0](params, MultivariateNormal(torch.zeros(D), torch.eye(D)), 1)[2].dtype == torch.float32
    assert POSTERIORS[0](params, Uniform(torch.full((D,), -9.0), 9.0), 1)[2] is None
