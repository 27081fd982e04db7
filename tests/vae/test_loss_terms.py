"""The terms that training asks for are those of the whole bound, gradients too, and are asked for only where they say
all."""

import pytest
import torch
from torch import nn

from fastflow import vae
from fastflow.engine import TrainStep
from fastflow.engine.objectives import NegativeELBO

SHAPE = (1, 4, 4)


def labelled(**options):
    return vae.VAE(vae.Conditioned(vae.mlp_encoder((16 + 3,), 2, (8,)), 3, flatten=True),
                   vae.Conditioned(vae.mlp_decoder(2 + 3, SHAPE, (8,)), 3), **options)


def conditional_prior():
    table = nn.Embedding(3, 4)
    return vae.ConditionalGaussianPrior(2, table)


MODELS = {"standard": lambda: vae.MLPVAE(SHAPE, 2, (8,)),
          "learned prior": lambda: vae.MLPVAE(SHAPE, 2, (8,), prior=vae.GaussianPrior(2)),
          "gaussian": lambda: vae.MLPVAE(SHAPE, 2, (8,), likelihood="gaussian"),
          "conv": lambda: vae.ConvVAE(SHAPE, 2, (16,)),
          "conditional": lambda: labelled(), "conditional prior": lambda: labelled(prior=conditional_prior())}


def data(name):
    x = torch.bernoulli(torch.full((5, *SHAPE), 0.4, dtype=torch.float64))
    return x, torch.arange(5) % 3 if "conditional" in name else None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_samples", [1, 3])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_they_are_the_bounds(name, n_samples, beta):
    torch.manual_seed(0)
    model, (x, context) = MODELS[name]().double(), data(name)
    for noise in ({"seed": 3}, {"eps": torch.randn(n_samples, 5, 2, dtype=torch.float64)}):
        whole = model(x, n_samples, beta, context=context, **noise)
        terms = model(x, n_samples, beta, context=context, loss_only=True, **noise)
        assert type(whole) is vae.ELBO and type(terms) is vae.LossTerms
        for part in ("rate", "distortion", "value"):
            assert getattr(terms, part).shape == (5,)
            torch.testing.assert_close(getattr(terms, part), getattr(whole, part), rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(bound.value.sum(), model.parameters()) for bound in (whole, terms)]
        for want, got in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["standard", "conv", "conditional prior"])
def test_the_objective_is_the_mean(name):
    torch.manual_seed(0)
    model, (x, context) = MODELS[name]().double(), data(name)
    for beta in (1.0, 0.3):
        torch.manual_seed(1)
        want = model.elbo(x, 2, beta, context=context)
        torch.manual_seed(1)
        loss, parts = NegativeELBO(2, 2, beta)(model, x, context)
        torch.testing.assert_close(loss, -want.elbo.mean(), rtol=1e-12, atol=1e-12)
        for part in ("rate", "distortion"):
            torch.testing.assert_close(parts[part], getattr(want, part).mean(), rtol=1e-12, atol=1e-12)
            assert not parts[part].requires_grad


class Tilted(vae.VAE):
    """A bound of its own."""

    def elbo(self, *args, **options):
        bound = super().elbo(*args, **options)
        return bound._replace(elbo=bound.elbo - 7.0)


def test_they_stand_for_nothing_that_they_do_not_say():
    """Monte-Carlo KLs, posteriors and bounds of another kind, and objectives keep their own way."""
    torch.manual_seed(0)
    x, _ = data("standard")
    encoder, decoder = vae.mlp_encoder(SHAPE, 2, (8,)), vae.mlp_decoder(2, SHAPE, (8,))
    for model in (vae.VAE(encoder, decoder, prior=vae.MixturePrior(2, 2)), Tilted(encoder, decoder),
                  vae.VAE(vae.mlp_encoder(SHAPE, 2, (8,), n_params=6), decoder, "low_rank"),
                  vae.HamiltonianVAE(encoder, decoder)):
        assert type(model.double()(x, loss_only=True)) is vae.ELBO
    assert type(vae.VAE(encoder, decoder).double()(x, loss_only=True, kl="monte_carlo")) is vae.ELBO
    beta = vae.BetaVAE(SHAPE, 2, sizes=(8,)).double()
    assert type(beta(x, loss_only=True)) is vae.Objective


def test_a_posterior_without_log_q():
    params = torch.randn(4, 6)
    posterior = vae.GaussianPosterior()
    z, log_qz, kl = posterior(params, None, None, seed=5, want_log_qz=False)
    several, log_q, same = posterior(params, None, 1, seed=5)
    assert log_qz is None and log_q.shape == (1, 4)
    assert torch.equal(z, several[0]) and torch.equal(kl, same)


def test_a_training_step_asks_for_them(monkeypatch):
    model = MODELS["standard"]()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1))
    monkeypatch.setattr(vae.VAE, "elbo", None)  # nobody calls it
    assert torch.isfinite(step(data("standard")[0].float())) and model.latent_shape == (2,)
