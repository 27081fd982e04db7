"""Objectives and penalties against closed forms for Gaussians."""

import itertools
import math

import numpy as np
import pytest
import torch
from gaussian_models import PPCA, linear, perturb, randn
from torch import nn
from torch.distributions import MultivariateNormal, Normal

from fastflow import vae
from fastflow.engine import TrainStep
from fastflow.vae.penalties import minibatch_weights, permute_dims

PROBLEM = PPCA(3, 2)


def model_with(objective=None, **options):
    options.setdefault("likelihood", vae.GaussianLikelihood(0.7))
    return vae.VAE(PROBLEM.encoder(randn(2, seed=3)), PROBLEM.decoder(), objective=objective, **options)


def test_beta_weighs_the_rate_and_warm_up_multiplies_it():
    model = model_with(vae.PenalizedELBO(beta=4.0))
    result = model(PROBLEM.x, n_samples=3, beta=0.5, seed=0)
    torch.testing.assert_close(result.value, -result.distortion - 2.0 * result.rate)
    torch.testing.assert_close(result.bound.log_w, model.elbo(PROBLEM.x, 3, seed=0).log_w)
    assert result.parts == {}


def test_iwae_objective():
    model = model_with(vae.BoundObjective("iwae", 7))
    result = model(PROBLEM.x, seed=0)
    assert result.bound.log_w.shape == (7, 4)
    torch.testing.assert_close(result.value, vae.iwae(result.bound.log_w))
    assert model(PROBLEM.x, n_samples=3, seed=0).bound.log_w.shape == (3, 4)
    free = model(PROBLEM.x, beta=0.0, seed=0)
    torch.testing.assert_close(free.value, vae.iwae(free.bound.log_px_z))


BOUNDS = {"iwae": {}, "miwae": {"groups": 2}, "ciwae": {"beta": 0.3}, "renyi": {"alpha": 0.5}, "stl": {}, "dreg": {},
          "piwae": {"groups": 2}}


def bound_by_hand(model, name, x, eps):
    """What the function of that name gives."""
    function = getattr(vae, name)
    if name in ("stl", "dreg", "piwae"):
        return function(model, x, len(eps), eps=eps, **BOUNDS[name])
    return function(model.elbo(x, len(eps), eps=eps).log_w, **BOUNDS[name])


@pytest.mark.parametrize("prior", [None, "gaussian"])
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("per", ["dim", "group"])
def test_free_bits_stand_in_place_of_the_rate(prior, beta, per):
    """Value and gradients of -distortion - beta * free_bits(KL), with units on both sides of the gate."""
    model = model_with(prior=prior and vae.GaussianPrior((2,)).double())
    inference = model.infer(PROBLEM.x, 2, seed=0)
    mean, log_sigma = model.posterior.moments(inference.params)
    q = Normal(mean, log_sigma.exp())
    p = Normal(torch.zeros(2).double(), torch.ones(2).double()) if prior is None else \
        Normal(model.prior.mean, model.prior.sigma_and_log()[0])
    kl = torch.distributions.kl_divergence(q, p)
    means = kl.mean(0)
    least = means.mean().item() if per == "dim" else 2.0 * means.sum().item()
    assert per == "group" or means.min() < least < means.max()
    expected = model.elbo_of(PROBLEM.x, inference).distortion + beta * vae.free_bits(kl, least, per)
    gradients = torch.autograd.grad(expected.mean(), list(model.parameters()), allow_unused=True)
    model.objective = vae.PenalizedELBO(vae.FreeBits(least, per))
    result = model(PROBLEM.x, 2, beta, seed=0)
    torch.testing.assert_close(result.value, -expected)
    torch.testing.assert_close(result.parts["free_bits"], vae.free_bits(kl, least, per).mean())
    own = torch.autograd.grad(-result.value.mean(), list(model.parameters()), allow_unused=True)
    for a, b in zip(own, gradients, strict=True):
        torch.testing.assert_close(torch.zeros(()).double() if a is None else a,
                                   torch.zeros_like(a) if b is None and a is not None else b, atol=1e-12, rtol=1e-9)


def test_capacity_draws_the_rate_to_its_target():
    target = vae.LinearSchedule(0.0, 4.0, 2)
    model = model_with(vae.PenalizedELBO(vae.Capacity(target, 7.0)))
    for aim in (0.0, 2.0, 4.0):
        result = model(PROBLEM.x, beta=0.3, seed=0)
        torch.testing.assert_close(result.value, -result.distortion - 7.0 * (result.rate - aim).abs())
        target.step()


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_train_as_their_functions_do(name):
    """The value, and every gradient: of encoder, decoder and prior, through a training step."""
    model = model_with(vae.BoundObjective(name, 6, **BOUNDS[name]), prior=vae.GaussianPrior((2,)).double())
    eps, before = randn(6, len(PROBLEM.x), 2, seed=1), [p.detach().clone() for p in model.parameters()]
    result = model(PROBLEM.x, eps=eps)
    expected = bound_by_hand(model, name, PROBLEM.x, eps)
    torch.testing.assert_close(result.value, expected)
    bound = model.elbo(PROBLEM.x, 6, eps=eps, kl="monte_carlo" if name in ("stl", "dreg", "piwae") else "auto")
    torch.testing.assert_close([result.rate, result.distortion, result.bound.log_w],
                               [bound.rate, bound.distortion, bound.log_w])
    gradients = torch.autograd.grad(expected.mean(), list(model.parameters()))
    forward = model.forward
    model.forward = lambda x, **options: forward(x, eps=eps, **options)
    TrainStep(model, torch.optim.SGD(model.parameters(), 1.0))(PROBLEM.x)
    for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(p - old, gradient)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_weigh_the_rate_inside_the_weights(name):
    model = model_with(vae.BoundObjective(name, 6, **BOUNDS[name]))
    eps = randn(6, len(PROBLEM.x), 2, seed=1)
    terms = model.elbo(PROBLEM.x, 6, eps=eps)
    log_w = terms.log_px_z + 0.25 * (terms.log_pz - terms.log_qz)
    expected = (log_w.mean(0) if name == "stl" else
                getattr(vae, name)(log_w, **BOUNDS[name]) if name in ("miwae", "ciwae", "renyi") else vae.iwae(log_w))
    result = model(PROBLEM.x, beta=0.25, eps=eps)
    torch.testing.assert_close(result.value, expected)
    torch.testing.assert_close(result.bound.log_w, terms.log_w)  # unweighed, and so is the rate
    torch.testing.assert_close(result.rate, terms.kl if name in ("iwae", "miwae", "ciwae", "renyi") else
                               terms.kl_monte_carlo)


@pytest.mark.parametrize("name", ["stl", "dreg", "piwae"])
def test_estimators_of_a_model_with_a_context(name):
    """The context reaches encoder, prior and decoder: the same as a model that has it in its x."""
    encoder, decoder = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
    x, context, eps = randn(4, 3, seed=1), randn(4, 2, seed=2), randn(6, 4, 2, seed=3)
    model = vae.VAE(vae.Conditioned(encoder), vae.Conditioned(decoder), likelihood=vae.GaussianLikelihood(0.7))
    bound = getattr(vae, name)(model, x, 6, *BOUNDS[name].values(), context=context, eps=eps)
    log_w = model.elbo(x, 6, context=context, eps=eps).log_w
    torch.testing.assert_close(bound, log_w.mean(0) if name == "stl" else vae.iwae(log_w))


# x ~ N(0, Cx), q(z | x) = N(A x, S): aggregate, mutual information and total correlation are closed.
A = torch.tensor([[1.0, 0.2], [0.0, 0.7]], dtype=torch.float64)
CX = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
S = torch.tensor([0.5, 0.25], dtype=torch.float64)
AGGREGATE = A @ CX @ A.T + torch.diag(S)


def test_decomposition_against_the_gaussian_closed_form():
    """Mutual information 1.347556774480, total correlation, and the rest of KL(q(z) || p) 0.157163996360."""
    total_correlation = 0.5 * (AGGREGATE.diagonal().log().sum() - AGGREGATE.logdet())
    information = 0.5 * (AGGREGATE.logdet() - S.log().sum())
    marginal = 0.5 * (AGGREGATE.trace() - 2 - AGGREGATE.logdet())
    assert abs(information - 1.347556774480) < 1e-11 and abs(marginal - 0.157163996360) < 1e-11
    n = 1500
    x = MultivariateNormal(torch.zeros(2, dtype=torch.float64), CX)
    torch.manual_seed(0)
    mean = x.sample((n,)) @ A.T
    log_sigma = 0.5 * S.log().expand(n, 2)
    z = (mean + S.sqrt() * torch.randn(n, 2, dtype=torch.float64))[None]
    log_pz = Normal(0.0, 1.0).log_prob(z).sum(2)
    terms = vae.decompose_kl(z, mean, log_sigma, log_pz, 10**9)
    for found, expected in zip(terms, (information, total_correlation, marginal - total_correlation), strict=True):
        assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(n) + 0.02  # the estimate's bias is O(1/n)
    log_qz = Normal(mean, S.sqrt()).log_prob(z).sum(2)
    torch.testing.assert_close(sum(terms), log_qz - log_pz)  # exactly, for any estimate


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_stratified_weights_average_to_the_aggregate(batch):
    """Over every choice of the other examples, in either density: of z and of each latent."""
    n = 5
    q = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = minibatch_weights(batch, n)
    torch.testing.assert_close(weights.sum(1), torch.ones(batch, dtype=torch.float64))
    assert torch.equal(weights.diagonal(), torch.full((batch,), 1 / n, dtype=torch.float64))
    for row, own in itertools.product(range(batch), range(n)):
        choices = itertools.permutations([i for i in range(n) if i != own], batch - 1)
        found = [weights[row] @ q[[*others[:row], own, *others[row:]]] for others in choices]
        assert abs(torch.stack(found).mean() - q.mean()) < 1e-13


def test_total_correlation_objective():
    """With unit weights the terms telescope to the ELBO with a Monte-Carlo KL."""
    x = PROBLEM.x
    plain = model_with(vae.PenalizedELBO(vae.TotalCorrelation(100, beta=1.0), beta=0.0))
    result = plain(x, n_samples=3, seed=0)
    torch.testing.assert_close(result.value, plain.elbo(x, 3, kl="monte_carlo", seed=0).elbo)
    weighed = vae.PenalizedELBO(vae.TotalCorrelation(100, alpha=0.5, beta=7.0, gamma=2.0), beta=0.0)
    found, inference = weighed(plain, x, 3, seed=0), plain.infer(x, 3, seed=0)
    mean, log_sigma = plain.posterior.moments(inference.params)
    mi, tc, dim = vae.decompose_kl(inference.z, mean, log_sigma, found.bound.log_pz, 100)
    torch.testing.assert_close(found.value, -found.distortion - (0.5 * mi + 7.0 * tc + 2.0 * dim).mean(0))
    torch.testing.assert_close(found.parts["total_correlation"], tc.mean())


def test_dip_penalty():
    """numpy's covariances; zero for whitened means (DIP-I), and for variances that make up the rest (DIP-II)."""
    mean, variance = randn(50, 3, seed=0), randn(50, 3, seed=1).exp()
    c = np.cov(mean.numpy().T, bias=True)
    off = (c**2).sum() - (np.diag(c)**2).sum()
    expected = 5 * off + 10 * ((np.diag(c) - 1)**2).sum()
    torch.testing.assert_close(vae.dip_penalty(mean).item(), expected)
    c2 = np.diag(c) + variance.numpy().mean(0)
    torch.testing.assert_close(vae.dip_penalty(mean, variance, diagonal=2.0, off_diagonal=3.0).item(),
                               3 * off + 2 * ((c2 - 1)**2).sum())
    centred = mean - mean.mean(0)
    white = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.from_numpy(c))).T
    assert vae.dip_penalty(white) < 1e-20 and vae.dip_penalty(0.6 * white, torch.full_like(white, 0.64)) < 1e-20
    for kind in ("i", "ii"):
        model = model_with(vae.PenalizedELBO(vae.DIP(kind)))
        result = model(PROBLEM.x, seed=0)
        m, log_sigma = model.posterior.moments(model.encoder(PROBLEM.x))
        cost = vae.dip_penalty(m, torch.exp(2 * log_sigma) if kind == "ii" else None)
        torch.testing.assert_close(result.value, result.bound.elbo - cost)


def rbf_mean(mean, variance, scale):
    """E exp(-|d|^2 / (2 s^2)) of d ~ N(mean, diag(variance))."""
    total = scale**2 + variance
    return torch.prod((scale**2 / total).sqrt() * torch.exp(-0.5 * mean.square() / total), -1)


def imq_mean(mean, variance, scale):
    """E C / (C + |d|^2) = integral over t > 0 of e^-t E exp(-t |d|^2 / C), Gauss-Laguerre."""
    c = 2 * len(mean) * scale**2
    t, w = (torch.from_numpy(a) for a in np.polynomial.laguerre.laggauss(80))
    return (w * rbf_mean(mean, variance, (c / (2 * t[:, None])).sqrt())).sum()


@pytest.mark.parametrize(("kernel", "scales"), [("rbf", (1.2,)), ("imq", (0.5, 2.0))])
def test_unbiased_mmd_against_the_gaussian_closed_form(kernel, scales):
    """x ~ N(m, v) against y ~ N(0, I): the mean over small samples is the population's; the biased one's is not."""
    mean, variance, n, runs = torch.tensor([0.4, -0.2]).double(), torch.tensor([0.5, 1.3]).double(), 6, 1500
    expectation = rbf_mean if kernel == "rbf" else imq_mean
    zero, one = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    exact = sum(expectation(zero, 2 * variance, s) + expectation(zero, 2 * one, s)
                - 2 * expectation(mean, variance + one, s) for s in scales) / len(scales)
    noise = randn(runs, 2, n, 2, seed=1)
    found = {biased: torch.stack([vae.mmd(mean + variance.sqrt() * a, b, kernel, scales, biased=biased)
                                  for a, b in noise]) for biased in (False, True)}
    errors = {biased: abs(v.mean() - exact) / (v.std() / math.sqrt(runs)) for biased, v in found.items()}
    assert errors[False] < 4 < errors[True]
    assert (found[True] > 0).all() and (found[False] < 0).any()


def test_info_vae_and_wae_weigh_their_terms():
    model = vae.InfoVAE((3,), 2, alpha=0.3, scale=8.0, kernel="rbf", likelihood="gaussian").double()
    generator = torch.Generator()
    result = model(PROBLEM.x, n_samples=2, generator=generator.manual_seed(0))
    generator.manual_seed(0)
    z = model.infer(PROBLEM.x, 2, generator=generator).z.flatten(0, 1)
    distance = vae.mmd(z, model.sample_latents(8, generator=generator), "rbf")
    torch.testing.assert_close(result.parts["mmd"], distance)
    torch.testing.assert_close(result.value, -result.distortion - 0.7 * result.rate - (0.3 + 8.0 - 1.0) * distance)
    wae = vae.WAE((3,), 2, weight=5.0).double()
    found = wae(PROBLEM.x)
    torch.testing.assert_close(found.value, -found.distortion - 5.0 * found.parts["mmd"])


class Quadratic(nn.Module):
    """T(z) = a + b z + c z^2, one latent: every ratio of two Gaussians."""

    def __init__(self, a, b, c):
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor([a, b, c], dtype=torch.float64))

    def forward(self, z):
        return self.coefficients[0] + self.coefficients[1] * z[:, 0] + self.coefficients[2] * z[:, 0].square()


def test_discriminator_optimum_is_the_density_ratio():
    """For q = N(m, s^2) against N(0, 1): the loss is stationary at T = log q - log p, E_q T is the KL, and where q = p
    the loss is 2 log 2."""
    m, s, n = 0.6, 0.8, 200_000
    ratio = Quadratic(-m * m / (2 * s * s) - math.log(s), m / (s * s), 0.5 - 0.5 / (s * s))
    z_q, z_p = m + s * randn(n, 1, seed=0), randn(n, 1, seed=1)
    q = Normal(*torch.tensor([m, s], dtype=torch.float64))
    torch.testing.assert_close(ratio(z_q).detach(), (q.log_prob(z_q) - Normal(0, 1).log_prob(z_q))[:, 0])
    kl = 0.5 * (m * m + s * s - 1) - math.log(s)
    values = ratio(z_q).detach()
    assert abs(values.mean() - kl) < 4 * values.std() / math.sqrt(n)
    loss = vae.discriminator_loss(ratio(z_q), ratio(z_p))
    gradient, = torch.autograd.grad(loss, ratio.coefficients)
    powers = lambda z: torch.cat([torch.ones_like(z), z, z.square()], 1)  # noqa: E731
    spread = (powers(z_q) * torch.sigmoid(-values)[:, None]).std(0) + (
        powers(z_p) * torch.sigmoid(ratio(z_p).detach())[:, None]).std(0)
    assert (gradient.abs() < 4 * spread / math.sqrt(n)).all()
    off = torch.autograd.grad(vae.discriminator_loss(2 * ratio(z_q), 2 * ratio(z_p)), ratio.coefficients)[0]
    assert (off.abs() > 4 * spread / math.sqrt(n)).any()
    zeros = torch.zeros(5)
    torch.testing.assert_close(vae.discriminator_loss(zeros, zeros).item(), 2 * math.log(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("penalty", [vae.DensityRatio, vae.FactorTC])
def test_each_player_gets_the_gradient_of_its_own_game(penalty):
    """One backward: the discriminator's is that of its loss, the rest's that of the ratio, and neither leaks."""
    discriminator = perturb(vae.mlp_discriminator(2, (8,)).double())
    model = model_with(vae.PenalizedELBO(penalty(discriminator, 3.0), beta=0.5))
    generator = torch.Generator()
    result = model(PROBLEM.x, generator=generator.manual_seed(0))
    result.value.mean().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}

    inference = model.infer(PROBLEM.x, generator=generator.manual_seed(0))
    bound, z = model.elbo_of(PROBLEM.x, inference, 0.5), inference.z[0]
    own = (bound.elbo - 3.0 * discriminator(z)[:, 0]).mean()
    mine = [*model.encoder.parameters(), *model.decoder.parameters()]
    for p, expected in zip(mine, torch.autograd.grad(own, mine, retain_graph=True), strict=True):
        torch.testing.assert_close(next(g for name, g in got.items() if dict(model.named_parameters())[name] is p),
                                   expected)
    other = permute_dims(z.detach(), generator) if penalty is vae.FactorTC else model.sample_latents(
        4, generator=generator)
    loss = vae.discriminator_loss(discriminator(z.detach()), discriminator(other))
    expected = torch.autograd.grad(-loss, list(discriminator.parameters()))
    for (name, _), gradient in zip(discriminator.named_parameters(), expected, strict=True):
        torch.testing.assert_close(got[f"objective.penalties.0.discriminator.{name}"], gradient)
    torch.testing.assert_close(result.parts["discriminator_loss"], loss.detach())


def test_permuted_columns_keep_the_marginals():
    z = randn(2000, 3, seed=0) @ randn(3, 3, seed=1)
    shuffled = permute_dims(z, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shuffled.sort(0).values, z.sort(0).values, rtol=0, atol=0)
    correlation = torch.corrcoef(shuffled.T) - torch.eye(3)
    assert correlation.abs().max() < 4.5 / math.sqrt(2000) < torch.corrcoef(z.T).triu(1).abs().max()


def test_linear_beta_vae_objective_at_reverse_water_filling():
    """At beta * s2 = s the optimum has rates log(lambda / s)/2 and distortions min(lambda, s): the gradient vanishes
    there, for active and collapsed dimensions alike, and not nearby."""
    eigenvalues, s2, beta = torch.tensor([2.0, 1.0, 0.3, 0.05], dtype=torch.float64), 0.1, 2.0
    s = beta * s2
    x = math.sqrt(4) * torch.cat([torch.diag(eigenvalues.sqrt()), -torch.diag(eigenvalues.sqrt())])  # this covariance

    def gradients(scale):
        weight = (eigenvalues - s).clamp_min(0.0).sqrt() * scale
        gain = weight / (weight.square() + s)  # of the beta-posterior
        log_variance = torch.log(s / (weight.square() + s))
        encoder = linear(torch.cat([torch.diag(gain), torch.zeros(4, 4).double()]), torch.cat([torch.zeros(4).double(),
                                                                                               log_variance]))
        model = vae.VAE(encoder, linear(torch.diag(weight), torch.zeros(4)),
                        likelihood=vae.GaussianLikelihood(math.sqrt(s2)), objective=vae.PenalizedELBO(beta=beta))
        eps = 2.0 * torch.cat([torch.eye(4), -torch.eye(4)]).double()[:, None].expand(8, 8, 4)
        result = model(x, 8, eps=eps)
        result.value.mean().backward()
        return result, torch.cat([p.grad.flatten() for p in model.parameters()]).abs().max()

    result, gradient = gradients(1.0)
    assert gradient < 1e-12 < gradients(1.1)[1]
    rate = 0.5 * torch.log(eigenvalues / s).clamp_min(0.0).sum()
    torch.testing.assert_close(result.rate.mean(), rate)
    distortion = 0.5 * torch.minimum(eigenvalues, torch.tensor(s)).sum() / s2 + 2 * math.log(2 * math.pi * s2)
    torch.testing.assert_close(result.distortion.mean(), distortion)


def test_a_mean_squared_error_with_a_kl_weight_is_a_beta_vae():
    """mean MSE + k KL, of N elements, is 2 s2 / N of minus the bound with beta * s2 = k N / 2, but for a constant."""
    k, size = 0.02, 3
    gradients = []
    for s2 in (0.1, 1.0):
        model = model_with(vae.PenalizedELBO(beta=k * size / (2 * s2)), likelihood=vae.GaussianLikelihood(s2**0.5))
        parameters, eps = list(model.parameters()), randn(1, 4, 2, seed=1)
        z, _, kl = model.posterior(model.encoder(PROBLEM.x), None, 1, eps=eps)
        loss = (model.decoder(z[0]) - PROBLEM.x).square().mean() + k * kl.mean()
        by_hand = torch.autograd.grad(loss, parameters)
        own = torch.autograd.grad(-model(PROBLEM.x, eps=eps).value.mean(), parameters)
        for a, b in zip(by_hand, own, strict=True):
            torch.testing.assert_close(a * size / (2 * s2), b)
        gradients.append(by_hand)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.BoundObjective("iwae", 0), "n_samples"),
    (ValueError, lambda: vae.FreeBits(-1.0), "least"),
    (ValueError, lambda: vae.FreeBits(1.0, "latent"), "per"),
    (TypeError, lambda: vae.VAE(nn.Linear(3, 2), nn.Linear(2, 3), vae.DeterministicPosterior(),
                                objective=vae.PenalizedELBO(vae.FreeBits(1.0)))(torch.zeros(4, 3)), "posterior"),
    (ValueError, lambda: vae.BoundObjective("elbow"), "name"),
    (TypeError, lambda: vae.BoundObjective("miwae"), "options: miwae takes groups, got none"),
    (TypeError, lambda: vae.BoundObjective("dreg", groups=2), "options: dreg takes none, got groups"),
    (ValueError, lambda: minibatch_weights(5, 4), "dataset_size"),
    (ValueError, lambda: minibatch_weights(1, 4), "batch"),
    (ValueError, lambda: vae.TotalCorrelation(10, method="exact"), "method"),
    (ValueError, lambda: vae.TotalCorrelation(-5), "^dataset_size"),
    (ValueError, lambda: vae.BoundObjective("miwae", 6, groups=4), "^groups"),
    (ValueError, lambda: vae.BoundObjective("piwae", 6, groups=4), "^groups"),
    (ValueError, lambda: vae.BoundObjective("ciwae", 6, beta=3.0), "^beta"),
    (ValueError, lambda: vae.BoundObjective("renyi", 6, alpha="a"), "^alpha"),
    (ValueError, lambda: vae.dip_penalty(torch.zeros(3, 2), torch.zeros(4, 2)), "^variance"),
    (ValueError, lambda: vae.dip_penalty(torch.zeros(3, 2, 2)), "^mean"),
    *((ValueError, lambda scales=scales: vae.mmd(torch.zeros(3, 2), torch.zeros(3, 2), scales=scales), "^scales")
      for scales in ([], (0.0,), (1.0, -1.0))),
    (TypeError, lambda: vae.MMD(scales=1.0), "^scales"),
    *((ValueError, lambda shapes=shapes: vae.decompose_kl(*map(torch.zeros, shapes), 10), f"^{name}")
      for name, *shapes in (("log_sigma", (1, 4, 2), (4, 2), (3, 2), (1, 4)), ("mean", (1, 4), (4,), (4,), (1, 4)),
                            ("log_pz", (1, 4, 2), (4, 2), (4, 2), (4,)))),
    (ValueError, lambda: vae.DIP("iii"), "kind"),
    (ValueError, lambda: vae.MMD(kernel="linear"), "kernel"),
    (ValueError, lambda: vae.mmd(torch.zeros(1, 2), torch.zeros(3, 2)), "x"),
    (ValueError, lambda: vae.mmd(torch.zeros(2, 2), torch.zeros(3, 1)), "y"),
    (TypeError, lambda: model_with("beta"), "objective"),
    (TypeError, lambda: vae.VAE(nn.Linear(3, 2), nn.Linear(2, 3), vae.DeterministicPosterior(),
                                objective=vae.PenalizedELBO(vae.DIP()))(torch.zeros(4, 3)), "posterior"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
