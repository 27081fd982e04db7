"""Two-dimensional targets: normalised, sampled from their own density, exact where a closed form or quadrature says."""

import math

import pytest
import torch

from fastflow.data import toy2d

TARGETS = {**toy2d.TARGETS, "wide ring": toy2d.Ring(0.5, 0.8), "one gaussian": toy2d.GaussianMixture(1, 0.7, 0.5),
           "two by two": toy2d.Checkerboard(2, 1.0), "sharp moons": toy2d.Moons(0.05, 1.0)}
every_target = pytest.mark.parametrize("name", TARGETS)


def grid(n=480, half_width=4.8):
    """Midpoints, which don't meet the edges of the squares, and the area of a cell."""
    step = 2 * half_width / n
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) * step - half_width
    return torch.cartesian_prod(axis, axis), step**2


@every_target
def test_it_integrates_to_one_and_its_samples_follow_it(name):
    """Quadrature gives the entropy and the probabilities of a partition; samples must agree within 4.5 deviations."""
    target = TARGETS[name]
    points, area = grid()
    log_prob = target.log_prob(points)
    mass = log_prob.exp() * area
    assert abs(mass.sum() - 1.0) < (1e-5 if name == "wide ring" else 1e-8)  # that one has a cusp at the origin
    entropy = -torch.where(mass > 0, mass * log_prob, 0.0).sum().item()
    n = 40_000
    x = target.sample(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = target.log_prob(x)
    assert abs(-own.mean() - entropy) < 4.5 * own.std() / math.sqrt(n) + 1e-6
    cells = [((p + 4.8) / 0.8).floor().clamp(0, 11).long() @ torch.tensor([12, 1]) for p in (points, x)]
    expected = torch.zeros(144, dtype=torch.float64).index_add(0, cells[0], mass)
    found = torch.bincount(cells[1], minlength=144) / n
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all()


def test_closed_forms():
    x = torch.randn(50, 2, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(torch.tensor([0.7, 0.0]).double(), 0.25 * torch.eye(2).double())
    torch.testing.assert_close(TARGETS["one gaussian"].log_prob(x), normal.log_prob(x))
    # radius far below sigma: a ring is a Gaussian
    flat = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    torch.testing.assert_close(toy2d.Ring(1e-9, 1.0).log_prob(x), flat.log_prob(x), rtol=1e-7, atol=1e-7)
    board = toy2d.Checkerboard()
    inside, outside = torch.tensor([[-1.5, -1.5], [0.5, 0.5]]), torch.tensor([[-0.5, -1.5], [2.5, 2.5], [-9.0, 0.5]])
    assert (board.log_prob(inside) == -math.log(8.0)).all() and torch.isneginf(board.log_prob(outside)).all()
    # the rule of 192 nodes against one of 500
    torch.testing.assert_close(toy2d.Moons().log_prob(x), toy2d.Moons(n_nodes=500).log_prob(x), rtol=1e-9, atol=1e-9)


@every_target
def test_dtypes_generators_and_nan(name):
    target = TARGETS[name]
    draws = [target.sample(5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws) and draws[0].dtype == torch.float32 and draws[0].shape == (5, 2)
    assert target.log_prob(draws[0]).dtype == torch.float32 and target.log_prob(draws[0][:0]).shape == (0,)
    assert target.log_prob(torch.tensor([[math.nan, 0.5]])).isnan().all() and type(target).__name__ in repr(target)


def test_kl_divergence_is_that_of_two_gaussians():
    """KL(N(m, s^2 I) || N(0, I)) = |m|^2/2 + s^2 - 1 - 2 log s in two dimensions."""
    target, normal = toy2d.GaussianMixture(1, 0.7, 0.5), torch.distributions.Normal(0.0, 1.0)
    exact = 0.245 + 0.25 - 1.0 - 2.0 * math.log(0.5)
    kl, error = toy2d.kl_divergence(target, lambda x: normal.log_prob(x).sum(1), 50_000,
                                    generator=torch.Generator().manual_seed(0))
    assert abs(kl - exact) < 4.0 * error and error < 0.01
    assert toy2d.kl_divergence(target, target.log_prob, 100, dtype=torch.float64) == (0.0, 0.0)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: toy2d.GaussianMixture(0), ValueError, "n_components"),
    (lambda: toy2d.Ring(sigma=0.0), ValueError, "sigma"), (lambda: toy2d.Ring(sigma="a"), TypeError, "sigma"),
    (lambda: toy2d.Checkerboard(3), ValueError, "squares"), (lambda: toy2d.Moons(n_nodes=0), ValueError, "n_nodes"),
    (lambda: toy2d.Moons(scale=math.inf), ValueError, "scale"),
    (lambda: toy2d.Ring().log_prob(torch.zeros(3)), ValueError, "x"),
    (lambda: toy2d.Ring().log_prob(torch.zeros(3, 2).long()), TypeError, "x"),
    (lambda: toy2d.kl_divergence(toy2d.Ring(), None, 1), ValueError, "n")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=f"^{match}"):
        call()
