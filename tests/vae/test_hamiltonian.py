"""Hamiltonian posteriors on probabilistic PCA: volumes by float64 Jacobians, weights whose mean is the evidence."""

import math

import pytest
import torch
from gaussian_models import PPCA, randn, sigma_points

from fastflow import vae

PROBLEM = PPCA(3, 2)


def model(shift=1.0, **options):
    return vae.HamiltonianVAE(PROBLEM.encoder(shift - PROBLEM.precision.diagonal().log()), PROBLEM.decoder(),
                              likelihood=vae.GaussianLikelihood(math.sqrt(PROBLEM.s2)), **options).double()


@pytest.mark.parametrize("beta_zero", [0.2, 0.95])
def test_density_is_the_jacobians(beta_zero):
    """log q(z, m) = log q(z_0) + log N(m_0; 0, I / beta_0) - log|det of the whole map|, which is beta_0^(D/2)."""
    hvae, x, eps = model(n_steps=3, step_size=0.2, beta_zero=beta_zero), PROBLEM.x[:1], randn(1, 1, 4, seed=0)
    beta_zero = torch.sigmoid(hvae.logit_beta).item()  # as it was rounded
    start = hvae.posterior(hvae.encoder(x), None, 1, eps=eps[:, :, :2])[0].detach()

    def ends(start):
        z, momentum = hvae.evolve(x, start[None, None, :2], math.sqrt(beta_zero) * start[None, None, 2:])
        return torch.cat([z, momentum], 2)[0, 0]

    first = torch.cat([start[0, 0], eps[0, 0, 2:] / math.sqrt(beta_zero)])
    jacobian = torch.autograd.functional.jacobian(ends, first)
    log_det = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_det.item(), math.log(beta_zero), rtol=0, atol=1e-10)
    inference = hvae.infer(x, 1, eps=eps)
    torch.testing.assert_close(inference.z[0, 0], ends(first)[:2])
    normal = lambda m: -0.5 * (m.square() + math.log(2 * math.pi)).sum()  # noqa: E731
    log_q = hvae.posterior.log_prob(hvae.encoder(x), start)[0, 0] + normal(eps[0, 0, 2:]) + math.log(beta_zero)
    torch.testing.assert_close(inference.log_qz[0, 0], log_q - log_det - normal(ends(first)[2:]))


def test_weights_average_to_the_evidence():
    """E exp(log_w) = p(x), whatever the steps; and steps bring a poor posterior's bound nearer to it."""
    n, evidence, bounds = 20_000, PROBLEM.log_p()[0], []
    for n_steps in (0, 1, 3):
        with torch.no_grad():
            log_w = model(n_steps=n_steps, step_size=0.1, beta_zero=0.6).elbo(PROBLEM.x[:1], n, seed=1).log_w[:, 0]
        ratio = torch.exp(log_w - evidence)
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(n)
        bounds.append(log_w.mean())
        assert bounds[-1] < evidence
    assert evidence - bounds[2] < 0.6 * (evidence - bounds[0])


def test_without_steps_it_is_the_plain_vae():
    eps = sigma_points(2, 4)
    plain = vae.VAE(model().encoder, model().decoder, likelihood=model().likelihood)
    found = model(n_steps=0).elbo(PROBLEM.x, 4, eps=torch.cat([eps, randn(4, 4, 2, seed=0)], 2))
    expected = plain.elbo(PROBLEM.x, 4, eps=eps)
    torch.testing.assert_close(found.log_w, expected.log_w)
    torch.testing.assert_close(found.kl, expected.kl_monte_carlo)


def test_inference_mode_gives_what_no_grad_gives():
    hvae, found = model(), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x, z, noise = (t.clone() for t in (PROBLEM.x, randn(3, 4, 2, seed=0), randn(3, 4, 2, seed=1)))
            found.append((hvae.elbo(x, 3, seed=1).log_w, *hvae.evolve(x, z, noise)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_gradients_and_objectives():
    """Everything is trained, step and temperature as central differences say; penalties see the moved samples."""
    hvae, eps = model(step_size=0.2), randn(2, 4, 4, seed=3)
    hvae.elbo(PROBLEM.x, 2, eps=eps).elbo.sum().backward()
    assert all(p.grad is not None for p in hvae.parameters())
    for name in ("log_step", "logit_beta"):
        values = []
        for move in (1e-6, -1e-6):
            other = model(step_size=0.2)
            with torch.no_grad():
                getattr(other, name).add_(move)
                values.append(other.elbo(PROBLEM.x, 2, eps=eps).elbo.sum())
        torch.testing.assert_close(getattr(hvae, name).grad[0], (values[0] - values[1]) / 2e-6, rtol=1e-6, atol=1e-7)
    hvae.objective = vae.PenalizedELBO(beta=0.5)
    result = hvae(PROBLEM.x, n_samples=2, eps=eps)
    torch.testing.assert_close(result.value, -result.distortion - 0.5 * result.rate)
    torch.testing.assert_close(result.bound.log_w, hvae.elbo(PROBLEM.x, 2, eps=eps).log_w)
    assert hvae.sample(3).shape == hvae.reconstruct(PROBLEM.x[:3]).shape == (3, 3)
    torch.testing.assert_close(hvae.elbo(PROBLEM.x, seed=2).elbo, hvae.elbo(PROBLEM.x, seed=2).elbo)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: model(n_steps=-1), "n_steps"), (lambda: model(step_size=0.0), "step_size"),
    (lambda: model(beta_zero=1.0), "beta_zero"), (lambda: model().elbo(PROBLEM.x, kl="analytic"), "kl"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
