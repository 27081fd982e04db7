"""The discrete VAE against a sum over all its latents, in float64."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from fastflow import engine, estimators, vae

X = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)


def small(estimator, n_classes=2):
    """Three bits, or two variables of three classes, before four pixels."""
    torch.manual_seed(7)
    latent, width = (3, 3) if n_classes == 2 else (2, 2 * n_classes)
    model = vae.DiscreteVAE(nn.Linear(4, width), nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 4)), latent,
                            n_classes, estimator, prior="learned").double()
    with torch.no_grad():
        model.prior_logits.normal_()
    return model


def latents(model):
    """Every latent, as the decoder takes it, and the index of each element's class."""
    classes, sites = model.n_classes, model.latent_shape.numel()
    index = torch.tensor(list(itertools.product(range(classes), repeat=sites)))
    hot = index.double() if classes == 2 else nn.functional.one_hot(index, classes).double().flatten(1)
    return hot, index


def log_table(logits, classes):
    """(sites, C) log-probabilities from logits (sites,) or packed (sites*C,)."""
    if classes == 2:
        return nn.functional.logsigmoid(torch.stack([-logits, logits], -1))
    return torch.log_softmax(logits.reshape(-1, classes), -1)


def terms(model):
    """log p(x | z), log p(z), log q(z | x) of every z, (S,), for X; written out from the networks alone."""
    hot, index = latents(model)
    output = model.decoder(hot)
    log_px = -nn.functional.binary_cross_entropy_with_logits(output, X.expand_as(output), reduction="none").sum(1)
    pick = torch.arange(index.shape[1])
    log_pz = log_table(model.prior_logits[0].flatten(), model.n_classes)[pick, index].sum(1)
    log_qz = log_table(model.encoder(X)[0], model.n_classes)[pick, index].sum(1)
    return log_px, log_pz, log_qz


def enumerated(model, beta=1.0, importance=False):
    log_px, log_pz, log_qz = terms(model)
    log_w = log_px + beta * (log_pz - log_qz)
    if not importance:
        return (log_qz.exp() * log_w).sum()
    pairs = (log_qz[:, None] + log_qz).exp()
    return (pairs * (torch.logaddexp(log_w[:, None], log_w) - math.log(2))).sum()


def gradient(model, value):
    parameters = [*model.encoder.parameters(), *model.decoder.parameters(), model.prior_logits]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("n_classes", [2, 3])
def test_enumeration_is_the_elbo(n_classes):
    model = small("enumeration", n_classes)
    bound = model(X, beta=0.4)
    log_px, log_pz, log_qz = terms(model)
    torch.testing.assert_close(bound.elbo[0], enumerated(model, 0.4), rtol=0, atol=1e-13)
    torch.testing.assert_close(bound.rate[0], (log_qz.exp() * (log_qz - log_pz)).sum(), rtol=0, atol=1e-13)
    torch.testing.assert_close(bound.distortion[0], -(log_qz.exp() * log_px).sum(), rtol=0, atol=1e-13)
    torch.testing.assert_close(bound.log_w[:, 0], (log_px + log_pz - log_qz).detach())
    torch.testing.assert_close(gradient(model, bound.elbo.sum()), gradient(model, enumerated(model, 0.4)), rtol=0,
                               atol=1e-13)
    assert bound.elbo[0] <= torch.logsumexp(log_px + log_pz, 0)


def deviation(model, n_samples, exact, n=300, repeats=40):
    """The largest deviation from the exact gradient, in standard errors of the mean over independent batches."""
    x = X.expand(n, 4)
    found = torch.stack([gradient(model, model(x, n_samples).elbo.mean()) for _ in range(repeats)])
    error = found.std(0) / math.sqrt(repeats)
    return ((found.mean(0) - exact).abs() / error.clamp(min=1e-12)).max()


@pytest.mark.parametrize(("name", "n_samples"), [("reinforce", 1), ("rloo", 3), ("disarm", 1), ("rebar", 2),
                                                 ("relax", 1), ("unordered-set", 3), ("nvil", 2), ("vimco", 2)])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_gradients_of_all_parameters(n_classes, name, n_samples):
    model = small(name, n_classes)
    if name == "nvil":
        model.estimator.normalise = False
    exact = gradient(model, enumerated(model, importance=name == "vimco"))
    assert deviation(model, n_samples, exact) < 4


@pytest.mark.parametrize("name", ["straight-through", "gumbel-softmax"])
def test_biased_gradients_are_caught(name):
    model = small(name)
    assert deviation(model, 1, gradient(model, enumerated(model))) > 8


@pytest.mark.parametrize("name", ["disarm", "unordered-set", "gumbel-softmax", "vimco"])
def test_without_gradients_the_samples_are_independent(name):
    """So that their log-weights are an importance-weighted bound, whatever trains the model."""
    model = small(name)
    log_p = torch.logsumexp(sum(terms(model)[:2]), 0)
    with torch.no_grad():
        bound = model(X.expand(4000, 4), 16)
        assert bound.log_w.shape == (16, 4000)
        torch.testing.assert_close(bound.log_w, bound.log_px_z + bound.log_pz - bound.log_qz)
        iwae = vae.iwae(bound.log_w)
        assert 0 < log_p - iwae.mean() < 0.1
        if name == "vimco":
            torch.testing.assert_close(bound.elbo, iwae)
        else:
            target = enumerated(model)
            assert (bound.elbo.mean() - target).abs() < 4 * bound.elbo.std() / math.sqrt(4000)


def test_measuring_a_models_own_estimators():
    model = small("rloo", 3)
    q = model.posterior(X)
    named = [estimators.create(name, q.event_shape) for name in ("rloo", "reinforce", "straight-through")]
    found = [estimators.measure(e, q, lambda z: model.log_likelihood(X, z), 2, 4000) for e in named]
    assert found[0].is_unbiased() and found[1].is_unbiased() and not found[2].is_unbiased()
    assert found[0].variance.sum() < found[1].variance.sum()


def test_prior_samples_and_reconstruction():
    model = small("disarm")
    log_px, log_pz, _ = terms(model)
    n = 20_000
    mean = model.sample(n, mean=True).mean(0)
    expected = (log_pz.exp()[:, None] * torch.sigmoid(model.decoder(latents(model)[0]))).sum(0)
    assert (mean - expected).abs().max() < 4 * 0.5 / math.sqrt(n)
    assert model.sample(3).shape == (3, 4)
    likeliest = (model.prior_logits > 0).double()
    torch.testing.assert_close(model.sample(2, temperature=0.0, mean=True),
                               torch.sigmoid(model.decoder(likeliest)).expand(2, 4))
    z = (model.encoder(X) > 0).double()
    torch.testing.assert_close(model.reconstruct(X), torch.sigmoid(model.decoder(z)))


def test_latent_maps_of_classes_are_packed_channels_second():
    model = vae.DiscreteVAE(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 1, 1), (2, 3, 5), 3, "rloo")
    x = torch.rand(4, 1, 3, 5).round()
    q = model.posterior(x)
    assert q.logits.shape == (4, 2, 3, 5, 3)
    torch.testing.assert_close(q.logits[1, 1, 2, 4], model.encoder(x)[1, 3:, 2, 4])
    z = q.sample(1)[0]
    torch.testing.assert_close(model.decode(z)[:, 0], torch.einsum(
        "bdhwc,dc->bhw", z, model.decoder.weight[0, :, 0, 0].reshape(2, 3)) + model.decoder.bias)
    assert model(x, 2).elbo.shape == (4,) and model.sample(2).shape == (2, 1, 3, 5)


@pytest.mark.parametrize("estimator", [*estimators.ESTIMATORS, estimators.GumbelSoftmax(1.0, hard=True)])
def test_trains_by_every_estimator(estimator):
    """On two patterns; every parameter that an estimator has learns too, as the loss is minimised."""
    patterns = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0, 1.0]])
    x = patterns[torch.randint(0, 2, (64,))]
    model = vae.DiscreteVAE(vae.mlp_encoder((6,), 2, (16,)), vae.mlp_decoder(4, (6,), (16,)), 4, 2, estimator,
                            prior="learned")
    start = [p.detach().clone() for p in model.parameters()]
    step = engine.TrainStep(model, torch.optim.Adam(model.parameters(), 0.02), n_samples=3)
    losses = [step(x).item() for _ in range(60)]
    assert min(losses[-5:]) < 0.75 * losses[0], losses[::10]
    assert all(not torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_auxiliary_loss_is_minimised_and_not_counted():
    """The baseline descends while elbo is maximised, and elbo's value is what it is without."""
    model = small("neural-baseline")
    exact = enumerated(model)
    bound = model(X.expand(2000, 4), 2)
    assert (bound.elbo.mean() - exact).abs() < 4 * bound.elbo.std() / math.sqrt(2000)
    before = copy.deepcopy(model.estimator)
    (-bound.elbo.mean()).backward()
    with torch.no_grad():
        for p in model.estimator.parameters():
            p -= 0.01 * p.grad
    q = model.posterior(X.expand(2000, 4))
    values = torch.full((1, 2000), -bound.distortion.mean().item(), dtype=torch.float64)
    assert model.estimator.signal(q, values)[1] < before.signal(q, values)[1]


@pytest.mark.parametrize(("error", "call", "message"), [
    (ValueError, lambda: small("disarmed"), "estimator"),
    (TypeError, lambda: small(3), "estimator"),
    (ValueError, lambda: small("rloo")(X, 1), "n_samples"),
    (ValueError, lambda: vae.DiscreteVAE(nn.Identity(), nn.Identity(), 3, 1), "n_classes"),
    (ValueError, lambda: vae.DiscreteVAE(nn.Identity(), nn.Identity(), 3, prior="flow"), "prior"),
    (ValueError, lambda: vae.DiscreteVAE(nn.Identity(), nn.Identity(), 3, likelihood="cauchy"), "likelihood"),
    (ValueError, lambda: vae.DiscreteVAE(nn.Identity(), nn.Identity(), 3)(torch.zeros(2, 4)), "encoder output"),
    (ValueError, lambda: vae.DiscreteVAE(nn.Linear(4, 3), nn.Identity(), 3)(torch.zeros(2, 4)), "decoder output"),
    (ValueError, lambda: small("rloo").sample(2, temperature=-1.0), "temperature"),
])
def test_errors_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()
