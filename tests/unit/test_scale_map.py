"""ScaleMap: its named constants, what it refuses, and each kind against its definition."""

import dataclasses
import math

import pytest
import torch

from fastflow import functional, reference
from fastflow.functional import ScaleMap

NAMED = {
    "exp": ScaleMap("exp"),
    "sigmoid": ScaleMap("sigmoid", offset=2.0),
    "tanh": ScaleMap("tanh", clamp=1.0),
    "rational": ScaleMap("rational", clamp=1.0),
    "atan": ScaleMap("atan", clamp=1.0, out_gain=2.0 / math.pi),
    "softplus": ScaleMap("softplus", offset=0.5413),
    "additive": ScaleMap("additive"),
}
# log s of a float, written with the math module.
DEFINITIONS = {
    "exp": lambda m, u: m.out_gain * u,
    "sigmoid": lambda m, u: -math.log1p(math.exp(-u)) + math.log(m.out_gain),
    "tanh": lambda m, u: m.clamp * m.out_gain * math.tanh(u / m.clamp),
    "atan": lambda m, u: m.clamp * m.out_gain * math.atan(u / m.clamp),
    "softplus": lambda m, u: math.log(math.log1p(math.exp(u))),
    "rational": lambda m, u: u / (1 + abs(u) / m.clamp),
    "additive": lambda m, u: 0.0,
}


@pytest.mark.parametrize("kind", NAMED)
def test_names_stand_for_the_contract_s_constants(kind):
    assert ScaleMap.of(kind) == NAMED[kind]
    assert ScaleMap.of(NAMED[kind]) is NAMED[kind]
    assert functional.ScaleMap is reference.ScaleMap


def test_defaults_and_positional_order_are_the_contract_s():
    fields = [(f.name, f.default) for f in dataclasses.fields(ScaleMap)]
    names = ["kind", "gain", "offset", "out_gain", "clamp", "eps", "hard_min", "hard_max", "shift_gain"]
    assert [name for name, _ in fields] == names
    assert [default for _, default in fields[1:]] == [1, 0, 1, None, 0, None, None, 1]


@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("extra", [{}, {"gain": -0.7, "offset": 0.4}, {"clamp": 2.5}, {"out_gain": 1.7}, {"eps": 0.3},
                                   {"hard_min": 0.6, "hard_max": 1.4},
                                   {"gain": 0.8, "offset": -0.2, "out_gain": 0.9, "clamp": 1.2, "eps": 0.1,
                                    "hard_max": 2.0}], ids=str)
def test_scale_of_each_kind_is_its_definition(kind, extra, backend, device):
    """One element per batch entry, so that every log s is a log-det of its own."""
    scale = ScaleMap(kind, **extra)
    raw = torch.linspace(-4, 4, 33, dtype=torch.float64)
    full = dataclasses.replace(scale, clamp=scale.clamp or 1.0)
    expected = []
    for r in raw.tolist():
        s = math.exp(DEFINITIONS[kind](full, scale.gain * r + scale.offset)) + scale.eps
        s = max(s, scale.hard_min or 0.0)
        expected.append(min(s, scale.hard_max or math.inf))
    expected = torch.tensor(expected, dtype=torch.float64, device=device)
    x = torch.ones(33, 1, dtype=torch.float64, device=device)
    raw = raw.to(device)[:, None]
    params = torch.zeros_like(x) if kind == "additive" else (raw, torch.zeros_like(x))
    for inverse in (False, True):
        y, logdet = functional.affine_coupling(x, params, scale=scale, inverse=inverse)
        sign = -1 if inverse else 1
        torch.testing.assert_close(y[:, 0], expected**sign, rtol=1e-13, atol=0)
        torch.testing.assert_close(logdet, sign * torch.log(expected), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("kwargs", "named"), [
    ({"kind": "cube"}, "kind"), ({"kind": "tanh", "clamp": 0.0}, "clamp"), ({"kind": "tanh", "clamp": -1.0}, "clamp"),
    ({"kind": "sigmoid", "out_gain": 0.0}, "out_gain"), ({"kind": "sigmoid", "out_gain": -2.0}, "out_gain"),
    ({"kind": "exp", "eps": -1e-3}, "eps"), ({"kind": "exp", "gain": math.nan}, "gain"),
    ({"kind": "exp", "offset": math.inf}, "offset"), ({"kind": "exp", "hard_min": -1.0}, "hard_min"),
    ({"kind": "exp", "hard_min": 2.0, "hard_max": 1.0}, "hard_max"), ({"kind": "exp", "hard_max": 0.0}, "hard_max"),
], ids=str)
def test_refuses_what_makes_no_sense_and_names_it(kwargs, named):
    with pytest.raises(ValueError, match=f"^{named}"):
        ScaleMap(**kwargs)


@pytest.mark.parametrize("build", [lambda: ScaleMap.normflows("cube"), lambda: ScaleMap.freia(2.0, "cube"),
                                   lambda: ScaleMap.freia(2.0, None)])
def test_dialects_refuse_unknown_kinds(build):
    with pytest.raises(ValueError, match="^kind"):
        build()


@pytest.mark.parametrize("kind", ["all_in_one", "atan", "tanh", "sigmoid"])
def test_freia_refuses_what_is_no_clamp(kind):
    for clamp in (-1, 0.0, math.nan):
        with pytest.raises(ValueError, match="^clamp: expected a"):
            ScaleMap.freia(clamp, kind)
    with pytest.raises(TypeError, match="^clamp: expected a number, got str"):
        ScaleMap.freia("2", kind)
    with pytest.raises(TypeError, match="^slope: expected a number, got str"):
        ScaleMap.zuko("a")


@pytest.mark.parametrize("slope", [0.0, 1.0, -1e-3, math.nan])
def test_zuko_refuses_a_slope_without_a_bound(slope):
    with pytest.raises(ValueError, match="^slope"):
        ScaleMap.zuko(slope)


@pytest.mark.parametrize(("name", "value"), [("gain", None), ("offset", "2"), ("clamp", torch.ones(2)), ("eps", [0.1]),
                                            ("eps", True)])
def test_refuses_what_is_no_number(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected a number, got {type(value).__name__}"):
        ScaleMap("tanh", **{name: value})


def test_of_refuses_other_types_and_names():
    with pytest.raises(TypeError, match="^scale"):
        ScaleMap.of(3.0)
    with pytest.raises(ValueError, match="^scale"):
        ScaleMap.of("glow")


def test_is_immutable_and_hashable():
    assert len({ScaleMap("exp"), ScaleMap("exp"), ScaleMap("exp", gain=2.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        ScaleMap("exp").gain = 2.0


@pytest.mark.parametrize("bounds", [{"hard_min": 0.0}, {"hard_max": 1e40}, {"hard_min": 0.0, "hard_max": 1e40}],
                         ids=str)
@pytest.mark.parametrize("kind", ["exp", "sigmoid", "softplus", "tanh"])
def test_bounds_that_no_scale_reaches_change_nothing(kind, bounds, backend, device):
    x, params = torch.randn(3, 2, device=device), torch.randn(3, 4, device=device, requires_grad=True)
    results = []
    for scale in (ScaleMap(kind), ScaleMap(kind, **bounds)):
        y, logdet = functional.affine_coupling(x, params, scale=scale)
        results.append((y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), params, create_graph=True)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bounds", [{"hard_min": 0.5}, {"hard_max": 2.0}, {"hard_min": 0.5, "hard_max": 2.0}], ids=str)
def test_hard_bounds_have_zero_gradient_outside_and_keep_nan(bounds, backend, device):
    raw = torch.tensor([[-3.0], [0.1], [3.0], [math.nan]], dtype=torch.float64, device=device, requires_grad=True)
    x = torch.ones(4, 1, dtype=torch.float64, device=device)
    y, logdet = functional.affine_coupling(x, (raw, torch.zeros_like(x)), scale=ScaleMap("exp", **bounds))
    (grad,) = torch.autograd.grad(logdet.sum() + y.sum(), raw)
    low, high = "hard_min" in bounds, "hard_max" in bounds
    assert (grad[0].item() == 0) == low and (grad[2].item() == 0) == high and grad[1].item() > 0
    assert torch.isnan(y[3]).all() and torch.isnan(logdet[3])


@pytest.mark.parametrize("scale", [ScaleMap("softplus", eps=1e-3), ScaleMap.nflows(), ScaleMap("exp", eps=1e-3),
                                   ScaleMap.normflows("sigmoid")], ids=str)
def test_second_gradients_where_eps_is_added_are_finite_and_right(scale, backend, device):
    """Where the scale is far below eps, far above it and, of exp, as large."""
    values = torch.tensor([-200.0, -110.0, -30.0, math.log(1e-3), -2.0, 0.0, 5.0, 95.0, 200.0], device=device)[:, None]

    def second(raw, log):
        (first,) = torch.autograd.grad(log(raw).sum(), raw, create_graph=True)
        return torch.autograd.grad(first.sum(), raw)[0]

    x = torch.ones_like(values)
    got = second(values.clone().requires_grad_(), lambda raw: functional.affine_coupling(
        x, (raw, torch.zeros_like(x)), scale=scale)[1])
    want = second(values.double().requires_grad_(), lambda raw: torch.log(scale.scale_and_log(raw)[0]))
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_gradients_where_eps_is_added_keep_their_digits(dtype):
    """log(exp(r) + eps) has the second derivative p (1 - p), p = sigmoid(r - log eps)."""
    raw = torch.tensor([-60.0, -40.0, -24.0, math.log(1e-3), 0.0, 9.0, 30.0], dtype=dtype, requires_grad=True)
    (first,) = torch.autograd.grad(ScaleMap("exp", eps=1e-3).scale_and_log(raw)[1].sum(), raw, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), raw)
    u = raw.detach().double() - math.log(1e-3)
    # Of first and second alike no more than the rounding of u = r - log eps, by which they grow.
    limit = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(first.detach().double(), torch.sigmoid(u), rtol=limit, atol=0)
    torch.testing.assert_close(second.double(), torch.sigmoid(u) * torch.sigmoid(-u), rtol=limit, atol=0)
