"""Traversals, interpolations and samples of a linear decoder, whose pictures are known."""

import math

import pytest
import torch
from gaussian_models import PPCA, randn

from fastflow import vae

PROBLEM = PPCA(4, 3)


def model():
    return vae.VAE(PROBLEM.encoder(torch.zeros(3, dtype=torch.float64)), PROBLEM.decoder(),
                   likelihood=vae.GaussianLikelihood(0.5))


def test_traversals_are_the_decoders_columns():
    z, values = randn(3, seed=0), torch.tensor([-1.0, 0.5, 2.0])
    found = model().traverse(z, [2, 0], values)
    assert found.shape == (2, 3, 4)
    for row, dim in enumerate((2, 0)):
        for column, value in enumerate(values):
            moved = z.clone()
            moved[dim] = value
            torch.testing.assert_close(found[row, column], PROBLEM.w @ moved + PROBLEM.b)
    assert model().traverse(z).shape == (3, 7, 4)


def test_lines_between_reconstructions():
    start, end, vae_ = PROBLEM.x[:2], PROBLEM.x[2:], model()
    found = vae_.interpolate(start, end, 5)
    ends = vae_.reconstruct(torch.cat([start, end])).view(2, 2, 4)
    weights = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(found, ends[0] + weights * (ends[1] - ends[0]))
    arcs = vae_.interpolate(start, end, 5, path="slerp")
    torch.testing.assert_close(arcs[[0, -1]], ends)
    assert not torch.allclose(arcs, found)


def test_slerp_turns_evenly():
    start, end, weights = randn(6, 2, 2, seed=0), 3 * randn(6, 2, 2, seed=1), torch.linspace(0, 1, 9)
    path = vae.slerp(start, end, weights).flatten(2)
    torch.testing.assert_close(path[0], start.flatten(1))
    torch.testing.assert_close(path[-1], end.flatten(1))
    lengths = path.norm(dim=2)
    torch.testing.assert_close(lengths, lengths[0] + weights.double()[:, None] * (lengths[-1] - lengths[0]))
    unit = path / lengths[..., None]
    angles = torch.acos((unit[1:] * unit[:-1]).sum(2))
    torch.testing.assert_close(angles, angles[:1].expand_as(angles), rtol=1e-6, atol=1e-6)
    # Parallel vectors, opposite ones and zero are joined by lines.
    for other in (2 * start, -start, 0 * start):
        torch.testing.assert_close(vae.slerp(start, other, weights), vae.lerp(start, other, weights))
    # Nearly parallel ones keep their digits.
    near = start + 1e-7 * randn(6, 2, 2, seed=2)
    torch.testing.assert_close(vae.slerp(start, near, weights), vae.lerp(start, near, weights), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_temperature_scales_the_priors_spread_alone(temperature):
    n = 60_000
    x = model().sample(n, temperature=temperature, generator=torch.Generator().manual_seed(0)) - PROBLEM.b
    products = x[:, :, None] * x[:, None]
    expected = temperature**2 * PROBLEM.w @ PROBLEM.w.T + 0.25 * torch.eye(4, dtype=torch.float64)
    assert ((products.mean(0) - expected).abs() < 4.5 * products.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: model().traverse(torch.zeros(3), [3]), "dims"),
    (lambda: model().interpolate(PROBLEM.x, PROBLEM.x, 1), "steps"),
    (lambda: model().interpolate(PROBLEM.x, PROBLEM.x, path="bezier"), "path"),
    (lambda: model().sample(1, temperature=math.inf), "temperature"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
