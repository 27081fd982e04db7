"""Gradient estimators of hierarchies: expectations by quadrature, the true posterior, and networks of p and q apart."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from gaussian_hierarchy import EVIDENCE, X, hierarchy
from gaussian_models import perturb, randn
from torch import nn

from fastflow import vae
from fastflow.engine import TrainStep

MODES = ("residual", "absolute", "ladder")


class Two(nn.Module):
    """The same features for two levels, by a layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return [torch.tanh(self.layer(x))] * 2


def curved(mode, seed=0):
    """Two levels of one latent, the lower's mean and scale bent functions of the upper; q is not the posterior."""
    torch.manual_seed(seed)
    seen = 2 if mode == "ladder" else 4
    levels = [vae.Level(nn.Linear(2, 2), nn.Linear(seen, 2), nn.Sequential(nn.Linear(3, 2), nn.Tanh()), mode=mode,
                        scale="logvar") for _ in range(2)]
    model = vae.HierarchicalVAE(Two(), levels, nn.Linear(2, 2), vae.GaussianLikelihood(1.5), (2,))
    perturb(model.double(), 0.2, seed)
    with torch.no_grad():
        for level in levels:
            level.posterior.bias[1] -= 1.5  # narrow, where quadrature converges soon
    return model


def quadrature(dims, n):
    """Noise (dims, n**dims) at Gauss-Hermite nodes, and weights (n**dims,)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    grids = [torch.tensor(list(itertools.product(t, repeat=dims))) for t in (nodes, weights / weights.sum())]
    return grids[0].T, grids[1].prod(1)


def gradient(value, parameters):
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def expectations(mode, k, beta, *names):
    """The expectation of the gradient of each estimator, over the noise of two latents in each of k samples."""
    model = curved(mode)
    noise, weights = quadrature(2 * k, 14)
    eps = list(noise.unflatten(0, (2, k))[..., None])
    x = torch.tensor([[0.6, -0.9]], dtype=torch.float64).expand(len(weights), 2)
    return [gradient((weights * NAMED[name](model, x, k, beta, eps)).sum(), list(model.parameters()))
            for name in names]


def log_w(model, x, k, beta, eps):
    bound = model.elbo(x, k, eps=eps)
    return bound.log_px_z + beta * (bound.log_pz - bound.log_qz)


def squared_everywhere(model, x, k, beta, eps):
    """DReG's weights on p's own gradient too."""
    _, terms = vae.bounds._path(model, x, k, eps=eps)
    return (torch.softmax(terms.log_w(beta).detach(), 0) ** 2 * terms.log_w(beta)).sum(0)


def levels_apart(model, x, latents):
    """log q with each level's Gaussian a constant, as if it did not depend on the latents above."""
    found, h = 0.0, model._top(latents[0].shape[:2].numel())
    for level, d, z in zip(model.levels, model._features(x, len(latents[0])), latents, strict=True):
        moments = [t.detach() for t in level.gaussians(h, d).moments()]
        found = found + vae.hierarchy.log_normal(z.flatten(0, 1), *moments).sum(1)
        h = level.down(h, z.flatten(0, 1))
    return found.unflatten(0, latents[0].shape[:2])


def apart(estimator):
    """An estimator with :func:`levels_apart` in the place of log q(z | x)."""
    def call(model, x, k, beta, eps):
        kept, sampled = vae.sampled._Levels.fixed_log_q, vae.sampled._Levels
        sampled.fixed_log_q = lambda self, latents: levels_apart(self.model, self.x, latents)
        try:
            return estimator(model, x, k, beta, eps=eps)[0]
        finally:
            sampled.fixed_log_q = kept
    return call


NAMED = {
    "iwae": lambda *call: vae.iwae(log_w(*call)), "elbo": lambda *call: log_w(*call).mean(0),
    "dreg": lambda *call: vae.bounds.dreg_terms(*call[:4], eps=call[4])[0],
    "stl": lambda *call: vae.bounds.stl_terms(*call[:4], eps=call[4])[0],
    "squared everywhere": squared_everywhere, "dreg, levels apart": apart(vae.bounds.dreg_terms),
    "stl, levels apart": apart(vae.bounds.stl_terms),
}


@pytest.mark.parametrize("mode", MODES)
def test_expected_gradients_by_quadrature(mode):
    """DReG's is IWAE's and STL's the ELBO's for every parameter, those that p and q share too; squared weights on p,
    and the score of each level apart from those above, are not."""
    beta = 0.7
    iwae, dreg, everywhere, cut = expectations(mode, 2, beta, "iwae", "dreg", "squared everywhere",
                                               "dreg, levels apart")
    torch.testing.assert_close(dreg, iwae, rtol=0, atol=1e-5)
    assert min((everywhere - iwae).abs().max(), (cut - iwae).abs().max()) > 2e-3
    elbo, stl, cut = expectations(mode, 1, beta, "elbo", "stl", "stl, levels apart")
    torch.testing.assert_close(stl, elbo, rtol=0, atol=1e-12)
    torch.testing.assert_close(cut, elbo, rtol=0, atol=1e-12)  # unbiased too, but see the next test


@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_the_posterior_vanish_where_it_is_true(mode):
    """For every sample, not on average; the ELBO's own do not, nor do those of levels apart."""
    model = hierarchy(mode)
    eps = [randn(3, 5, d, seed=d) for d in (1, 2)]
    own = [p for level in model.levels for p in level.posterior.parameters()]
    found = {name: gradient((NAMED[name](model, X, 3, 1.0, eps) * randn(5, seed=0)).sum(), own).abs().max()
             for name in ("stl", "dreg", "elbo", "stl, levels apart")}
    assert max(found["stl"], found["dreg"]) < 1e-12 < 1e-2 < min(found["elbo"], found["stl, levels apart"])
    torch.testing.assert_close(vae.stl(model, X, 3, eps=eps), EVIDENCE, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("beta", [1.0, 0.7])
def test_piwae_is_two_bounds_of_a_p_and_a_q_apart(mode, beta):
    model, eps, x = curved(mode), [randn(6, 4, 1, seed=d) for d in (1, 2)], randn(4, 2, seed=3)
    value = vae.bounds.piwae_terms(model, x, 6, beta, groups=3, eps=eps)[0]
    p, q = copy.deepcopy(model), copy.deepcopy(model)
    terms = q.infer(x, 6, eps=eps)
    log_px_z, log_pz = p.log_joint(x, terms.latents)
    weights = log_px_z + beta * (log_pz.sum(0) - terms.log_qz.sum(0))
    torch.testing.assert_close(value, vae.iwae(weights))
    expected = (gradient(vae.iwae(weights).sum(), list(p.parameters()))
                + gradient(vae.miwae(weights, 3).sum(), list(q.parameters())))
    torch.testing.assert_close(gradient(value.sum(), list(model.parameters())), expected, rtol=1e-10, atol=1e-12)
    one = vae.bounds.piwae_terms(model, x, 6, beta, groups=1, eps=eps)[0]
    whole = vae.iwae(log_w(model, x, 6, beta, eps))
    torch.testing.assert_close(*(gradient(v.sum(), list(model.parameters())) for v in (one, whole)))


def test_a_copy_has_its_own_posterior():
    """Copied, or written and read, the estimators ask the copy; the weights are named once."""
    model = vae.HVAE((3,), (2, 2), 4).double()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        perturb(twin)
        eps = [randn(2, 4, 2, seed=d) for d in (1, 2)]
        torch.testing.assert_close(vae.stl(twin, (randn(4, 3, seed=0) > 0).double(), 2, eps=eps),
                                   twin.elbo((randn(4, 3, seed=0) > 0).double(), 2, eps=eps).log_w.mean(0))
    assert len(model.state_dict()) == len(list(model.parameters()))


@pytest.mark.parametrize("make", [
    lambda: vae.HVAE((1, 4, 4), (3, 2, 4), 8), lambda: vae.HVAE((1, 4, 4), (2, 2), 8, mode="residual"),
    lambda: vae.VDVAE((1, 4, 4), (1, 1), channels=4, latent_channels=2),
], ids=["ladder", "residual", "vdvae"])
def test_densities_of_given_latents_are_those_of_drawn_ones(make):
    torch.manual_seed(0)
    model, x = perturb(make().double()), (randn(3, 1, 4, 4, seed=0) > 0).double()
    terms = model.infer(x, 2, seed=1)
    log_px_z, log_pz = model.log_joint(x, terms.latents)
    torch.testing.assert_close([log_px_z, log_pz, model.log_posterior(x, terms.latents)],
                               [terms.log_px_z, terms.log_pz, terms.log_qz], rtol=1e-8, atol=1e-8)


OPTIONS = {"iwae": {}, "miwae": {"groups": 2}, "ciwae": {"beta": 0.3}, "renyi": {"alpha": 0.5}, "stl": {}, "dreg": {},
           "piwae": {"groups": 2}}


@pytest.mark.parametrize("name", OPTIONS)
def test_bounds_train_as_their_functions_do(name):
    """The value, what is reported beside it, and every gradient, through a training step."""
    torch.manual_seed(0)
    model = perturb(vae.HVAE((1, 4, 4), (3, 2), 8, objective=vae.BoundObjective(name, 6, **OPTIONS[name])).double())
    x, eps = (randn(5, 1, 4, 4, seed=0) > 0).double(), [randn(6, 5, d, seed=d) for d in (3, 2)]
    result, bound = model(x, eps=eps), model.elbo(x, 6, eps=eps)
    of_model = name in ("stl", "dreg", "piwae")
    expected = (getattr(vae, name)(model, x, 6, eps=eps, **OPTIONS[name]) if of_model else
                getattr(vae, name)(bound.log_w, **OPTIONS[name]))
    torch.testing.assert_close([result.value, result.distortion, result.rate, result.bound.log_w],
                               [expected, bound.distortion, bound.kl_monte_carlo if of_model else bound.rate,
                                bound.log_w])
    parameters, forward = list(model.parameters()), model.forward
    before = [p.detach().clone() for p in parameters]
    expected = gradient(expected.mean(), parameters)
    model.forward = lambda x, **options: forward(x, eps=eps, **options)
    TrainStep(model, torch.optim.SGD(parameters, 1.0))(x)
    moved = torch.cat([(p - old).flatten() for p, old in zip(parameters, before, strict=True)])
    torch.testing.assert_close(moved, expected)
    assert expected.abs().max() > 1e-2


@pytest.mark.parametrize("method", ["log_joint", "log_posterior"])
def test_errors_name_the_argument(method):
    with pytest.raises(ValueError, match="^latents: expected 2 tensors, got 1"):
        getattr(hierarchy("absolute"), method)(X, [randn(1, 5, 1, seed=0)])
