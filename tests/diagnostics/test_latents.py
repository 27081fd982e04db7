"""Rates, active units and the aggregate posterior, against quadrature and models whose answer is known."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastflow import diagnostics, estimators, vae
from tests.gaussian_models import linear, randn


def mixture(n=6, d=1, seed=0):
    return 1.2 * randn(n, d, seed=seed), 0.4 * randn(n, d, seed=seed + 1) - 0.7


def quadrature(mean, log_sigma):
    """(E KL(q(z|x)||p), I, KL(q(z)||p)) of one-dimensional posteriors, each integral on its own."""
    z = torch.linspace(-12.0, 12.0, 20001, dtype=torch.float64)[:, None]
    each = Normal(mean[:, 0], log_sigma.exp()[:, 0]).log_prob(z)  # (Z, N)
    whole = torch.logsumexp(each, 1) - math.log(len(mean))
    prior = Normal(0.0, 1.0).log_prob(z[:, 0])

    def kl(log_a, log_b):
        return torch.trapezoid(log_a.exp() * (log_a - log_b), z[:, 0])

    rate = torch.stack([kl(each[:, n], prior) for n in range(len(mean))]).mean()
    mutual = torch.stack([kl(each[:, n], whole) for n in range(len(mean))]).mean()
    return rate, mutual, kl(whole, prior)


@pytest.mark.parametrize(("n", "seed"), [(6, 0), (2, 10), (25, 20)])
def test_rate_is_information_plus_aggregate_kl(n, seed):
    mean, log_sigma = mixture(n, seed=seed)
    rate, mutual, aggregate = quadrature(mean, log_sigma)
    torch.testing.assert_close(rate, mutual + aggregate, rtol=0, atol=1e-11)
    torch.testing.assert_close(diagnostics.dimension_kl(mean, log_sigma).mean(), rate, rtol=0, atol=1e-11)
    torch.testing.assert_close(diagnostics.marginal_kl(mean, log_sigma)[0], aggregate, rtol=0, atol=1e-9)
    found = diagnostics.information(mean, log_sigma, n_samples=120_000 // n,
                                    generator=torch.Generator().manual_seed(1))
    assert abs(found.mutual_information - mutual) < 4 * found.mutual_information_error < 0.02
    assert abs(found.aggregate_kl - aggregate) < 4 * found.aggregate_kl_error < 0.02
    assert abs(found.kl - rate) < 4 * found.kl_error
    # The prior in the place of the aggregate posterior is a mistake that this bound sees.
    assert abs(rate - mutual) > 0.1


def repeated(make, n=400):
    """(spread of n estimates, root mean square of their own errors), each (3,): information, aggregate KL and KL."""
    # Not the seeds of the posteriors themselves, whose noise would be their means.
    found = [make(torch.Generator().manual_seed(1000 + seed)) for seed in range(n)]
    values = torch.stack([torch.stack([f.mutual_information, f.aggregate_kl, f.kl]) for f in found])
    errors = torch.stack([torch.stack([f.mutual_information_error, f.aggregate_kl_error, f.kl_error]) for f in found])
    return values.std(0), errors.square().mean(0).sqrt()


@pytest.mark.parametrize(("n", "d", "k"), [(6, 1, 50), (40, 3, 2), (80, 2, 4)])
def test_standard_errors_are_the_spread_of_repeated_draws(n, d, k):
    mean, log_sigma = mixture(n, d)
    spread, error = repeated(lambda g: diagnostics.information(mean, log_sigma, n_samples=k, generator=g))
    # The standard deviation of 400 values is known to 1 in sqrt(2 * 400).
    assert ((spread / error - 1).abs() < 4 / math.sqrt(800)).all(), spread / error
    q, p = estimators.Bernoulli(randn(n, d, seed=3)), estimators.Bernoulli(randn(1, d, seed=4))
    spread, error = repeated(lambda g: diagnostics.discrete_information(q, p, n_samples=k, generator=g))
    assert ((spread / error - 1).abs() < 4 / math.sqrt(800)).all(), spread / error


def test_the_error_of_one_draw_is_an_upper_bound():
    mean, log_sigma = mixture(40, 2)
    spread, error = repeated(lambda g: diagnostics.information(mean, log_sigma, generator=g))
    assert (spread < error).all() and (error < 3 * spread).all()


def test_errors_of_a_batch_are_those_of_drawing_it():
    """At K large, where what is left is which examples the batch has."""
    mean, log_sigma = mixture(400, 1)

    def batch(generator):
        chosen = torch.randperm(400, generator=generator)[:40]
        m, s = mean[chosen], log_sigma[chosen]
        z = m + s.exp() * torch.randn(30, *m.shape, generator=generator, dtype=m.dtype)
        return diagnostics.minibatch_information(z, m, s, Normal(0.0, 1.0).log_prob(z).sum(2), 400)

    spread, error = repeated(batch, 200)
    assert (error < 2 * spread).all() and (spread < 2 * error).all(), spread / error


def test_information_of_separate_and_of_equal_posteriors():
    generator = torch.Generator().manual_seed(0)
    mean = torch.arange(5, dtype=torch.float64)[:, None] * 100.0
    separate = diagnostics.information(mean, torch.zeros_like(mean), generator=generator)
    assert separate.mutual_information.item() == pytest.approx(math.log(5), abs=1e-12)
    equal = diagnostics.information(torch.full_like(mean, 0.5), torch.zeros_like(mean), generator=generator)
    assert equal.mutual_information.item() == pytest.approx(0.0, abs=1e-12)


def test_aggregate_density_is_the_mixtures(monkeypatch):
    mean, log_sigma = mixture(7, 3)
    z = randn(11, 3, seed=9)
    expected = torch.stack([Normal(m, s.exp()).log_prob(z).sum(1) for m, s in zip(mean, log_sigma, strict=True)])
    expected = expected.exp().mean(0).log()
    torch.testing.assert_close(diagnostics.aggregate_log_prob(z, mean, log_sigma), expected)
    monkeypatch.setattr("fastflow.diagnostics.latents.CHUNK", 50)
    torch.testing.assert_close(diagnostics.aggregate_log_prob(z, mean, log_sigma), expected)


def test_minibatch_estimates_bound_the_exact_ones():
    """From batches of 16 of 64, both estimates overrate the information; the weighted one is off by far more."""
    mean, log_sigma = mixture(64, 2)
    generator = torch.Generator().manual_seed(0)
    exact = diagnostics.information(mean, log_sigma, n_samples=200, generator=generator)
    means = {}
    for method in ("stratified", "weighted"):
        total = []
        for _ in range(200):
            chosen = torch.randperm(64, generator=generator)[:16]
            m, s = mean[chosen], log_sigma[chosen]
            z = m + s.exp() * torch.randn(1, *m.shape, generator=generator, dtype=m.dtype)
            terms = diagnostics.minibatch_information(z, m, s, Normal(0.0, 1.0).log_prob(z).sum(2), 64, method)
            torch.testing.assert_close(terms.kl, terms.mutual_information + terms.aggregate_kl)
            total.append(terms.mutual_information)
        means[method] = torch.stack(total).mean().item()
    gap = {name: value - exact.mutual_information.item() for name, value in means.items()}
    assert 0.0 < gap["stratified"] < 0.3 < 1.0 < gap["weighted"]


def test_dimension_kl_is_the_closed_form_to_any_prior():
    mean, log_sigma = mixture(8, 3)
    prior = vae.GaussianPrior((3,)).double()
    with torch.no_grad():
        prior.mean.copy_(randn(1, 3, seed=4))
        prior.raw.copy_(randn(1, 3, seed=5))
    q = Normal(mean, log_sigma.exp())
    torch.testing.assert_close(diagnostics.dimension_kl(mean, log_sigma), kl_divergence(q, Normal(0.0, 1.0)))
    torch.testing.assert_close(diagnostics.dimension_kl(mean, log_sigma, prior),
                               kl_divergence(q, Normal(prior.mean, (0.5 * prior.raw).exp())))
    tiny = diagnostics.dimension_kl(torch.zeros(100, 1), 1e-5 * torch.randn(100, 1))
    assert (tiny >= 0).all()


def test_active_units_of_a_known_encoder():
    """Latent 0 follows x, latent 1 follows it too little, latent 2 is far from the prior and constant."""
    weight = torch.tensor([[1.0], [0.05], [0.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 3.0, -2.0, -2.0, -2.0], dtype=torch.float64)
    model = vae.VAE(linear(weight, bias), linear(torch.ones(1, 3, dtype=torch.float64), torch.zeros(1).double()),
                    likelihood="gaussian")
    x = randn(500, 1, seed=0)
    mean, log_sigma = diagnostics.posterior_moments(model, x, batch_size=64)
    assert mean.shape == (500, 3)
    torch.testing.assert_close(log_sigma, torch.full_like(mean, -1.0))
    assert diagnostics.active_units(mean).tolist() == [True, False, False]
    assert diagnostics.dimension_kl(mean, log_sigma).mean(0)[2] > 1.0  # a large KL is no activity


def test_bad_input_is_named():
    mean = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="^log_sigma: expected shape"):
        diagnostics.information(mean, torch.zeros(3, 1))
    with pytest.raises(ValueError, match="^mean: expected shape"):
        diagnostics.active_units(mean[:1])
    with pytest.raises(ValueError, match="^z: expected shape"):
        diagnostics.aggregate_log_prob(torch.zeros(3, 3), mean, mean)
    with pytest.raises(ValueError, match="^n_samples"):
        diagnostics.information(mean, mean, n_samples=0)
    with pytest.raises(ValueError, match="^batch_size"):
        diagnostics.posterior_moments(vae.MLPVAE((4,), 2, (4,)), torch.zeros(3, 4), batch_size=-1)
    with pytest.raises(TypeError, match="^log_sigma: expected float64 like mean"):
        diagnostics.dimension_kl(mean.double(), mean)
    with pytest.raises(TypeError, match="^generator: "):
        diagnostics.information(mean, mean, generator=3)
    with pytest.raises(TypeError, match="^prior: "):
        diagnostics.dimension_kl(mean, mean, vae.MixturePrior((2,)))
    with pytest.raises(TypeError, match="^model: expected a VAE with a GaussianPosterior"):
        diagnostics.posterior_moments(vae.MLPVAE((4,), 2, (4,), posterior="full"), torch.zeros(3, 4))
