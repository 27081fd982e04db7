"""The linear beta-VAE trained on digits against reverse water-filling."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastflow import diagnostics, vae
from fastflow.data import digits as images

LATENTS, BETA, SIGMA = 8, 8.0, 0.8


def digits():
    train, test, *_ = images.read()
    x = torch.from_numpy(np.concatenate([train, test]).reshape(-1, 64).astype(np.float64) / 4.0)[:1792]
    return x - x.mean(0)  # a multiple of LATENTS; centred, for L-BFGS to converge sooner


class Encoder(nn.Module):
    """A linear mean, one log-variance for all x."""

    def __init__(self, features, latents):
        super().__init__()
        self.mean = nn.Linear(features, latents).double()
        self.log_variance = nn.Parameter(torch.zeros(latents, dtype=torch.float64))

    def forward(self, x):
        mean = self.mean(x)
        return torch.cat([mean, self.log_variance.expand_as(mean)], 1)


def antithetic_noise(n, d):
    """(2, n, d): +-sqrt(d) e_i, i going round. With a constant variance and n a multiple of d the mean over the batch
    of a linear model's ELBO is then its expectation."""
    eps = math.sqrt(d) * torch.eye(d, dtype=torch.float64).repeat(n // d, 1)
    return torch.stack([eps, -eps])


def same_moments(x):
    """128 points with the mean and the covariance of x, which are all that a linear model's expected ELBO sees."""
    mean, centred = x.mean(0), x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    steps = (64.0 * values.clamp_min(0.0)).sqrt()[:, None] * vectors.T
    return torch.cat([mean + steps, mean - steps])


def train(x, beta, iterations=600):
    torch.manual_seed(0)
    x = same_moments(x)
    model = vae.VAE(Encoder(64, LATENTS), nn.Linear(LATENTS, 64).double(), likelihood=vae.GaussianLikelihood(SIGMA))
    eps = antithetic_noise(len(x), LATENTS)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=iterations, history_size=30, tolerance_grad=1e-10,
                                  tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -model.elbo(x, 2, beta, eps=eps).elbo.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.fixture(scope="module")
def trained():
    x = digits()
    return x, train(x, BETA), antithetic_noise(len(x), LATENTS)


def measured(model, x, eps):
    """(rates of the latents, squared error along each of the data's principal axes), both sorted as the optimum is."""
    with torch.no_grad():
        mean, log_sigma = diagnostics.posterior_moments(model, x)
        rates = diagnostics.dimension_kl(mean, log_sigma).mean(0).sort(descending=True).values
        z = mean + log_sigma.exp() * eps
        residual = x - model.decode(z.flatten(0, 1)).unflatten(0, (2, len(x)))
        centred = x - x.mean(0)
        axes = torch.linalg.eigh(centred.T @ centred / len(x)).eigenvectors.flip(1)
        return rates, (residual @ axes).square().mean((0, 1))


def test_trained_model_reaches_reverse_water_filling(trained):
    x, model, eps = trained
    expected = diagnostics.linear_optimum(diagnostics.data_eigenvalues(x), SIGMA, BETA, LATENTS)
    kept = int(expected.active.sum())
    assert 1 < kept < LATENTS  # some collapse, some do not
    rates, distortions = measured(model, x, eps)
    torch.testing.assert_close(rates, expected.rate[:LATENTS], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(distortions, expected.distortion, rtol=1e-2, atol=2e-3)
    assert int((rates > 1e-2).sum()) == kept
    assert int(diagnostics.active_units(diagnostics.posterior_moments(model, x)[0]).sum()) == kept
    point = diagnostics.rate_distortion(model, x)
    assert point.rate == pytest.approx(expected.rate.sum().item(), abs=1e-3)


def test_prediction_for_the_wrong_reduction_fails(trained):
    """A reconstruction averaged over pixels instead of summed is 64 times the beta, at which nothing stays."""
    x, model, eps = trained
    eigenvalues = diagnostics.data_eigenvalues(x)
    wrong = diagnostics.linear_optimum(eigenvalues, SIGMA, BETA * 64, LATENTS)
    rates, _ = measured(model, x, eps)
    assert int(wrong.active.sum()) != int((rates > 1e-2).sum())
    variance_as_scale = diagnostics.linear_optimum(eigenvalues, SIGMA**2, BETA, LATENTS)
    assert int(variance_as_scale.active.sum()) != int((rates > 1e-2).sum())


def test_water_filling_of_a_known_spectrum():
    found = diagnostics.linear_optimum(torch.tensor([2.0, 1.0, 0.3, 0.05], dtype=torch.float64), math.sqrt(0.2))
    torch.testing.assert_close(found.rate, torch.tensor([1.151293, 0.804719, 0.202733, 0.0]).double(), atol=1e-6,
                               rtol=0)
    torch.testing.assert_close(found.distortion, torch.tensor([0.2, 0.2, 0.2, 0.05]).double())
    assert found.active.tolist() == [True, True, True, False]
    assert "keeps 3 of 4" in found.summary()
    fewer = diagnostics.linear_optimum(torch.tensor([0.05, 1.0, 2.0]).double(), math.sqrt(0.2), latent_features=1)
    assert fewer.active.tolist() == [True, False, False]
    assert fewer.distortion.tolist() == pytest.approx([0.2, 1.0, 0.05])


def test_sweep_trades_rate_for_distortion():
    x = digits()[:320]
    points = diagnostics.rate_distortion_sweep(lambda beta: train(x, beta, 40), (0.5, 4.0, 5000.0), x)
    assert [p.beta for p in points] == [0.5, 4.0, 5000.0]
    assert points[0].rate > points[1].rate > points[2].rate
    assert points[0].distortion < points[1].distortion < points[2].distortion
    assert points[2].active == 0 and points[2].rate == pytest.approx(0.0, abs=1e-2)


def test_an_eigenvalue_that_is_no_number_is_no_loss():
    found = diagnostics.linear_optimum(torch.tensor([math.nan, 2.0]), 1.0)
    assert found.rate[0].isnan() and found.rate[1].item() == pytest.approx(0.5 * math.log(2.0))
    assert "not finite" in found.summary() and "loses" not in found.summary()


def test_bad_input_is_named():
    for features, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="^latent_features"):
            diagnostics.linear_optimum(torch.ones(3), 1.0, latent_features=features)
    with pytest.raises(ValueError, match="^batch_size"):
        diagnostics.rate_distortion(vae.MLPVAE((4,), 2, (4,)), torch.zeros(3, 4), batch_size=0)
    with pytest.raises(ValueError, match="^sigma: "):
        diagnostics.linear_optimum(torch.ones(3), 0.0)
    with pytest.raises(ValueError, match="^beta: "):
        diagnostics.linear_optimum(torch.ones(3), 1.0, -1.0)
    with pytest.raises(ValueError, match="^betas: "):
        diagnostics.rate_distortion_sweep(lambda beta: None, [0.0], torch.zeros(2, 3))
