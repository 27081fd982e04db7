"""Likelihoods are normalised and keep every constant."""

import itertools
import math

import pytest
import torch

from fastflow.vae import BernoulliLikelihood, GaussianLikelihood


def test_bernoulli_sums_to_one():
    logits = 4 * torch.randn(1, 6, dtype=torch.float64)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    total = BernoulliLikelihood().log_prob(x, logits.expand(64, 6)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


def test_bernoulli_is_stable():
    logits = torch.tensor([[-200.0], [200.0], [-200.0]], requires_grad=True)
    log_prob = BernoulliLikelihood().log_prob(torch.tensor([[1.0], [1.0], [0.0]]), logits)
    torch.testing.assert_close(log_prob, torch.tensor([-200.0, 0.0, 0.0]))
    log_prob.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0], [0.0], [0.0]]))


@pytest.mark.parametrize("sigma", [0.3, None])
def test_gaussian_integrates_to_one(sigma):
    likelihood = GaussianLikelihood(sigma).double()
    if sigma is None:
        with torch.no_grad():
            likelihood.log_sigma.fill_(0.4)
    axis = torch.linspace(-15, 15, 3001, dtype=torch.float64)[:, None]
    mean = torch.full((1, 1), 0.7, dtype=torch.float64)
    assert abs(likelihood.log_prob(axis, mean.expand(3001, 1)).exp().sum() * 0.01 - 1) < 1e-12


def test_gaussian_optimum_is_the_mean_square():
    likelihood = GaussianLikelihood()
    x, mean = torch.randn(50, 3), torch.randn(50, 3)
    with torch.no_grad():
        likelihood.log_sigma.fill_(0.5 * math.log(((x - mean) ** 2).mean()))
    likelihood.log_prob(x, mean).sum().backward()
    assert abs(likelihood.log_sigma.grad) < 1e-3


@pytest.mark.parametrize("likelihood", [BernoulliLikelihood(), GaussianLikelihood(0.5), GaussianLikelihood()])
def test_samples_and_leading_dimensions(likelihood):
    x, output = torch.randint(0, 2, (3, 2, 4)), torch.randn(5, 3, 2, 4)
    log_prob = likelihood.log_prob(x, output)
    assert log_prob.shape == (5, 3)
    torch.testing.assert_close(log_prob[1], likelihood.log_prob(x, output[1]))
    generator = torch.Generator()
    one = likelihood.sample(output, generator=generator.manual_seed(0))
    assert one.shape == output.shape and torch.equal(one, likelihood.sample(output, generator=generator.manual_seed(0)))
    many = likelihood.sample(output[0, 0].expand(20000, 2, 4)).mean(0)
    torch.testing.assert_close(many, likelihood.mean(output[0, 0]), atol=0.05, rtol=0)
    assert likelihood.log_prob(x, output.bfloat16()).dtype == torch.float32
