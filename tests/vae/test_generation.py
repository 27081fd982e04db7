"""Traversals, interpolations and samples of a linear decoder, whose pictures are known."""

import math

import pytest
import torch
from gaussian_models import PPCA, perturb, randn
from torch import nn

from fastflow import diagnostics, vae

PROBLEM = PPCA(4, 3)


def model():
    return vae.VAE(PROBLEM.encoder(torch.zeros(3, dtype=torch.float64)), PROBLEM.decoder(),
                   likelihood=vae.GaussianLikelihood(0.5))


def test_a_convolutional_model_is_bound_to_no_extent_but_the_given_one():
    """What a first call has shown is no shape for all others; the number of channels stays."""
    networks = nn.Conv2d(1, 4, 3, 2, 1), nn.ConvTranspose2d(2, 1, 4, 2, 1)
    free, given = vae.VAE(*networks), vae.VAE(*networks, latent_shape=(2, 4, 4))
    quantized = vae.QuantizedVAE(networks[0], vae.VectorQuantizer(5, 4), nn.ConvTranspose2d(4, 1, 4, 2, 1),
                                 vae.BernoulliLikelihood())
    for one in (free, given, quantized):
        one.elbo(torch.rand(2, 1, 8, 8).round())
    y = torch.rand(2, 1, 16, 16).round()
    z = free.encode(y)[0]
    assert free.traverse(z, [0], [0.5]).shape == (1, 1, 1, 16, 16)
    assert quantized.traverse(quantized.codes(y)[0], [0, 63]).shape == (2, 5, 1, 16, 16)
    diagnostics.diagnose(free, y)
    for call, message in ((lambda: given.traverse(z), r"^z: expected shape \(2, 4, 4\), got \(2, 8, 8\)"),
                          (lambda: free.traverse(z[:1]), r"^z: expected shape \(2, 8, 8\), got \(1, 8, 8\)"),
                          (lambda: free.traverse(z[0]), r"^z: expected shape \(2, 4, 4\), got \(8, 8\)"),
                          (lambda: quantized.traverse(torch.zeros(8, dtype=torch.int64)), "^codes: expected shape")):
        with pytest.raises(ValueError, match=message):
            call()
    assert free.sample(1).shape == (1, 1, 8, 8)


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


def moves(found, decode, point, dims, values):
    """That row by row the pictures are those of the point with one element set."""
    for row, dim in enumerate(dims):
        for column, value in enumerate(values):
            changed = point.clone()
            changed.view(-1)[dim] = value
            torch.testing.assert_close(found[row, column], decode(changed))


@torch.no_grad()
def test_hierarchies_move_along_one_level_and_between_two_data():
    torch.manual_seed(0)
    hierarchy, x = perturb(vae.HVAE((6,), (2, 3), 8).double()), (randn(4, 6, seed=0) > 0).double()
    latents = [z[0] for z in hierarchy.encode(x)]
    values = torch.tensor([-1.0, 0.5])
    for level in (0, 1):
        def decode(z, level=level):
            rows = [z if i == level else other for i, other in enumerate(latents)]
            return hierarchy.likelihood.mean(hierarchy.decode([row[None] for row in rows]))[0]

        moves(hierarchy.traverse(latents, [1, 0], values, level=level), decode, latents[level], [1, 0], values)
    assert hierarchy.traverse(latents, level=1).shape == (3, 7, 6)
    for path in ("lerp", "slerp"):
        found = hierarchy.interpolate(x[:2], x[2:], 3, path=path)
        torch.testing.assert_close(found[[0, -1]], hierarchy.reconstruct(x).view(2, 2, 6))
    middle = [0.5 * (z[:2] + z[2:]) for z in hierarchy.encode(x)]
    torch.testing.assert_close(hierarchy.interpolate(x[:2], x[2:], 3)[1],
                               hierarchy.likelihood.mean(hierarchy.decode(middle)))
    with pytest.raises(ValueError, match="^level: expected 0 to 1"):
        hierarchy.traverse(latents, level=2)


@torch.no_grad()
def test_codes_take_other_values_and_lead_from_one_to_another():
    torch.manual_seed(0)
    quantized, x = vae.VQVAE((1, 4, 4), 5, 3, (4,)).double(), (randn(4, 1, 4, 4, seed=0) > 0).double()
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    codes = quantized.eval().codes(x)[0]
    quantized.train()
    found = quantized.traverse(codes, [1], [4, 0])
    moves(found, lambda c: quantized.likelihood.mean(quantized.decode(c[None]))[0], codes, [1], [4, 0])
    assert quantized.traverse(codes).shape == (codes.numel(), 5, 1, 4, 4)
    path = quantized.interpolate(x[:2], x[2:], 4)
    assert path.shape == (4, 2, 1, 4, 4) and quantized.quantizer.training
    torch.testing.assert_close(quantized.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(path[[0, -1]], quantized.eval().reconstruct(x).view(2, 2, 1, 4, 4))


@torch.no_grad()
@pytest.mark.parametrize("n_classes", [2, 3])
def test_discrete_latents_change_one_after_the_other(n_classes):
    torch.manual_seed(0)
    width = 5 if n_classes == 2 else 15
    discrete = vae.DiscreteVAE(torch.nn.Linear(4, width), torch.nn.Linear(width, 4), 5, n_classes).double()
    start, end = randn(3, 4, seed=0), -randn(3, 4, seed=0)
    found = discrete.interpolate(start, end, 50)
    assert found.shape == (50, 3, 4)
    torch.testing.assert_close(found[[0, -1]], torch.stack([discrete.reconstruct(start), discrete.reconstruct(end)]))
    a, b = discrete.posterior(start).logits, discrete.posterior(end).logits
    half = type(discrete.posterior(start))(a + (b - a) * 24 / 49).mode()
    torch.testing.assert_close(found[24], discrete.likelihood.mean(discrete.decode(half)))
    with pytest.raises(ValueError, match="^steps"):
        discrete.interpolate(start, end, 1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: model().traverse(torch.zeros(3), [3]), "dims"),
    (lambda: model().interpolate(PROBLEM.x, PROBLEM.x, 1), "steps"),
    (lambda: model().interpolate(PROBLEM.x, PROBLEM.x, path="bezier"), "path"),
    (lambda: model().sample(1, temperature=math.inf), "temperature"),
    *((lambda make=make, options=options: make().sample(2, **options), f"^{next(iter(options))}: expected a")
      for make in (model, lambda: vae.HVAE((4,), (2, 3), 8), lambda: vae.VQVAE((1, 4, 4), 4, 2, (4,)),
                   lambda: vae.DiscreteVAE(torch.nn.Linear(4, 2), torch.nn.Linear(2, 4), 2))
      for options in ({"generator": 3}, {"temperature": "a"}, {"temperature": None})),
    (lambda: model().interpolate(PROBLEM.x, PROBLEM.x[:2]), "^end: expected a batch like start"),
    (lambda: vae.HVAE((4,), (2, 3), 8).interpolate(torch.rand(3, 4), torch.rand(1, 4)), "^end: expected a batch"),
    (lambda: (found := model()).traverse(found.encode(PROBLEM.x)), "^z: expected shape"),
    (lambda: (found := vae.VQVAE((1, 4, 4), 4, 2, (4,))).elbo(torch.rand(2, 1, 4, 4)) and found.traverse(
        found.codes(torch.rand(2, 1, 4, 4))), "^codes: expected shape"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
