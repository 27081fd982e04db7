"""Planar, radial and Sylvester flows, and the scalar root that inverts them."""

import math

import pytest
import torch
from flow_checks import check_bijection, check_gradients, integral, scattered

from fastflow import flows
from fastflow.flows.planar import bent, log_slope, unbent

LAYERS = {
    "planar": flows.Planar, "radial": flows.Radial, "sylvester": flows.Sylvester,
    "sylvester, rank": lambda d, **k: flows.Sylvester(d, max(1, d // 2), **k),
    "sylvester, triangular": lambda d, **k: flows.Sylvester(d, n_reflections=0, **k),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def build(name, features, seed=0, context_features=None, size=0.6):
    torch.manual_seed(seed)
    return scattered(LAYERS[name](features, context_features=context_features, hidden=(4,)).double(), size)


@every_layer
@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("context_features", [None, 2])
def test_bijection(name, features, context_features):
    for seed in range(20):
        layer = build(name, features, seed, context_features)
        x = 3 * torch.randn(3, features, dtype=torch.float64)
        context = None if context_features is None else torch.randn(3, context_features, dtype=torch.float64)
        # The inverse loses what the slope at the root loses, which the seeds let come down to 1/1000.
        check_bijection(layer, x, context, tolerance=1e-8)


@every_layer
@pytest.mark.parametrize("context_features", [None, 2])
def test_gradients(name, context_features):
    layer = build(name, 3, context_features=context_features)
    context = None if context_features is None else torch.randn(2, context_features, dtype=torch.float64)
    check_gradients(layer, torch.randn(2, 3, dtype=torch.float64), context)


@every_layer
def test_second_derivatives_and_functional_transforms(name):
    layer = build(name, 3)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: layer.inverse(z), (z,), fast_mode=True)
    reverse = torch.func.vmap(torch.func.jacrev(lambda v: layer.inverse(v[None])[0][0]))(z)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(lambda v: layer.inverse(v[None])[0][0]))(z), reverse)


@every_layer
def test_density_integrates_to_one(name):
    for features, n in ((1, 2001), (2, 301)):
        flow = flows.Flow(flows.Compose(*(build(name, features, seed, 1, 0.25) for seed in range(3))),
                          flows.StandardNormal(features)).double()
        for context in (torch.tensor([-1.0]), torch.tensor([0.5])):
            # The radial density has a kink at its centre, over which a grid is second order.
            error = abs(integral(flow, 12, n, features, context.double()) - 1)
            assert error < (1e-4 if name == "radial" else 1e-6), (features, context)


@every_layer
def test_context_shapes_and_the_start(name):
    layer = LAYERS[name](3, context_features=2)
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    z, logdet = layer(x, context)
    torch.testing.assert_close(z, x, rtol=0, atol=0.2)
    assert logdet.shape == (4,) and z.dtype == logdet.dtype == torch.float32
    scattered(layer)
    same = layer(x[:1].expand(2, -1), context[:2])[0]
    assert not torch.equal(same[0], same[1])
    assert layer(x[:0], context[:0])[0].shape == layer.inverse(x[:0], context[:0])[0].shape == (0, 3)
    with pytest.raises(ValueError, match="context"):
        layer(x)
    with pytest.raises(ValueError, match="context"):
        LAYERS[name](3)(x, context)


@every_layer
def test_refusals(name):
    for bad, error in ((torch.zeros(2, 4), ValueError), (torch.zeros(2, 3).double(), TypeError)):
        with pytest.raises(error, match="x"):
            LAYERS[name](3)(bad)
        with pytest.raises(error, match="z"):
            LAYERS[name](3).inverse(bad)
    with pytest.raises(ValueError, match="features"):
        LAYERS[name](-1 if "rank" not in name else 0)
    with pytest.raises(ValueError, match="context_features"):
        LAYERS[name](3, context_features=0)


@pytest.mark.parametrize("name", ["planar", "sylvester"])
def test_compiles_without_breaks(name):
    layer = build(name, 2)
    x = torch.randn(3, 2, dtype=torch.float64)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_sylvester_refusals():
    for options, match in (({"rank": 4}, "rank"), ({"rank": 0}, "rank"), ({"n_reflections": -1}, "n_reflections")):
        with pytest.raises(ValueError, match=match):
            flows.Sylvester(3, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_root_is_found_to_rounding(dtype):
    """Residual within a few units in the last place of what the equation sums, for slopes from 1e-6 to 1e6."""
    slope = torch.logspace(-6, 6, 97, dtype=dtype)[:, None]
    c = torch.cat([torch.linspace(-30, 30, 121, dtype=dtype), torch.logspace(-8, 7, 61, dtype=dtype)])[None]
    a = unbent(c, slope)
    scale = c.abs() + a.abs() + (slope - 1).abs() * torch.tanh(a).abs()
    eps = torch.finfo(dtype).eps
    spread = eps * a.abs() * torch.exp(log_slope(a, slope))  # what the rounding of a alone does
    assert ((bent(a, slope) - c).abs() <= 4 * eps * scale + 4 * spread + eps**2).all()
    assert (a.diff(dim=1)[:, :120] >= 0).all()


def test_the_root_of_what_is_not_finite():
    c = torch.tensor([math.nan, 1.0, math.inf, -math.inf])
    a = unbent(c, torch.tensor([1.5, math.nan, 2.0, 0.5]))
    assert a[:2].isnan().all() and a[2:].tolist() == [math.inf, -math.inf]


def test_the_constraint_of_planar_flows():
    """Whatever u and w are, w'u > -1: the slope along w stays positive, and the closed form is the paper's."""
    for seed in range(20):
        layer = build("planar", 4, seed)
        with torch.no_grad():
            layer.parameters_of.start.mul_(10)
        x = torch.randn(5, 4, dtype=torch.float64)
        u, w, b, _ = layer._constants("x", x, None)
        assert (w * u).sum() > -1
        h = torch.tanh((w * x).sum(1) + b[:, 0])
        expected = torch.log((1 + (1 - h**2) * (w * u).sum(1)).abs())
        torch.testing.assert_close(layer(x)[1], expected, rtol=1e-6, atol=1e-6)


def test_radial_at_its_centre():
    layer = build("radial", 3)
    centre = layer.parameters_of.start[:3].detach()[None]
    x = centre.clone().requires_grad_()
    for direction in (layer, layer.inverse):
        out, logdet = direction(x)
        torch.testing.assert_close(out, centre)
        assert torch.isfinite(torch.autograd.grad(out.sum() + logdet.sum(), x)[0]).all()
