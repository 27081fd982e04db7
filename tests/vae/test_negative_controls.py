"""Mistakes that VAE libraries have shipped: the closed forms reject each of them, and accept the right code.

A check takes the piece of code in question and says whether it passes.
"""

import itertools
import math

import pytest
import torch
from gaussian_models import PPCA, sigma_points

from fastflow import functional, vae
from fastflow.vae.penalties import minibatch_weights

PROBLEM = PPCA(3, 2, seed=1)


def diagonal_model(shift=0.8):
    problem = PROBLEM
    return vae.VAE(problem.encoder(shift - problem.precision.diagonal().log()), problem.decoder(),
                   likelihood=vae.GaussianLikelihood(math.sqrt(problem.s2)))


def iwae_is_a_bound_that_rises(bound):
    """bound(log_w (K, N)) -> (N,): rises with K, never above log p(x) by 4 standard errors, and comes near it."""
    n, evidence = 4000, PROBLEM.log_p()[0]
    log_w = diagonal_model().elbo(PROBLEM.x[:1].expand(n, -1), 64, seed=0).log_w.detach()
    values = [bound(log_w[:k]) for k in (1, 8, 64)]
    errors = [v.std() / math.sqrt(n) for v in values]
    rises = all(b.mean() > a.mean() for a, b in zip(values, values[1:], strict=False))
    below = all(v.mean() <= evidence + 4 * e for v, e in zip(values, errors, strict=True))
    return bool(rises and below and evidence - values[-1].mean() < 0.05)


@pytest.mark.parametrize(("bound", "right"), [
    (vae.iwae, True),
    (lambda log_w: -vae.iwae(-log_w), False),  # the worst sample gets the largest weight
    (lambda log_w: (torch.softmax(-log_w, 0) * log_w).sum(0), False),
    (lambda log_w: (torch.softmax(log_w, 0) * log_w).sum(0), False),  # the gradient's surrogate, reported as the value
    (lambda log_w: torch.logsumexp(log_w, 0), False),  # log K left out
], ids=["right", "sign", "sign surrogate", "surrogate as value", "log K"])
def test_importance_weighted_bound(bound, right):
    assert iwae_is_a_bound_that_rises(bound) is right


def weights_are_the_evidence(log_q=None, log_px_z=None):
    """At a true posterior that is diagonal every log-weight is log p(x)."""
    problem = PPCA(4, 2, seed=0)
    problem.w = torch.linalg.qr(problem.w).Q * torch.tensor([2.0, 0.7], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    problem.precision = eye + problem.w.T @ problem.w / problem.s2
    problem.gain = torch.linalg.solve(problem.precision, problem.w.T / problem.s2)
    log_variance = -problem.precision.diagonal().log()
    likelihood = vae.GaussianLikelihood(math.sqrt(problem.s2))
    if log_px_z is not None:
        likelihood.log_prob = lambda x, output: log_px_z(x, output, problem.s2)
    model = vae.VAE(problem.encoder(log_variance), problem.decoder(), likelihood=likelihood)
    bound, z = model.elbo(problem.x, 5, seed=0), model.infer(problem.x, 5, seed=0).z
    found = bound.log_qz if log_q is None else log_q(z, (problem.x - problem.b) @ problem.gain.T, log_variance)
    log_w = bound.log_px_z + bound.log_pz - found
    return bool(torch.allclose(log_w, problem.log_p().expand_as(log_w), rtol=0, atol=1e-10))


def log_normal(z, mean, scale):
    return torch.distributions.Normal(mean, scale).log_prob(z).sum(2)


@pytest.mark.parametrize(("log_q", "right"), [
    (None, True),
    (lambda z, mean, lv: log_normal(z, mean, torch.exp(0.5 * lv)), True),
    (lambda z, mean, lv: log_normal(z, mean, torch.exp(lv)), False),  # the variance for the scale
    (lambda z, mean, lv: -0.5 * (((z - mean) / lv).square() + lv + math.log(2 * math.pi)).sum(2), False),  # by log-var
], ids=["fused", "right", "variance as scale", "eps by log-variance"])
def test_posterior_density(log_q, right):
    assert weights_are_the_evidence(log_q=log_q) is right


def gaussian(x, output, s2, reduce=torch.sum, constant=True):
    each = -0.5 * (x - output).square() / s2 - (0.5 * math.log(2 * math.pi * s2) if constant else 0.0)
    return reduce(each, -1)


@pytest.mark.parametrize(("log_px_z", "right"), [
    (gaussian, True),
    (lambda x, output, s2: gaussian(x, output, s2, torch.mean), False),
    (lambda x, output, s2: gaussian(x, output, s2, constant=False), False),
], ids=["right", "mean over the event", "no constant"])
def test_reconstruction_term(log_px_z, right):
    assert weights_are_the_evidence(log_px_z=log_px_z) is right


def decoder_gradient_is_the_evidences(weigh):
    """At the true posterior the K-sample objective's gradient in the decoder is that of log p(x) (Fisher's identity),
    on sigma points to rounding. weigh(log_w) -> weights (K, B) of the samples' gradients."""
    problem = PROBLEM
    model = vae.VAE(problem.encoder(problem.full_constants()), problem.decoder(), vae.FullGaussianPosterior(),
                    likelihood=vae.GaussianLikelihood(math.sqrt(problem.s2)))
    bound = model.elbo(problem.x, 4, eps=sigma_points(2, 4))
    got, = torch.autograd.grad((weigh(bound.log_w).detach() * bound.log_px_z).sum(), model.decoder.weight)
    w = problem.w.clone().requires_grad_()
    covariance = w @ w.T + problem.s2 * torch.eye(3, dtype=torch.float64)
    evidence = torch.distributions.MultivariateNormal(problem.b, covariance).log_prob(problem.x)
    expected, = torch.autograd.grad(evidence.sum(), w)
    return bool(torch.allclose(got, expected, rtol=0, atol=1e-10))


@pytest.mark.parametrize(("weigh", "right"), [
    (lambda log_w: torch.softmax(log_w, 0), True),
    (lambda log_w: torch.softmax(log_w, 0).square(), False),  # the encoder's weights of DReG for the decoder too
], ids=["right", "squared weights for the decoder"])
def test_decoder_gradient(weigh, right):
    assert decoder_gradient_is_the_evidences(weigh) is right


def aggregate_is_unbiased(weights):
    """weights(batch, dataset_size): over every choice of the other examples sum_j w_ij q(z | x_j) averages to q(z)."""
    n, batch = 5, 3
    q = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # q(z | x_n) at one z
    w = weights(batch, n)
    exact = True
    for row in range(batch):
        for own in range(n):
            estimates = []
            for others in itertools.permutations([i for i in range(n) if i != own], batch - 1):
                members = [*others[:row], own, *others[row:]]
                estimates.append(w[row] @ q[list(members)])
            exact = exact and bool((torch.stack(estimates).mean() - q.mean()).abs() < 1e-12)
    return exact


def row_strided(batch, dataset_size):
    """1/N down a column in place of the diagonal, by a stride of one row less."""
    n, m = dataset_size, batch - 1
    w = torch.full((batch, batch), 1.0 / m, dtype=torch.float64)
    w.view(-1)[::m + 1] = 1.0 / n
    w.view(-1)[1::m + 1] = (n - m) / (n * m)
    w[m - 1, 0] = (n - m) / (n * m)
    return w


@pytest.mark.parametrize(("weights", "right"), [
    (minibatch_weights, True), (row_strided, False),
    (lambda b, n: minibatch_weights(b, n, "weighted"), False),
], ids=["right", "row-strided", "weighted"])
def test_stratified_weights(weights, right):
    assert aggregate_is_unbiased(weights) is right


def kl_is_one_number_for_each_example(kl):
    """kl(mean, logvar) of video latents (B, C, T, H, W) is (B,), the sum of 1-D KLs."""
    params = torch.randn(2, 8, 3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, log_variance = params.chunk(2, 1)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, torch.exp(0.5 * log_variance)),
                                                 torch.distributions.Normal(0.0, 1.0))
    got = kl(mean, log_variance)
    return got.shape == (2,) and bool(torch.allclose(got, torch.stack([e.sum() for e in expected])))


@pytest.mark.parametrize(("kl", "right"), [
    (lambda m, lv: functional.gaussian_sample_kl((m, lv))[1], True),
    (lambda m, lv: vae.GaussianPosterior()(torch.cat([m, lv], 1))[2], True),
    (lambda m, lv: 0.5 * (m.square() + torch.expm1(lv) - lv).sum([1, 2, 3]), False),  # three dimensions, whatever comes
    (lambda m, lv: (m.square() + torch.expm1(lv) - lv).flatten(1).sum(1), False),  # no factor 1/2
], ids=["fused", "posterior", "three dimensions", "no half"])
def test_kl_of_video_latents(kl, right):
    assert kl_is_one_number_for_each_example(kl) is right
