"""Hierarchies: a linear Gaussian one in closed form, and what the levels promise."""

import math

import pytest
import torch
from gaussian_hierarchy import COVARIANCE, EVIDENCE, S1, A, B, C, Twice, W, X, hierarchy, true_posterior
from gaussian_models import randn
from torch import nn
from torch.distributions import Normal, kl_divergence

from fastflow import backends, vae


@pytest.mark.parametrize("mode", ["residual", "absolute", "ladder"])
def test_at_the_true_posterior_the_bound_is_the_evidence(mode):
    """Every log-weight is log p(x), whatever the noise."""
    bound = hierarchy(mode).elbo(X, 7, seed=1)
    torch.testing.assert_close(bound.log_w, EVIDENCE.expand(7, -1), rtol=0, atol=1e-11)
    torch.testing.assert_close(vae.iwae(bound.log_w), EVIDENCE, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["residual", "absolute"])
def test_gap_is_the_kl_of_the_whole_posterior(mode):
    """With every log-variance off by s the KL is (e^s - 1 - s)/2 for each of the three latents: the conditional means
    are right. Quadratures exact for quadratics take the expectations."""
    shift = 0.7
    model, exact = hierarchy(mode, shift), hierarchy(mode)
    # Gauss-Hermite points of z2 times sigma points of z1.
    root = math.sqrt(3.0)
    outer = [(-root, 1 / 6), (0.0, 2 / 3), (root, 1 / 6)]
    inner = torch.cat([torch.eye(2), -torch.eye(2)]).double() * math.sqrt(2)
    value = 0.0
    for point, weight in outer:
        eps = [torch.full((4, 5, 1), point, dtype=torch.float64), inner[:, None].expand(4, 5, 2)]
        terms = model.infer(X, 4, eps=eps)
        value = value + weight * (terms.log_px_z - terms.kl.sum(0)).mean(0)
    expected = 3 * 0.5 * (math.expm1(shift) - shift)
    torch.testing.assert_close(EVIDENCE - value, torch.full((5,), expected, dtype=torch.float64), rtol=0, atol=1e-11)
    assert (model.elbo(X, 4000, seed=0).elbo < exact.elbo(X, 4000, seed=0).elbo).all()


def test_terms_add_up_and_nest():
    model, eps = hierarchy("residual"), [randn(3, 5, 1, seed=1), randn(3, 5, 2, seed=2)]
    terms, bound = model.infer(X, 3, eps=eps), model.elbo(X, 3, 0.5, eps=eps)
    assert [z.shape for z in terms.latents] == [(3, 5, 1), (3, 5, 2)]
    assert terms.log_pz.shape == terms.log_qz.shape == terms.kl.shape == (2, 3, 5)
    torch.testing.assert_close(bound.log_pz, terms.log_pz.sum(0))
    torch.testing.assert_close(bound.kl, terms.kl.sum(0).mean(0))
    torch.testing.assert_close(bound.elbo, -bound.distortion - 0.5 * bound.kl)
    z2, z1 = terms.latents
    torch.testing.assert_close(terms.log_pz[0], Normal(0.0, 1.0).log_prob(z2[..., 0]))
    given = Normal(z2 @ A.T + C, S1.sqrt())
    torch.testing.assert_close(terms.log_pz[1], given.log_prob(z1).sum(2))
    # Each level's KL is that of its Gaussians.
    mean, log_variance = model.levels[0].posterior(torch.cat([model.top.expand(5, 1), X], 1)).unbind(1)
    expected = kl_divergence(Normal(mean, torch.exp(0.5 * log_variance)), Normal(0.0, 1.0))
    torch.testing.assert_close(terms.kl[0], expected.expand(3, 5))
    mean, log_variance = model.levels[1].posterior(torch.cat([z2, X.expand(3, 5, 4)], 2)).chunk(2, 2)
    mean = mean + z2 @ A.T + C  # residual
    sigma = torch.exp(0.5 * (log_variance + S1.log()))
    torch.testing.assert_close(terms.kl[1], kl_divergence(Normal(mean, sigma), given).sum(2))


def test_levels_have_independent_noise():
    """Of one seed the levels take different numbers, reproducibly."""
    model = hierarchy("residual")
    z2, z1 = model.infer(X, 4000, seed=3).latents
    again = model.infer(X, 4000, seed=3).latents
    assert torch.equal(z1, again[1])
    (_, _), (low_weight, low_bias) = true_posterior()
    noise1 = z1 - (torch.cat([z2, X.expand(4000, 5, 4)], 2) @ low_weight[:2].T + low_bias[:2])
    noise2 = z2 - z2.mean(0)
    correlation = (noise1[:, :, 0] * noise2[:, :, 0]).mean() / (noise1[:, :, 0].std() * noise2.std())
    assert correlation.abs() < 4 / math.sqrt(20_000)


def test_ancestral_samples_have_the_covariance():
    n = 60_000
    model = hierarchy("absolute")
    x = model.sample(n, generator=torch.Generator().manual_seed(0))
    products = (x - B - W @ C)[:, :, None] * (x - B - W @ C)[:, None]
    assert ((products.mean(0) - COVARIANCE).abs() < 4.5 * products.std(0) / math.sqrt(n)).all()
    # Temperatures level by level: with the top at 0 its part of the covariance is gone.
    z = model.sample(n, generator=torch.Generator().manual_seed(0), temperature=[0.0, 1.0], mean=True)
    expected = W @ torch.diag(S1) @ W.T
    products = (z - B - W @ C)[:, :, None] * (z - B - W @ C)[:, None]
    assert ((products.mean(0) - expected).abs() < 4.5 * products.std(0) / math.sqrt(n)).all()
    torch.testing.assert_close(model.sample(2, temperature=0.0, mean=True), (B + W @ C).expand(2, 4))


def test_reconstruction_level_by_level():
    model = hierarchy("absolute")
    (top, top_bias), (low, low_bias) = true_posterior()
    z2 = X @ top[:1].T + top_bias[:1]
    z1 = torch.cat([z2, X], 1) @ low[:2].T + low_bias[:2]
    torch.testing.assert_close(model.reconstruct(X), z1 @ W.T + B)
    torch.testing.assert_close(model.reconstruct(X, 1), (z2 @ A.T + C) @ W.T + B)
    torch.testing.assert_close(model.reconstruct(X, 0), (B + W @ C).expand(5, 4))


@pytest.mark.parametrize(("make", "mode"), [
    (lambda: vae.HVAE((1, 8, 8), (3, 5, 4), 16), "ladder"),
    (lambda: vae.HVAE((6,), (2, 3), 16, mode="residual", likelihood="gaussian"), "residual"),
    (lambda: vae.NVAE((1, 8, 8), (2, 1), channels=8, latent_channels=3), "residual"),
    (lambda: vae.VDVAE((3, 8, 8), (1, 2), channels=8, latent_channels=2,
                       likelihood=vae.LogisticMixtureLikelihood(3, 2, 16)), "absolute"),
], ids=["ladder", "residual", "nvae", "vdvae"])
def test_ready_hierarchies(make, mode):
    torch.manual_seed(0)
    model = make()
    assert all(level.mode == mode for level in model.levels)
    shape = (6,) if isinstance(model.likelihood, vae.GaussianLikelihood) else (
        (3, 8, 8) if isinstance(model.likelihood, vae.LogisticMixtureLikelihood) else (1, 8, 8))
    x = torch.randint(0, 16 if shape[0] == 3 else 2, (4, *shape)).float()
    bound = model(x, n_samples=2, seed=0)
    assert bound.log_w.shape == (2, 4) and (bound.kl >= 0).all() and bound.elbo.isfinite().all()
    if mode == "residual":
        torch.testing.assert_close(bound.kl, torch.zeros(4))  # residual posteriors start at the prior
    bound.elbo.sum().backward()
    assert model.sample(3).shape == model.reconstruct(x[:3], 1).shape == (3, *shape)
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, missing


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.Level(None, None, None, mode="relative"), "mode"),
    (ValueError, lambda: vae.HierarchicalVAE(Twice(), [], nn.Identity(), vae.BernoulliLikelihood(), (1,)), "levels"),
    (TypeError, lambda: vae.HierarchicalVAE(Twice(), hierarchy("absolute").levels, nn.Identity(), "bernoulli", (1,)),
     "likelihood"),
    (ValueError, lambda: hierarchy("absolute").sample(2, temperature=[1.0]), "temperature"),
    (ValueError, lambda: hierarchy("absolute").elbo(X, eps=[X]), "eps"),
    (ValueError, lambda: hierarchy("absolute").reconstruct(X, 3), "n_levels"),
    (ValueError, lambda: vae.NVAE((1, 6, 8), (1, 1)), "image_shape"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()


def small(mode, n_levels=4, hidden=12):
    """An HVAE away from the zeros that it starts from, in float64, and images."""
    torch.manual_seed(0)
    model = vae.HVAE((1, 4, 4), tuple(range(2, 2 + n_levels)), hidden, mode=mode).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, (torch.rand(70, 1, 4, 4) > 0.5).double()


@pytest.mark.parametrize("hooked", [False, True], ids=["one kernel", "level by level"])
@pytest.mark.parametrize(("error", "seed"), [
    (ValueError, 2**64), (TypeError, 0.5), (TypeError, torch.tensor(1.0)),
    (ValueError, torch.zeros(70, dtype=torch.int64))])
def test_a_seed_is_refused_whatever_runs_the_levels(error, seed, hooked):
    model, x = small("ladder", 2)
    if hooked:
        for level in model.levels:
            level.merge.register_forward_hook(lambda *call: None)
    assert model.explain(x).startswith("0 of 2" if hooked else "2 of 2")
    with pytest.raises(error, match="^seed: "):
        model.infer(x, seed=seed)


def figures(model, x, eps):
    """The terms of two samples, and the gradient of a loss that takes all of them."""
    terms = model.infer(x, 2, eps=eps)
    weights = torch.linspace(0.5, 1.5, terms.kl.numel(), dtype=x.dtype).view_as(terms.kl)
    loss = terms.log_px_z.sum() + (weights * (terms.kl + terms.log_pz - terms.log_qz)).sum()
    loss = loss + sum(z.square().sum() for z in terms.latents)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [*terms.latents, *terms[1:], *grads]


@pytest.mark.parametrize("mode", ["residual", "absolute", "ladder"])
def test_levels_together_are_the_levels_one_by_one(mode):
    """Terms, latents and gradients of every parameter, the levels in one kernel, in two runs with a level between that
    has a hook or an activation that no kernel knows, and all in eager PyTorch."""
    model, x = small(mode)
    eps = [torch.randn(2, 70, d, dtype=torch.float64) for d in (2, 3, 4, 5)]
    assert model.explain(x) == "4 of 4 levels in 1 kernel on cpu"
    together = figures(model, x, eps)
    with backends.use_backend("reference"):
        assert model.explain(x).startswith("level by level: ")
        alone = figures(model, x, eps)
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    seen = []
    handle = model.levels[2].merge.network[1].register_forward_hook(lambda *call: seen.append(1))
    assert model.explain(x) == "3 of 4 levels in 2 kernels on cpu; not 2: it has a hook or a method of its own"
    torch.testing.assert_close(figures(model, x, eps), alone, rtol=1e-10, atol=1e-10)
    assert seen == [1]
    handle.remove()
    model.levels[0].prior[1] = nn.GELU()
    assert model.explain(x) == ("3 of 4 levels in 1 kernel on cpu; not 0: a network's activation GELU is none of one "
                                "kind among ReLU, SiLU, Tanh")
    changed = figures(model, x, eps)
    with backends.use_backend("reference"):
        torch.testing.assert_close(changed, figures(model, x, eps), rtol=1e-10, atol=1e-10)


def test_noise_is_the_same_however_the_levels_run():
    """Up to the rounding of the normals, which are float32."""
    model, x = small("residual")
    together = model.elbo(x, 3, seed=5)
    model.levels[1].prior.register_forward_hook(lambda *call: None)
    torch.testing.assert_close(model.elbo(x, 3, seed=5), together, rtol=1e-12, atol=1e-12)


def test_explain_says_why_no_level_fits():
    model, x = small("residual")
    assert "autocast" in _explained(model, x, torch.autocast("cpu", torch.bfloat16))
    wide = vae.HVAE((1, 4, 4), (2, 2), 300)
    assert wide.explain(x.float()) == ("0 of 2 levels in no kernel; not 0, 1: a network of it has a layer of more than "
                                       "256")
    assert vae.NVAE((1, 8, 8), (1, 1)).explain(torch.zeros(2, 1, 8, 8)).startswith("level by level: the state")


def _explained(model, x, context):
    with context:
        return model.explain(x)
