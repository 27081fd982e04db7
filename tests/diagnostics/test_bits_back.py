"""Bits-back coding of real digits: nothing is lost, and the message is as long as the ELBO says."""

import copy
import math

import numpy as np
import pytest
import torch

from fastflow import diagnostics, flows, vae
from fastflow.data import digits as images

pytest.importorskip("constriction")


def fit(likelihood, x, steps):
    torch.manual_seed(0)
    model = vae.MLPVAE((64,), 6, (64,), likelihood=likelihood)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(steps):
        batch = x[i * 100 % 1500:][:100]
        optimizer.zero_grad()
        (-model.elbo(batch).elbo.mean()).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def levels():
    return torch.from_numpy(np.concatenate(images.read()[:2])).reshape(-1, 64)


@pytest.mark.parametrize("kind", ["bernoulli", "logistic"])
def test_message_is_as_long_as_the_elbo_and_comes_back(levels, kind):
    x = (levels > 8).float() if kind == "bernoulli" else levels.float()
    likelihood = vae.BernoulliLikelihood() if kind == "bernoulli" else vae.DiscretizedLogisticLikelihood(17)
    model = fit(likelihood, x, 150)
    x = x[-600:] if kind == "bernoulli" else x[-300:]
    codec = diagnostics.BitsBack(model, batch_size=32)
    message = codec.encode(x, seed=3)
    back, words = diagnostics.BitsBack(model, batch_size=32).decode(message, x[:1])
    assert torch.equal(back, x)
    with torch.no_grad():
        bound = model.elbo(x, 30)
    per_example = message.net_bits / len(x)
    expected = -bound.elbo.mean().item() / math.log(2.0)
    assert per_example == pytest.approx(expected, rel=0.02)
    # The initial bits come back too, so that they are lent, not spent.
    assert np.array_equal(words, np.random.default_rng(3).integers(1, 2**32, len(words), dtype=np.uint32))
    assert 32 * (len(words) - 1) < message.initial_bits <= 32 * len(words)
    # Without taking log q(z|x) back the message would be longer by far.
    forward = -(bound.log_px_z + bound.log_pz).mean().item() / math.log(2.0) + 6 * 8  # z on a grid of step 2^-8
    assert per_example < 0.8 * forward


@pytest.mark.parametrize("make", [lambda: torch.distributions.Normal(0.5, 2.0), lambda: flows.DiagonalNormal(4),
                                  lambda: flows.StandardNormal(4)])
def test_every_prior_of_independent_gaussians(levels, make):
    torch.manual_seed(0)
    x, model = (levels[:20] > 8).float(), vae.MLPVAE((64,), 4, (16,), prior=make())
    codec = diagnostics.BitsBack(model)
    assert torch.equal(codec.decode(codec.encode(x), x[:1])[0], x)


def test_nothing_is_lost_on_a_coarse_grid_or_in_uneven_batches(levels):
    x = (levels[:20] > 8).to(torch.int64)
    torch.manual_seed(0)
    model = vae.MLPVAE((64,), 4, (16,), prior=vae.GaussianPrior((4,)))
    with torch.no_grad():
        model.prior.mean.normal_()
    codec = diagnostics.BitsBack(model, precision=0, batch_size=7)
    back, words = codec.decode(codec.encode(x), x[:1])
    assert torch.equal(back, x) and back.dtype == torch.int64
    assert np.array_equal(words, np.random.default_rng(0).integers(1, 2**32, len(words), dtype=np.uint32))


def test_words_come_back_from_an_encoder_that_embeds_them():
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Flatten(), torch.nn.Linear(20, 6))
    model = vae.VAE(encoder, vae.mlp_decoder(3, (35,), (8,)), likelihood=vae.CategoricalLikelihood(7), latent_shape=3)
    codec = diagnostics.BitsBack(model, batch_size=7)
    for x in (torch.randint(7, (20, 5)), torch.randint(7, (20, 5)).float()):
        back, _ = codec.decode(codec.encode(x), x[:1])
        assert torch.equal(back, x) and back.dtype == x.dtype


def test_bad_input_is_named():
    model = vae.MLPVAE((4,), 2, (4,))
    with pytest.raises(ValueError, match="^x: expected integers from 0 to 1"):
        diagnostics.BitsBack(model).encode(torch.full((2, 4), 0.5))
    with pytest.raises(ValueError, match="^x: expected integers from 0 to 1"):
        diagnostics.BitsBack(model).encode(torch.tensor([[0.0, 1.0, math.nan, 1.0]]))
    with pytest.raises(ValueError, match="^bound: expected a number from the grid's step 0.5 to 64, got 0.4"):
        diagnostics.BitsBack(model, precision=1, bound=0.4)
    with pytest.raises(TypeError, match="^model: .* HamiltonianVAE"):
        diagnostics.BitsBack(vae.HamiltonianVAE(model.encoder, model.decoder))
    for network in ("encoder", "decoder"):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            next(getattr(broken, network).parameters()).fill_(math.nan)
        with pytest.raises(ValueError, match=f"^model: expected finite numbers of its {network}"):
            diagnostics.BitsBack(broken).encode(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="^precision: "):
        diagnostics.BitsBack(model, precision=20)
    with pytest.raises(TypeError, match="^model: expected a Bernoulli"):
        diagnostics.BitsBack(vae.MLPVAE((4,), 2, (4,), likelihood="gaussian"))
    with pytest.raises(TypeError, match="^model: expected a prior of independent Gaussians, got MixturePrior"):
        diagnostics.BitsBack(vae.MLPVAE((4,), 2, (4,), prior=vae.MixturePrior((2,))))
