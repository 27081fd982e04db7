"""Posteriors: densities against torch.distributions and float64 Jacobians, KLs, and gradients through samples."""

import math

import pytest
import torch
from gaussian_models import perturb, randn
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from fastflow import vae

BATCH, D = 4, 3


def of_torch(posterior, params):
    """The same law as a torch.distributions object."""
    if isinstance(posterior, vae.GaussianPosterior):
        mean, log_variance = params.chunk(2, 1)
        return MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
    if isinstance(posterior, vae.LowRankGaussianPosterior):
        d = params.shape[1] // (2 + posterior.rank)
        mean, log_variance, factor = params.split([d, d, d * posterior.rank], 1)
        return LowRankMultivariateNormal(mean, factor.unflatten(1, (d, posterior.rank)), log_variance.exp())
    if isinstance(posterior, vae.FullGaussianPosterior):
        d = D
        lower = torch.diag_embed(params[:, d:2 * d].exp())
        rows, columns = torch.tril_indices(d, d, -1)
        lower[:, rows, columns] = params[:, 2 * d:]
        return MultivariateNormal(params[:, :d], scale_tril=lower)
    c = posterior.n_components
    logits, means, log_variances = params.split([c, c * D, c * D], 1)
    components = Independent(Normal(means.unflatten(1, (c, D)), torch.exp(0.5 * log_variances).unflatten(1, (c, D))), 1)
    return MixtureSameFamily(Categorical(logits=logits), components)


FAMILIES = [vae.GaussianPosterior(), vae.LowRankGaussianPosterior(1), vae.LowRankGaussianPosterior(2),
            vae.FullGaussianPosterior(), vae.MixturePosterior(3)]
FLOWS = {name: perturb(getattr(vae.FlowPosterior, name)(D, context_features=2, hidden=(8,)).double())
         for name in ("iaf", "coupling", "planar", "householder")}


def params_of(posterior, seed=0):
    return 0.7 * randn(BATCH, posterior.n_params(D), seed=seed)


@pytest.mark.parametrize("sigma", [1.0, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_low_rank_density_in_float32_keeps_its_digits(rank, sigma):
    """log q of the sample, known by its noise, the KL and their gradients against float64, which is held against torch
    where that has the digits; of a z as it is rounded log q is as far off as the rounding is wide."""
    posterior, d = vae.LowRankGaussianPosterior(rank), 6
    mean, spread, factor = (randn(BATCH, size, seed=size) for size in (d, d + 1, d * rank + 2))
    params = torch.cat([mean, 2.0 * math.log(sigma) + 0.3 * spread[:, 1:], factor[:, 2:]], 1).float()
    eps, found = randn(5, BATCH, d + rank, seed=1).float(), []
    for dtype in (torch.float32, torch.float64):
        own = params.to(dtype).requires_grad_()
        z, log_q, kl = posterior(own, None, 5, eps=eps.to(dtype))
        slopes = [torch.autograd.grad(t.sum(), own, retain_graph=True)[0] for t in (log_q, kl)]
        found.append([t.detach().double() for t in (log_q, kl, posterior.log_prob(own, z), *slopes)])
    for i, (mine, true) in enumerate(zip(*found, strict=True)):
        atol = 1e-3 + 10.0 * torch.finfo(torch.float32).eps / sigma * d if i == 2 else 1e-4
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=atol)
    law = of_torch(posterior, params.double())
    torch.testing.assert_close(found[1][0], law.log_prob(z.detach()), rtol=0.0, atol=1e-9 + 1e-13 / sigma**2)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_low_rank_kl_is_finite_for_the_smallest_sigma(scale):
    params = torch.cat([torch.zeros(1, 3), torch.full((1, 3), -300.0), scale * torch.tensor([[1.0, 2.0, -1.0]])], 1)
    _, log_q, kl = vae.LowRankGaussianPosterior(1)(params, None, 2, seed=0)
    # log det(diag(v) + w w') = 3 log v + log(1 + |w|^2 / v), of which the 1 is nothing here.
    log_det = -900.0 + scale * (300.0 + math.log(6.0))
    torch.testing.assert_close(kl, torch.tensor([0.5 * (6.0 * scale - 3.0 - log_det)]))
    assert log_q.isfinite().all()


@pytest.mark.parametrize("posterior", FAMILIES, ids=lambda p: type(p).__name__)
def test_densities_and_kl_agree_with_torch(posterior):
    params = params_of(posterior)
    expected = of_torch(posterior, params)
    prior = vae.GaussianPrior((D,)).double()
    with torch.no_grad():
        prior.mean.copy_(randn(1, D, seed=5))
        prior.raw.copy_(0.5 * randn(1, D, seed=6))
    for p in (None, prior):
        z, log_qz, kl = posterior(params, p, 5, seed=2)
        assert z.shape == (5, BATCH, D) and z.dtype == torch.float64
        torch.testing.assert_close(log_qz, expected.log_prob(z), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(posterior.log_prob(params, z), log_qz, rtol=1e-9, atol=1e-9)
        other = 2 * randn(6, BATCH, D, seed=3)
        torch.testing.assert_close(posterior.log_prob(params, other), expected.log_prob(other), rtol=1e-9, atol=1e-9)
        if isinstance(posterior, vae.MixturePosterior):
            assert kl is None
            continue
        zero, one = torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
        target = MultivariateNormal(zero, one) if p is None else MultivariateNormal(
            prior.mean[0], torch.diag(prior.raw[0].exp()))
        dense = MultivariateNormal(expected.mean, expected.covariance_matrix)
        torch.testing.assert_close(kl, kl_divergence(dense, target), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(posterior.mean(params), expected.mean)


@pytest.mark.parametrize("posterior", FAMILIES, ids=lambda p: type(p).__name__)
def test_samples_have_the_moments(posterior):
    n, params = 60_000, params_of(posterior)[:1]
    z = posterior(params.expand(n, -1), None, 1, seed=4)[0][0]
    mean = of_torch(posterior, params).mean[0]
    assert ((z.mean(0) - mean).abs() < 4 * z.std(0) / math.sqrt(n)).all()
    if hasattr(of_torch(posterior, params), "covariance_matrix"):
        covariance = of_torch(posterior, params).covariance_matrix[0]
    else:
        logits, means, log_variances = posterior._split(params)
        second = torch.einsum("bc,bcd,bce->de", logits.exp(), means, means)
        covariance = second + torch.diag((logits.exp()[..., None] * torch.exp(2 * log_variances)).sum((0, 1)))
        covariance = covariance - torch.outer(mean, mean)
    products = (z - mean)[:, :, None] * (z - mean)[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("name", FLOWS)
def test_flow_density_is_the_jacobians(name):
    """log q(z) = log q(z0) - log|det dz/dz0|; the Gaussian's mean moves z0 one to one, so that dz/dz0 = dz/dmean."""
    posterior = FLOWS[name]
    params, eps = params_of(posterior), randn(1, BATCH, D, seed=1)
    z, log_qz, kl = posterior(params, None, 1, eps=eps)

    def sample(mean, b):
        row = torch.cat([mean, params[b, D:]])
        return posterior(row[None], None, 1, eps=eps[:, b:b + 1])[0][0, 0]

    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda mean, b=b: sample(mean, b), params[b, :D])
                            for b in range(BATCH)])
    sigma = torch.exp(0.5 * params[:, D:2 * D])
    log_start = Normal(0.0, sigma).log_prob(sigma * eps[0]).sum(1)
    torch.testing.assert_close(log_qz[0], log_start - torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.log_prob(params, z), log_qz, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(z, posterior.base(params[:, :-2], None, 1, eps=eps)[0])  # no identity is tested
    assert (kl is None) == (name != "householder")
    assert posterior.mean(params).shape == (BATCH, D)


def test_householder_is_a_full_gaussian_with_the_gaussians_kl():
    posterior = FLOWS["householder"]
    params = params_of(posterior)[:1]
    n = 20_000
    z, log_qz, kl = posterior(params.expand(n, -1), None, 1, seed=1)
    log_pz = Normal(0.0, 1.0).log_prob(z).sum(2)
    samples = (log_qz - log_pz)[0]
    assert abs(samples.mean() - kl[0]) < 4 * samples.std() / math.sqrt(n)
    base, context = posterior._split(params)
    eye = torch.eye(D, dtype=torch.float64)
    matrix = posterior.transform.inverse(eye, context.expand(D, -1))[0].T
    torch.testing.assert_close(matrix @ matrix.T, eye)
    mean, log_sigma = posterior.base.moments(base)
    expected = MultivariateNormal(matrix @ mean[0], matrix @ torch.diag(torch.exp(2 * log_sigma[0])) @ matrix.T)
    torch.testing.assert_close(log_qz[0], expected.log_prob(z[0]))


def test_flow_without_context_over_maps():
    """A flow of images' latents, by any transform; the K samples are flattened for it."""
    from fastflow.nn import InvertibleConv1x1

    posterior = vae.FlowPosterior(perturb(InvertibleConv1x1(2).double()))
    params = randn(BATCH, 4, 3, 3, seed=0)
    z, log_qz, _ = posterior(params, None, 2, seed=0)
    assert z.shape == (2, BATCH, 2, 3, 3)
    torch.testing.assert_close(posterior.log_prob(params, z), log_qz)


@pytest.mark.parametrize("posterior", [*FAMILIES, *FLOWS.values()], ids=[*(type(p).__name__ for p in FAMILIES),
                                                                         *FLOWS])
def test_noise_is_reproducible_and_nested(posterior):
    params = params_of(posterior)
    five = posterior(params, None, 5, seed=8)[0]
    torch.testing.assert_close(posterior(params, None, 2, seed=8)[0], five[:2])
    assert not torch.allclose(posterior(params, None, 5, seed=9)[0], five)
    torch.manual_seed(1)
    first = posterior(params, None, 1)[0]
    torch.manual_seed(1)
    assert torch.equal(first, posterior(params, None, 1)[0])


def mixture_moment(params, matrix, vector, c):
    """E z'Mz + v'z of a mixture in closed form."""
    logits, means, log_variances = params.split([c, c * D, c * D], 1)
    means, variances = means.unflatten(1, (c, D)), log_variances.exp().unflatten(1, (c, D))
    each = (torch.einsum("bcd,de,bce->bc", means, matrix, means) + (variances * matrix.diagonal()).sum(2)
            + means @ vector)
    return (torch.softmax(logits, 1) * each).sum(1)


def test_mixture_gradients_are_unbiased():
    """Of E f(z), f quadratic, for weights, means and variances; without the implicit map the weights get none."""
    posterior, n = vae.MixturePosterior(3), 40_000
    start = params_of(posterior)[:1]
    matrix, vector = randn(D, D, seed=1), randn(D, seed=2)
    leaf = start.clone().requires_grad_()
    exact, = torch.autograd.grad(mixture_moment(leaf, matrix, vector, 3).sum(), leaf)
    rows = start.expand(n, -1).clone().requires_grad_()
    z = posterior(rows, None, 1, seed=3)[0][0]
    value = torch.einsum("bd,de,be->b", z, matrix, z) + z @ vector
    assert abs(value.mean() - mixture_moment(start, matrix, vector, 3)) < 4 * value.std() / math.sqrt(n)
    each, = torch.autograd.grad(value.sum(), rows)
    error, tolerance = each.mean(0) - exact[0], 4 * each.std(0) / math.sqrt(n)
    assert (error.abs() < tolerance).all()
    assert (exact[0, :3].abs() > tolerance[:3]).any()  # leaving the weights out would be seen


def test_one_component_is_a_gaussian():
    """The implicit map is then mean + sigma eps, gradient and all."""
    posterior = vae.MixturePosterior(1)
    params = params_of(posterior).requires_grad_()
    cotangent = randn(1, BATCH, D, seed=4)
    z = posterior(params, None, 1, seed=1)[0]
    mean, log_variance = params[:, 1:].chunk(2, 1)
    plain = mean + torch.exp(0.5 * log_variance) * ((z - mean) * torch.exp(-0.5 * log_variance)).detach()
    torch.testing.assert_close(torch.autograd.grad(z, params, cotangent), torch.autograd.grad(plain, params, cotangent))


def functions(z, row):
    """F(z) (D,) of three components."""
    logits, means, log_variances = row[:3], row[3:12].view(3, D), row[12:].view(3, D)
    components = Normal(means, torch.exp(0.5 * log_variances), validate_args=False)
    log_weights, found = torch.log_softmax(logits, 0), []
    for d in range(D):
        found.append((torch.softmax(log_weights, 0) * components.cdf(z)[:, d]).sum())
        log_weights = log_weights + components.log_prob(z)[:, d]
    return torch.stack(found)


def test_implicit_map_holds_the_distribution_functions():
    """dz/dparams = -(dF/dz)^-1 dF/dparams, both by autograd of F itself."""
    posterior = vae.MixturePosterior(3)
    params = params_of(posterior).requires_grad_()
    z = posterior(params, None, 1, seed=1)[0][0]
    cotangent = randn(BATCH, D, seed=4)
    got, = torch.autograd.grad(z, params, cotangent)
    by_z, by_row = vmap(jacrev(functions, argnums=(0, 1)))(z.detach(), params.detach())
    expected = -torch.einsum("bd,bdp->bp", cotangent, torch.linalg.solve(by_z, by_row))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_second_derivatives_of_the_implicit_map():
    """By differences of the z that Newton's method finds to the F of the sample; so by every way to differentiate."""
    posterior = vae.MixturePosterior(3)
    params, weight, direction = params_of(posterior), randn(BATCH, D, seed=4), randn(BATCH, 21, seed=5)
    sample = posterior(params, None, 1, seed=1)[0][0]
    levels = vmap(functions)(sample, params)

    def at(size):
        z, moved = sample, params + size * direction
        for _ in range(6):
            residual = vmap(functions)(z, moved) - levels
            z = z - torch.linalg.solve(vmap(jacrev(functions))(z, moved), residual[..., None])[..., 0]
        return (weight * z**3).sum()

    def value(size):
        return (weight * posterior(params + size * direction, None, 1, seed=1)[0][0] ** 3).sum()

    h, zero = 1e-3, torch.zeros((), dtype=torch.float64)
    first = (8 * (at(h) - at(-h)) - at(2 * h) + at(-2 * h)) / (12 * h)
    second = (16 * (at(h) + at(-h)) - 30 * at(0.0) - at(2 * h) - at(-2 * h)) / (12 * h * h)
    leaf = zero.clone().requires_grad_()
    once, = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    for got in (once.detach(), jvp(value, (zero,), (zero + 1,))[1], grad(value)(zero)):
        torch.testing.assert_close(got, first, rtol=1e-7, atol=1e-7)
    for got in (torch.autograd.grad(once, leaf)[0], torch.autograd.functional.hessian(value, zero, vectorize=True),
                grad(grad(value))(zero), jvp(grad(value), (zero,), (zero + 1,))[1], jacfwd(jacfwd(value))(zero)):
        torch.testing.assert_close(got, second, rtol=1e-5, atol=1e-5)


def test_deterministic_limit():
    """z is the mean bit for bit without a random number; density and KL are a narrow Gaussian's, finite in gradient."""
    posterior, gaussian = vae.DeterministicPosterior(1e-4), vae.GaussianPosterior("logstd")
    mean = randn(BATCH, D, seed=0).requires_grad_()
    state = torch.get_rng_state()
    z, log_qz, kl = posterior(mean, None, 3)
    assert torch.equal(z, mean.expand(3, -1, -1)) and torch.equal(torch.get_rng_state(), state)
    narrow = torch.cat([mean, torch.full_like(mean, math.log(1e-4))], 1)
    zeros = torch.zeros(3, BATCH, D, dtype=torch.float64)
    expected = gaussian(narrow, None, 3, eps=zeros)
    torch.testing.assert_close((z, log_qz, kl), expected)
    gradient, = torch.autograd.grad(kl.sum(), mean)
    torch.testing.assert_close(gradient, mean.detach())
    torch.testing.assert_close(posterior.log_prob(mean, z), log_qz)
    assert posterior(mean, vae.MixturePrior(D, 2).double())[2] is None


POSTERIORS = (vae.GaussianPosterior, vae.LowRankGaussianPosterior, vae.FullGaussianPosterior, vae.MixturePosterior,
              vae.DeterministicPosterior, lambda: vae.FlowPosterior.iaf(2))


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.LowRankGaussianPosterior(0), "rank"),
    (ValueError, lambda: vae.MixturePosterior(0), "n_components"),
    (ValueError, lambda: vae.DeterministicPosterior(0.0), "sigma"),
    (ValueError, lambda: vae.FullGaussianPosterior()(torch.zeros(2, 4)), "params"),
    (ValueError, lambda: vae.LowRankGaussianPosterior(2)(torch.zeros(2, 6)), "params"),
    (ValueError, lambda: vae.MixturePosterior(2)(torch.zeros(2, 7)), "params"),
    (TypeError, lambda: vae.FlowPosterior(torch.nn.ReLU()), "transform"),
    (ValueError, lambda: vae.FlowPosterior.iaf(2, context_features=-1), "context_features"),
    (ValueError, lambda: vae.FlowPosterior.planar(2, context_features=3)(torch.zeros(2, 2)), "params"),
    (ValueError, lambda: vae.FlowPosterior.householder(2, 0), "n_reflections"),
    *((TypeError, lambda make=make, call=call: call(make()), "^params: expected a torch.Tensor, got int")
      for make in (*POSTERIORS, lambda: vae.DeltaGaussianPosterior(0.1))
      for call in (lambda posterior: posterior(3), lambda posterior: posterior.mean(3))),
    *((error, lambda make=make, z=z: make().log_prob(torch.zeros(3, make().n_params(2)), z), f"^z: {words}")
      for make in POSTERIORS
      for error, z, words in ((ValueError, torch.zeros(2, 3, 5), r"expected shape \(K, 3, 2\), got \(2, 3, 5\)"),
                              (ValueError, torch.zeros(2, 3, 2, device="meta"), "expected device cpu like params"),
                              (TypeError, 3, "expected a torch.Tensor"))),
    (TypeError, lambda: vae.GaussianPosterior().log_prob(torch.zeros(3, 4), torch.zeros(2, 3, 2).double()),
     "^params: expected float64 like z"),
    *((ValueError, lambda name=name: getattr(vae.GaussianPosterior(), name)(torch.zeros(2, 3)),
       r"^params: expected shape \(B, 2D, \*S\), got \(2, 3\)") for name in ("mean", "moments")),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
