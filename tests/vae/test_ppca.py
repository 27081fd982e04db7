"""The ELBO on random instances of probabilistic PCA, where evidence, posterior, bound and gradients are closed."""

import math

import numpy as np
import pytest
import torch
from gaussian_models import PPCA, SIZES, perturb, randn, sigma_points
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from fastflow import vae

INSTANCES = [PPCA(*sizes, seed=seed) for seed, sizes in enumerate(SIZES)]


def model_of(problem, constants, posterior, **options):
    likelihood = vae.GaussianLikelihood(math.sqrt(problem.s2))
    return vae.VAE(problem.encoder(constants), problem.decoder(), posterior, likelihood=likelihood, **options)


@pytest.mark.parametrize("problem", INSTANCES, ids=str)
@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_at_the_true_posterior_the_bound_is_the_evidence(problem, kl):
    """Every importance weight is log p(x) for any noise; with the analytic KL the ELBO is, in expectation."""
    model = model_of(problem, problem.full_constants(), vae.FullGaussianPosterior())
    noise = {"eps": sigma_points(problem.latent, 4)} if kl == "analytic" else {"seed": 3}
    bound = model.elbo(problem.x, 2 * problem.latent, kl=kl, **noise)
    expected = problem.log_p()
    torch.testing.assert_close(bound.log_w, expected.expand_as(bound.log_w), rtol=0, atol=1e-11)
    torch.testing.assert_close(bound.elbo, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    torch.testing.assert_close(vae.iwae(bound.log_w), expected, rtol=0, atol=1e-11)


def full(problem):
    return model_of(problem, problem.full_constants(), vae.FullGaussianPosterior())


def low_rank(problem):
    """A 2-by-2 covariance as diagonal plus rank one."""
    (a, b), (_, d) = problem.covariance
    t = (b.abs() * (a / d).sqrt()).sqrt()
    factor = torch.stack([t, b / t])
    variances = problem.covariance.diagonal() - factor.square()
    return model_of(problem, torch.cat([variances.log(), factor]), vae.LowRankGaussianPosterior(1))


def householder(problem):
    """The covariance's axes by one reflection of two latents."""
    posterior = vae.FlowPosterior.householder(2, 1).double()
    model = model_of(problem, problem.covariance.diagonal().log(), posterior)
    values, vectors = torch.linalg.eigh(problem.covariance)
    if torch.det(vectors) > 0:  # a reflection
        vectors = vectors * torch.tensor([1.0, -1.0], dtype=torch.float64)
    v = torch.linalg.eigh(torch.eye(2, dtype=torch.float64) - vectors).eigenvectors[:, 1]  # vectors = I - 2 v v'
    with torch.no_grad():
        posterior.transform.vectors.start.copy_(v)
        model.encoder.weight[:2] = vectors.T @ model.encoder.weight[:2]
        model.encoder.bias[:2] = vectors.T @ model.encoder.bias[:2]
        model.encoder.bias[2:] = values.log()
    return model


AT_THE_POSTERIOR = [(full, problem) for problem in INSTANCES] + [(low_rank, INSTANCES[0]), (householder, INSTANCES[0])]


@pytest.mark.parametrize(("make", "problem"), AT_THE_POSTERIOR, ids=lambda part: getattr(part, "__name__", str(part)))
def test_gradients_without_the_score_are_zero_at_the_true_posterior(make, problem):
    """Every weight is the evidence there; sticking the landing and the doubly reparameterised gradient are zero for
    every sample, which the plain gradient, that has the score, is not."""
    model = make(problem)
    log_w = model.elbo(problem.x, 5, kl="monte_carlo", seed=1).log_w
    torch.testing.assert_close(log_w, problem.log_p().expand(5, -1), rtol=0, atol=1e-10)
    own = [*model.encoder.parameters(), *model.posterior.parameters()]

    def largest(bound):
        return max(g.abs().max().item() for g in torch.autograd.grad(bound.sum(), own))

    assert largest(vae.stl(model, problem.x, 5, seed=1)) < 1e-12
    assert largest(vae.dreg(model, problem.x, 5, seed=1)) < 1e-12
    assert largest(log_w.mean(0)) > 0.1


def posteriors(d):
    return {"low-rank": vae.LowRankGaussianPosterior(1), "full": vae.FullGaussianPosterior(),
            "mixture": vae.MixturePosterior(2), "iaf": vae.FlowPosterior.iaf(d, hidden=(8,), context_features=2),
            "coupling": vae.FlowPosterior.coupling(d, hidden=(8,)), "planar": vae.FlowPosterior.planar(d),
            "householder": vae.FlowPosterior.householder(d)}


@pytest.mark.parametrize("problem", INSTANCES, ids=str)
@pytest.mark.parametrize("name", posteriors(2))
def test_gradients_of_every_posterior_leave_out_the_score(name, problem):
    """Away from the true posterior: STL's is the plain gradient less that of -log q at fixed z; DReG's comes through z
    alone, by squared weights. Decoder and all."""
    torch.manual_seed(0)
    posterior = perturb(posteriors(problem.latent)[name].double(), 0.2)
    encoder = torch.nn.Linear(len(problem.b), posterior.n_params(problem.latent)).double()
    likelihood = vae.GaussianLikelihood(math.sqrt(problem.s2))
    model = vae.VAE(encoder, problem.decoder(), posterior, likelihood=likelihood, latent_shape=(problem.latent,))
    k, own, decoder = 3, [*encoder.parameters(), *posterior.parameters()], list(model.decoder.parameters())
    log_w = model.elbo(problem.x, k, kl="monte_carlo", seed=1).log_w
    params = encoder(problem.x)
    z = posterior(params, None, k, seed=1)[0]
    score = posterior.log_prob(params, z.detach())

    def gradients(value, parameters):
        found = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    stl, dreg = vae.stl(model, problem.x, k, seed=1), vae.dreg(model, problem.x, k, seed=1)
    torch.testing.assert_close(stl, log_w.mean(0))
    torch.testing.assert_close(dreg, vae.iwae(log_w))
    wanted = [a + b for a, b in zip(gradients(log_w.mean(0), own), gradients(score.mean(0), own), strict=True)]
    torch.testing.assert_close(gradients(stl, own), wanted, rtol=1e-8, atol=1e-8)
    assert max(g.abs().max() for g in gradients(score.mean(0), own)) > 1e-3
    weights = torch.softmax(log_w.detach(), 0)
    wanted = [a + b for a, b in zip(gradients(weights**2 * log_w, own), gradients(weights**2 * score, own),
                                    strict=True)]
    torch.testing.assert_close(gradients(dreg, own), wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradients(stl, decoder), gradients(log_w.mean(0), decoder), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gradients(dreg, decoder), gradients(vae.iwae(log_w), decoder), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("problem", INSTANCES, ids=str)
def test_gap_of_a_diagonal_posterior_is_its_kl(problem):
    """For the best one and for any other; the best has the posterior's mean and the precision's diagonal."""
    d = problem.latent
    best = -problem.precision.diagonal().log()
    gaps = []
    for shift in (0.0, 0.3, -0.4):
        model = model_of(problem, best + shift, "gaussian")
        bound = model.elbo(problem.x, 2 * d, eps=sigma_points(d, 4))
        mean, log_variance = model.encoder(problem.x).detach().chunk(2, 1)
        q = MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
        gap = kl_divergence(q, problem.posterior())
        torch.testing.assert_close(problem.log_p() - bound.elbo, gap, rtol=0, atol=1e-11)
        # Both KLs under sigma points: log q - log p(z) is quadratic too.
        torch.testing.assert_close(bound.kl_monte_carlo, bound.kl, rtol=0, atol=1e-11)
        gaps.append(gap.mean())
    assert gaps[0] < min(gaps[1:]) and gaps[0] > 1e-4
    torch.testing.assert_close(gaps[0], 0.5 * (problem.precision.diagonal().log().sum()
                                               + problem.covariance.logdet()))


@pytest.mark.parametrize("problem", INSTANCES, ids=str)
def test_gradients_are_those_of_the_closed_form(problem):
    """log p(x) - KL(q || posterior), differentiated through W, b, sigma and the encoder."""
    d = problem.latent
    model = vae.VAE(problem.encoder(randn(d, seed=9)), problem.decoder(), likelihood=vae.GaussianLikelihood().double())
    parameters = list(model.parameters())
    model.elbo(problem.x, 2 * d, eps=sigma_points(d, 4)).elbo.sum().backward()

    w, b, s2 = model.decoder.weight, model.decoder.bias, torch.exp(2.0 * model.likelihood.log_sigma)
    eye = torch.eye(d, dtype=torch.float64)
    precision = eye + w.T @ w / s2
    mean, log_variance = model.encoder(problem.x).chunk(2, 1)
    evidence = MultivariateNormal(b, w @ w.T + s2 * torch.eye(len(b), dtype=torch.float64)).log_prob(problem.x)
    posterior = MultivariateNormal((problem.x - b) @ torch.linalg.solve(precision, w.T / s2).T,
                                   precision_matrix=precision)
    closed = evidence - kl_divergence(MultivariateNormal(mean, torch.diag_embed(log_variance.exp())), posterior)
    expected = torch.autograd.grad(closed.sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("problem", INSTANCES, ids=str)
def test_iwae_rises_with_k_and_stays_below_the_evidence(problem):
    n = 3000
    model = model_of(problem, 0.8 - problem.precision.diagonal().log(), "gaussian")
    log_w = model.elbo(problem.x[:1].expand(n, -1), 64, seed=0).log_w
    bounds = [vae.iwae(log_w[:k]) for k in (1, 2, 8, 64)]
    evidence = problem.log_p()[0]
    for bound, following in zip(bounds, bounds[1:], strict=False):
        rise = following - bound
        assert rise.mean() > 4 * rise.std() / math.sqrt(n)
    for bound in bounds:
        assert bound.mean() <= evidence + 4 * bound.std() / math.sqrt(n)
    assert evidence - bounds[-1].mean() < 0.1 * (evidence - bounds[0].mean())


@pytest.mark.parametrize("deviations", [
    (1.8, 0.6, 0.4), (2.0, 1.4, 0.7, 0.5), pytest.param((2.4, 1.7, 1.2, 0.5, 0.4, 0.3), marks=pytest.mark.slow)],
                         ids=lambda deviations: f"{len(deviations)}-{len(deviations) // 2}")
@pytest.mark.parametrize("posterior", ["gaussian", "full"])
def test_training_reaches_the_maximum_likelihood(posterior, deviations):
    """From random weights, by L-BFGS on sigma points: sigma^2 is the mean of the eigenvalues left out, W W' + sigma^2
    has the others, and the bound is the evidence of the data (Tipping and Bishop, 1999)."""
    n, size, d = 16, len(deviations), len(deviations) // 2
    x = randn(n, size, seed=0) @ torch.diag(torch.tensor(deviations, dtype=torch.float64))
    x = x @ torch.linalg.qr(randn(size, size, seed=1)).Q + randn(size, seed=2)
    torch.manual_seed(0)
    n_params = d + (d if posterior == "gaussian" else d * (d + 1) // 2)
    encoder, decoder = torch.nn.Linear(size, n_params), torch.nn.Linear(d, size)
    model = vae.VAE(encoder, decoder, posterior, likelihood="gaussian").double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, max_eval=800, tolerance_grad=1e-9,
                                  tolerance_change=1e-14, history_size=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.elbo(x, 2 * d, eps=sigma_points(d, n)).elbo.mean()
        loss.backward()
        return loss

    for _ in range(3):  # with its memory anew, where rounding has stopped it short
        optimizer.step(closure)
        optimizer.state.clear()
    covariance = torch.cov(x.T, correction=0)
    values = torch.linalg.eigvalsh(covariance)
    noise = values[:size - d].mean()
    best = -0.5 * (size * math.log(2 * math.pi) + values[size - d:].log().sum() + (size - d) * noise.log() + size)
    assert abs(-closure() - best) < 1e-8
    torch.testing.assert_close(torch.exp(2 * model.likelihood.log_sigma[0]), noise, rtol=1e-3, atol=0)
    w = model.decoder.weight
    found = torch.linalg.eigvalsh(w @ w.T + noise * torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(found, torch.cat([noise.expand(size - d), values[size - d:]]), rtol=1e-3, atol=0)


def test_sampling_the_mode_overstates_the_reconstruction():
    """By tr(W S W')/(2 s2) exactly: why the mean is not a sample."""
    problem = INSTANCES[1]
    variances = 1.0 / problem.precision.diagonal()
    model = model_of(problem, variances.log(), "gaussian")
    sampled = model.elbo(problem.x, 2 * problem.latent, eps=sigma_points(problem.latent, 4))
    mode = model.elbo(problem.x, eps=torch.zeros(1, 4, problem.latent, dtype=torch.float64))
    expected = (problem.w.square() @ variances).sum() / (2 * problem.s2)
    torch.testing.assert_close(sampled.distortion - mode.distortion, expected.expand(4))


def test_k_samples_are_the_mean_of_k_runs():
    """With the same noise; and the variance falls as 1/K."""
    problem = INSTANCES[0]
    model = model_of(problem, problem.covariance.diagonal().log(), "gaussian")
    eps = randn(64, 4, problem.latent, seed=1)
    together = model.elbo(problem.x, 64, eps=eps).elbo
    alone = torch.stack([model.elbo(problem.x, eps=e[None]).elbo for e in eps])
    torch.testing.assert_close(together, alone.mean(0))
    x = problem.x[:1].expand(4000, -1)
    variances = [model.elbo(x, k, seed=k).distortion.var() for k in (1, 4, 16)]
    for first, second in zip(variances, variances[1:], strict=False):
        assert 0.8 < first / (4 * second) < 1.25


def test_units_and_bits():
    problem = INSTANCES[0]
    bound = model_of(problem, problem.covariance.diagonal().log(), "gaussian").elbo(problem.x, 3, beta=0.1)
    torch.testing.assert_close(bound.in_bits().rate * math.log(2), bound.rate)
    torch.testing.assert_close(bound.bits_per_dim(3), (bound.distortion + bound.rate) / (3 * math.log(2)))
    torch.testing.assert_close(bound.bits_per_dim((1, 3), n_bins=256), bound.bits_per_dim(np.int64(3)) + 8.0)
    with pytest.raises(ValueError, match="^size"):
        bound.bits_per_dim(0)
    assert bound.value is bound.elbo and bound.parts == {}


def test_kl_is_analytic_or_said_not_to_be():
    problem = INSTANCES[0]
    constants = problem.covariance.diagonal().log()
    model = model_of(problem, constants, "gaussian", prior=vae.MixturePrior(2, 3).double())
    with pytest.raises(ValueError, match="closed form"):
        model.elbo(problem.x, kl="analytic")
    with pytest.raises(ValueError, match="kl"):
        model.elbo(problem.x, kl="exact")
    bound = model.elbo(problem.x, 5)
    torch.testing.assert_close(bound.kl, bound.kl_monte_carlo)


@pytest.mark.parametrize("scale", ["logvar", "logstd", "std", "softplus", "soft_tanh"])
def test_kl_agrees_with_torch_over_a_grid(scale):
    """Of every pair of Gaussians, to N(0, I) and to a learned prior; zero where they are equal, else positive."""
    raw = randn(500, 3, seed=1)
    params = torch.cat([2 * randn(500, 3, seed=0), raw.abs() + 0.1 if scale == "std" else raw], 1)
    prior = vae.GaussianPrior((3,), scale).double()
    with torch.no_grad():
        prior.mean.copy_(randn(1, 3, seed=2))
        prior.raw.add_(0.3)
    posterior = vae.GaussianPosterior(scale)
    mean, log_sigma = posterior.moments(params)
    q = Independent(Normal(mean, log_sigma.exp()), 1)
    standard = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    learned = Independent(Normal(prior.mean.expand_as(mean), prior.sigma_and_log()[0].expand_as(mean)), 1)
    for p, expected in ((None, standard), (prior, learned)):
        kl = posterior(params, p)[2]
        torch.testing.assert_close(kl, kl_divergence(q, expected), rtol=1e-10, atol=1e-10)
        assert (kl > 0).all()
    same = torch.cat([prior.mean, prior.raw], 1).detach()
    assert posterior(same, prior)[2].abs() < 1e-14
