"""Importance-weighted bounds and their gradients: probabilistic PCA, quadrature in one dimension, and wrong ones."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastflow import vae
from fastflow.vae.sampled import sampled

W = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -0.6]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
S2 = 0.4
X = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
LOG_P = -3.376933129029517  # log N(x; b, W W' + s2 I)
PRECISION = torch.eye(2, dtype=torch.float64) + W.T @ W / S2


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def ppca():
    """With its best diagonal posterior."""
    gain = torch.linalg.solve(PRECISION, W.T / S2)
    encoder = linear(torch.cat([gain, 0 * gain]), torch.cat([-gain @ B, -PRECISION.diagonal().log()]))
    return vae.VAE(encoder, linear(W, B), likelihood=vae.GaussianLikelihood(math.sqrt(S2)))


@pytest.mark.parametrize("scale", ["logvar", "softplus"])
def test_gradients_leave_the_value_alone(scale):
    model = ppca()
    model.posterior = vae.GaussianPosterior(scale)
    eps = torch.randn(6, 4, 2, dtype=torch.float64)
    log_w = model(X.expand(4, 3), 6, eps=eps).log_w
    torch.testing.assert_close(vae.stl(model, X.expand(4, 3), 6, eps=eps), log_w.mean(0))
    torch.testing.assert_close(vae.dreg(model, X.expand(4, 3), 6, eps=eps), vae.iwae(log_w))
    torch.testing.assert_close(vae.piwae(model, X.expand(4, 3), 6, 3, eps=eps), vae.iwae(log_w))
    with torch.no_grad():
        torch.testing.assert_close(vae.dreg(model, X.expand(4, 3), 6, eps=eps), vae.iwae(log_w))
        torch.testing.assert_close(vae.piwae(model, X.expand(4, 3), 6, 3, eps=eps), vae.iwae(log_w))


class OneDimension(nn.Module):
    """x = weight z + noise, with an encoder that is wrong on purpose."""

    def __init__(self, offset=0.3, logvar=-0.4):
        super().__init__()
        self.encoder = linear(torch.tensor([[0.2], [0.05]]), torch.tensor([offset, logvar]))
        self.vae = vae.VAE(self.encoder, linear(torch.tensor([[0.8]]), torch.tensor([0.1])),
                           prior=vae.GaussianPrior((1,)).double(), likelihood=vae.GaussianLikelihood().double())


def quadrature(k, n=48):
    """Noise (k, n**k, 1) at Gauss-Hermite nodes and weights (n**k,)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    weights = weights / weights.sum()
    eps = torch.tensor(list(itertools.product(nodes, repeat=k)), dtype=torch.float64).T[..., None]
    return eps, torch.tensor([math.prod(row) for row in itertools.product(weights, repeat=k)], dtype=torch.float64)


def squared_everywhere(model, x, k, *, eps):
    """The squared weights put on the whole log-weight, decoder and all."""
    _, terms = vae.bounds._path(model, x, k, eps=eps)
    log_w = terms.log_w(1.0)
    weights = torch.softmax(log_w.detach(), 0)
    return (weights**2 * log_w).sum(0)


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_expected_gradients_with_a_weighed_rate(beta):
    """As a warm-up weighs it: DReG leaves out beta of the score, and its factor says so."""
    model = OneDimension().vae
    eps, weights = quadrature(2)
    x = torch.full((len(weights), 1), 0.9, dtype=torch.float64)
    terms, found = model.elbo(x, 2, eps=eps), {}
    log_w = terms.log_px_z + beta * (terms.log_pz - terms.log_qz)
    for name, bound in (("iwae", vae.iwae(log_w)), ("elbo", log_w.mean(0)),
                        ("dreg", vae.bounds.dreg_terms(model, x, 2, beta, eps=eps)[0]),
                        ("stl", vae.bounds.stl_terms(model, x, 2, beta, eps=eps)[0])):
        gradients = torch.autograd.grad((weights * bound).sum(), list(model.parameters()), retain_graph=True,
                                        allow_unused=True, materialize_grads=True)
        found[name] = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(found["dreg"], found["iwae"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["stl"], found["elbo"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2])
def test_expected_gradients_by_quadrature(k):
    """DReG's is IWAE's for every parameter, STL's the ELBO's; squared weights on the decoder are not."""
    model = OneDimension().vae
    eps, weights = quadrature(k)
    x = torch.full((len(weights), 1), 0.9, dtype=torch.float64)
    parameters = list(model.parameters())

    def expected(bound):
        return torch.cat([g.flatten() for g in torch.autograd.grad((weights * bound).sum(), parameters)])

    log_w = model(x, k, eps=eps).log_w
    assert len(parameters) == 7
    torch.testing.assert_close(expected(vae.dreg(model, x, k, eps=eps)), expected(vae.iwae(log_w)), rtol=0, atol=1e-9)
    log_w = model(x, k, eps=eps).log_w
    torch.testing.assert_close(expected(vae.stl(model, x, k, eps=eps)), expected(log_w.mean(0)), rtol=0, atol=1e-9)
    if k > 1:
        wrong = expected(squared_everywhere(model, x, k, eps=eps)) - expected(vae.dreg(model, x, k, eps=eps))
        assert wrong[:4].abs().max() < 1e-12 < 1e-2 < wrong[4:].abs().max()  # encoder first


def test_decoder_and_prior_keep_the_gradients_of_iwae():
    """Sample by sample: DReG leaves the score of a prior's own parameters as it is."""
    model = OneDimension().vae
    x, eps = torch.randn(5, 1, dtype=torch.float64), torch.randn(6, 5, 1, dtype=torch.float64)
    own = [p for name, p in model.named_parameters() if not name.startswith("encoder")]
    assert {id(p) for p in model.prior.parameters()} <= {id(p) for p in own}
    found, expected = (torch.autograd.grad(bound.sum(), own) for bound in (
        vae.dreg(model, x, 6, eps=eps), vae.iwae(model(x, 6, eps=eps).log_w)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class Given(nn.Module):
    """An encoder that hands out its own (B, 2) parameters, so that each example has its gradient."""

    def __init__(self, row, n):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(row, dtype=torch.float64).repeat(n, 1))

    def forward(self, x):
        return self.rows


class Flat(nn.Module):
    """A likelihood without data, which leaves the prior as the target."""

    def log_prob(self, x, output):
        return 0.0 * output.flatten(2).sum(2)


@pytest.mark.parametrize(("mean", "std", "low", "high"), [(1.9, 2.9, 0.0, 1 / 60), (-3.0, 1.0, 4.0, 9.0)])
def test_doubly_reparameterised_variance_depends_on_where(mean, std, low, high):
    """Same mean, by sampling; near the target N(2, 3) much less noise than IWAE's, far from it more."""
    n, k = 60_000, 10
    prior = vae.GaussianPrior((1,), "logstd").double()
    with torch.no_grad():
        prior.mean.fill_(2.0)
        prior.raw.fill_(math.log(3.0))
    model = vae.VAE(Given([mean, math.log(std)], n), nn.Identity(), vae.GaussianPosterior("logstd"), prior, Flat())
    x = torch.zeros(n, 1, dtype=torch.float64)
    eps = torch.randn(k, n, 1, dtype=torch.float64)
    plain, = torch.autograd.grad(vae.iwae(model(x, k, eps=eps).log_w).sum(), model.encoder.rows)
    double, = torch.autograd.grad(vae.dreg(model, x, k, eps=eps).sum(), model.encoder.rows)
    difference = plain - double
    assert (difference.mean(0).abs() < 4 * difference.std(0) / math.sqrt(n)).all()
    ratio = double.std(0) / plain.std(0)
    assert ((low < ratio) & (ratio < high)).all(), ratio


def test_piwae_gives_each_side_its_own_gradient():
    model = OneDimension().vae
    x, eps = torch.randn(5, 1, dtype=torch.float64), torch.randn(6, 5, 1, dtype=torch.float64)
    encoder = list(model.encoder.parameters())
    rest = [p for p in model.parameters() if not any(p is q for q in encoder)]
    bound = vae.piwae(model, x, 6, 2, eps=eps)
    log_w = model(x, 6, eps=eps).log_w
    for parameters, target in ((encoder, vae.miwae(log_w, 2)), (rest, vae.iwae(log_w))):
        got = torch.autograd.grad(bound.sum(), parameters, retain_graph=True)
        expected = torch.autograd.grad(target.sum(), parameters, retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_bounds_between_the_elbo_and_iwae():
    log_w = 3 * torch.randn(12, 50, dtype=torch.float64)
    elbo, top = log_w.mean(0), vae.iwae(log_w)
    torch.testing.assert_close(vae.miwae(log_w, 12), elbo)
    torch.testing.assert_close(vae.miwae(log_w, 1), top)
    torch.testing.assert_close(vae.miwae(log_w, 3)[0], sum(vae.iwae(log_w[i:i + 4, 0]) for i in (0, 4, 8)) / 3)
    ladder = [vae.miwae(log_w, groups) for groups in (12, 6, 2, 1)]
    assert all((a <= b + 1e-12).all() for a, b in zip(ladder, ladder[1:], strict=False))
    torch.testing.assert_close(vae.ciwae(log_w, 0.25), 0.25 * elbo + 0.75 * top)


def test_renyi_limits():
    log_w = torch.randn(9, 40, dtype=torch.float64)
    torch.testing.assert_close(vae.renyi(log_w, 1.0), log_w.mean(0), rtol=0, atol=0)
    torch.testing.assert_close(vae.renyi(log_w, 0.0), vae.iwae(log_w))
    torch.testing.assert_close(vae.renyi(log_w, -math.inf), log_w.amax(0))
    torch.testing.assert_close(vae.renyi(log_w, -1e4), log_w.amax(0), rtol=0, atol=1e-3)
    for power in (1e-2, 1e-6, 1e-12, -1e-12, -1e-6, -1e-2):  # mean + power variance/2 + O(power^2)
        error = vae.renyi(log_w, 1 - power) - log_w.mean(0) - (1 - (1 - power)) * log_w.var(0, correction=0) / 2
        assert error.abs().max() < 2 * power**2 + 2e-14
    ladder = [vae.renyi(log_w, alpha) for alpha in (-math.inf, -2, 0, 0.5, 0.99, 0.999, 1, 1.001, 2, math.inf)]
    assert all((a > b).all() for a, b in zip(ladder, ladder[1:], strict=False))


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 0.995, 1.0, 1.005, 2.0])
def test_renyi_gradient_and_impossible_samples(alpha):
    log_w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(vae.renyi(log_w, alpha).sum(), log_w)
    torch.testing.assert_close(gradient, torch.softmax((1 - alpha) * log_w, 0).detach())
    impossible = torch.tensor([[-math.inf, 0.0], [-math.inf, -math.inf]])
    value = vae.renyi(impossible, alpha)
    assert value[0] == -math.inf and (value[1] == -math.inf) == (alpha >= 1)


def log_weights(k=50, n=4000):
    with torch.no_grad():
        return ppca()(X.expand(n, 3), k).log_w


def rises_below_the_evidence(bound):
    """Whether a bound of log-weights (K, B) rises with K and stays below log p + 4 standard errors."""
    log_w = log_weights()
    values = [bound(log_w[:k]) for k in (1, 5, 50)]
    rises = all(b.mean() > a.mean() for a, b in zip(values, values[1:], strict=False))
    return rises and all(v.mean() <= LOG_P + 4 * v.std() / math.sqrt(v.numel()) for v in values)


def sign_flipped(log_w):
    """The softmax of minus the log-weight prefers the worst sample."""
    return (torch.softmax(-log_w, 0) * log_w).sum(0)


def surrogate_as_value(log_w):
    """What has IWAE's gradient has not its value."""
    return (torch.softmax(log_w, 0) * log_w).sum(0)


def without_log_k(log_w):
    return torch.logsumexp(log_w, 0)


@pytest.mark.parametrize("bound", [vae.iwae, lambda w: vae.renyi(w, 0.5), lambda w: vae.ciwae(w, 0.3)])
def test_bounds_rise_below_the_evidence(bound):
    assert rises_below_the_evidence(bound)


@pytest.mark.parametrize("bound", [sign_flipped, surrogate_as_value, without_log_k])
def test_wrong_bounds_are_rejected(bound):
    assert not rises_below_the_evidence(bound)


def noise_over_log_variance(z, mean, logvar):
    """log q from eps = (z - mean)/log-variance."""
    return -0.5 * (((z - mean) / logvar) ** 2 + logvar + math.log(2 * math.pi)).sum(2)


def variance_as_scale(z, mean, logvar):
    return torch.distributions.Normal(mean, logvar.exp()).log_prob(z).sum(2)


def right(z, mean, logvar):
    return torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(z).sum(2)


@pytest.mark.parametrize(("log_q", "holds"), [(right, True), (noise_over_log_variance, False),
                                              (variance_as_scale, False)])
def test_log_weights_average_to_the_elbo(log_q, holds):
    """Whose value is known, below the evidence by KL(q || posterior)."""
    model, n = ppca(), 100_000
    with torch.no_grad():
        mean, logvar = model.encoder(X).chunk(2, 1)
        z = mean + (0.5 * logvar).exp() * torch.randn(n, 1, 2, dtype=torch.float64)
        source = sampled(model, X, None)
        log_w = sum(source.log_joint([z])) - log_q(z, mean, logvar)
        fixed = source.fixed_log_q([z])
    assert ((log_w.mean() - (LOG_P - 0.003897104868258)).abs() < 4 * log_w.std() / math.sqrt(n)) == holds
    torch.testing.assert_close(fixed, right(z, mean, logvar))


class Opaque(nn.Module):
    def forward(self, params, prior, n_samples, **noise):
        return params.expand(n_samples, *params.shape), params.sum(1).expand(n_samples, -1), None


def test_ciwae_at_its_ends_is_one_bound():
    """The other counts nothing, at -inf too."""
    log_w = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    torch.testing.assert_close(vae.ciwae(log_w, 0.0), torch.tensor([-math.log(2.0), -math.inf]))
    assert vae.ciwae(log_w, 1.0).tolist() == vae.ciwae(log_w, 0.5).tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize(("error", "call", "message"), [
    (ValueError, lambda: vae.stl(ppca(), X, 0), "^n_samples"),
    (ValueError, lambda: vae.dreg(ppca(), X, 0), "^n_samples"),
    (ValueError, lambda: vae.piwae(ppca(), X, 0, 1), "^n_samples"),
    (ValueError, lambda: vae.miwae(torch.zeros(6, 2), 4), "groups"),
    (ValueError, lambda: vae.miwae(torch.zeros(0, 2), 1), "log_w"),
    (ValueError, lambda: vae.ciwae(torch.zeros(6, 2), 1.5), "beta"),
    (TypeError, lambda: vae.ciwae(torch.zeros(6, 2), "a"), "^beta: expected a number, got str"),
    (ValueError, lambda: vae.renyi(torch.zeros(6, 2), math.nan), "alpha"),
    (TypeError, lambda: vae.renyi([0.0], 0.5), "log_w"),
    (ValueError, lambda: vae.piwae(ppca(), X, 5, 2), "groups"),
    (TypeError, lambda: vae.stl(vae.VAE(nn.Identity(), nn.Identity(), Opaque()), X), "posterior"),
    (TypeError, lambda: vae.dreg(vae.HamiltonianVAE(nn.Identity(), nn.Identity()), X), "^model: .* HamiltonianVAE"),
    (TypeError, lambda: vae.stl(nn.Identity(), X), "^model: .* Identity"),
    (TypeError, lambda: vae.stl(vae.HVAE((3,), (2,), 4), X, context=X), "^context: a HVAE takes none"),
])
def test_errors_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()
