"""Every coupling dialect in use, against a few lines written from that library's own source and sharing nothing with
fastflow: values, log-det, exact inverse and gradients."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from tolerances import GRADIENT_FACTOR, assert_by_ratio

from fastflow.functional import ScaleMap, affine_coupling


def cross(p):
    """openai/glow's packing: even channels the shift, odd ones the scale."""
    return p[:, 0::2], p[:, 1::2]


def halves(p):
    return p.chunk(2, 1)


def total(log_s):
    return log_s.reshape(log_s.shape[0], -1).sum(1)


def openai_glow(x, p):
    shift, h = cross(p)
    s = torch.sigmoid(h + 2)
    return (x + shift) * s, total(torch.log(s))


def rosinality_glow(x, p):
    log_s, t = halves(p)
    s = torch.sigmoid(log_s + 2)
    return (x + t) * s, total(torch.log(s))


def normflows_exp(z, p):
    shift, scale = cross(p)
    return z * torch.exp(scale) + shift, total(scale)


def normflows_sigmoid(z, p):
    shift, scale = cross(p)
    s = torch.sigmoid(scale + 2)
    return z / s + shift, -total(torch.log(s))


def normflows_sigmoid_inv(z, p):
    shift, scale = cross(p)
    s = torch.sigmoid(scale + 2)
    return z * s + shift, total(torch.log(s))


def nflows_default(x, p):
    shift, u = halves(p)
    s = torch.sigmoid(u + 2) + 1e-3
    return x * s + shift, total(torch.log(s))


def nflows_general(x, p):
    shift, u = halves(p)
    s = (torch.log(1 + torch.exp(u)) + 1e-3).clamp(0, 3)
    return x * s + shift, total(torch.log(s))


def freia_all_in_one(x, p):
    a = 0.1 * p
    log_s, t = halves(a)
    log_s = 2.0 * torch.tanh(log_s / 2.0)
    return x * torch.exp(log_s) + t, total(log_s)


def freia_glow_atan(x, p):
    s, t = halves(p)
    log_s = 2.0 * 0.636 * torch.atan(s)
    return x * torch.exp(log_s) + t, total(log_s)


def freia_tanh(x, p):
    s, t = halves(p)
    return x * torch.exp(1.9 * torch.tanh(s)) + t, total(1.9 * torch.tanh(s))


def freia_sigmoid(x, p):
    s, t = halves(p)
    log_s = 1.9 * 2.0 * (torch.sigmoid(s) - 0.5)
    return x * torch.exp(log_s) + t, total(log_s)


def zuko_monotonic(x, pair):
    a, b = pair
    log_s = a / (1 + torch.abs(a / math.log(1e-3)))
    return torch.exp(log_s) * x + b, total(log_s)


def invertible_networks(x, p):
    raw, t = halves(p)
    s = torch.sigmoid(raw)
    return s * x + t, total(torch.log(s))


def invertible_networks_inverse(y, p):
    raw, t = halves(p)
    s = torch.sigmoid(raw) + 1e-2
    return (y - t) / s, -total(torch.log(s))


def jet(x, p):
    b, s = halves(p)
    m = 2.0
    return (x + b) * m * torch.sigmoid(s), total(torch.nn.functional.logsigmoid(s) + math.log(m))


def tarflow(x, p):
    alpha, mu = halves(p)
    return (x - mu) * torch.exp(-alpha), -total(alpha)


def starflow(x, p):
    a, mu = halves(p)
    s = torch.log1p(torch.exp(a + 0.5413))
    return (x - mu) / s, -total(torch.log(s))


def waveglow(x, p):
    b, s = halves(p)
    return torch.exp(s) * x + b, total(s)


def nice(x, shift):
    return x + shift, torch.zeros(x.shape[0], dtype=x.dtype, device=x.device)


@dataclass(frozen=True)
class Dialect:
    formula: object
    scale: object
    options: dict = field(default_factory=dict)
    shape: tuple = (4, 3, 2, 5)


CROSS = {"layout": "interleave", "order": "shift_scale"}
SHIFT_FIRST_IN_PARAMS = {"order": "shift_scale"}
DIALECTS = (
    Dialect(openai_glow, ScaleMap.glow(), {**CROSS, "shift_first": True}),
    Dialect(rosinality_glow, ScaleMap.glow(), {"shift_first": True}),
    Dialect(normflows_exp, ScaleMap.normflows("exp"), CROSS),
    Dialect(normflows_sigmoid, ScaleMap.normflows("sigmoid"), CROSS),
    Dialect(normflows_sigmoid_inv, ScaleMap.normflows("sigmoid_inv"), CROSS),
    Dialect(nflows_default, ScaleMap.nflows(), SHIFT_FIRST_IN_PARAMS, (4, 7)),
    Dialect(nflows_general, ScaleMap.nflows(general=True), SHIFT_FIRST_IN_PARAMS, (4, 7)),
    Dialect(freia_all_in_one, ScaleMap.freia(clamp=2.0)),
    Dialect(freia_glow_atan, ScaleMap.freia(clamp=2.0, kind="ATAN")),
    Dialect(freia_tanh, ScaleMap.freia(clamp=1.9, kind="TANH")),
    Dialect(freia_sigmoid, ScaleMap.freia(clamp=1.9, kind="SIGMOID")),
    Dialect(zuko_monotonic, ScaleMap.zuko(), {}, (4, 6)),
    Dialect(invertible_networks, ScaleMap("sigmoid")),
    Dialect(invertible_networks_inverse, ScaleMap("sigmoid", eps=1e-2), {"inverse": True}),
    Dialect(jet, ScaleMap.jet(), {**SHIFT_FIRST_IN_PARAMS, "shift_first": True}),
    Dialect(tarflow, ScaleMap.tarflow(), {"shift_first": True}, (4, 6, 9)),
    Dialect(starflow, ScaleMap.starflow(), {"inverse": True}, (4, 6, 9)),
    Dialect(waveglow, ScaleMap.waveglow(), SHIFT_FIRST_IN_PARAMS, (4, 4, 11)),
    Dialect(nice, "additive"),
)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.formula.__name__)


def operands(dialect, dtype, device):
    """x and the parameters as leaves: packed, zuko's pair, or NICE's shift."""
    x = torch.randn(dialect.shape, dtype=torch.float64)
    if dialect.formula is zuko_monotonic:
        parts = [torch.randn(dialect.shape, dtype=torch.float64) * 3 for _ in range(2)]
    else:
        channels = dialect.shape[1] * (1 if dialect.scale == "additive" else 2)
        parts = [torch.randn((dialect.shape[0], channels, *dialect.shape[2:]), dtype=torch.float64) * 1.5]
    return [t.to(device, dtype).requires_grad_() for t in (x, *parts)]


def apply(function, leaves):
    return function(leaves[0], leaves[1] if len(leaves) == 2 else tuple(leaves[1:]))


def with_gradients(function, leaves, cotangents):
    results = apply(function, leaves)
    pairs = [(r, c.to(r)) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    grads = torch.autograd.grad([r for r, _ in pairs], leaves, [c for _, c in pairs])
    return [*results, *grads]


@every_dialect
def test_matches_the_formula_in_float64(dialect, backend, device):
    leaves = operands(dialect, torch.float64, device)
    cotangents = torch.randn(dialect.shape), torch.randn(dialect.shape[0])
    got = with_gradients(lambda x, p: affine_coupling(x, p, scale=dialect.scale, **dialect.options), leaves, cotangents)
    want = with_gradients(dialect.formula, leaves, cotangents)
    for name, out, expected in zip(("y", "logdet", "grad_x", "grad_params", "grad_shift"), got, want, strict=False):
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@every_dialect
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_accurate_as_the_formula_in_low_precision(dialect, backend, device, dtype):
    """x float32 with params of ``dtype``: the error stays within the ratio of the same formula run in float32."""
    leaves = operands(dialect, dtype, device)
    leaves[0] = leaves[0].detach().float().requires_grad_()
    cotangents = torch.randn(dialect.shape), torch.randn(dialect.shape[0])
    got = with_gradients(lambda x, p: affine_coupling(x, p, scale=dialect.scale, **dialect.options), leaves, cotangents)
    single, double = ([t.detach().to(d).requires_grad_() for t in leaves] for d in (torch.float32, torch.float64))
    eager = with_gradients(dialect.formula, single, cotangents)
    truth = with_gradients(dialect.formula, double, cotangents)
    assert got[0].dtype == got[1].dtype == torch.float32
    terms = math.prod(dialect.shape[1:]) ** 0.5  # log s of size about 1 may cancel in the sum
    assert_by_ratio(got[0], eager[0], truth[0], what="y")
    assert_by_ratio(got[1], eager[1], truth[1], magnitude=terms, what="logdet")
    for out, leaf, e, t in zip(got[2:], leaves, eager[2:], truth[2:], strict=True):
        assert_by_ratio(out, e.to(leaf.dtype), t, factor=GRADIENT_FACTOR, what="gradient")


@every_dialect
def test_inverse_undoes_the_formula(dialect, backend, device):
    """inverse=True (or False, for what is written in the inverse direction) takes the formula's result back to x, and
    the two log-dets are opposite."""
    leaves = [t.detach() for t in operands(dialect, torch.float64, device)]
    y, logdet = apply(dialect.formula, leaves)
    back = dict(dialect.options, inverse=not dialect.options.get("inverse", False))
    x, logdet_back = apply(lambda y, p: affine_coupling(y, p, scale=dialect.scale, **back), [y, *leaves[1:]])
    torch.testing.assert_close(x, leaves[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(logdet_back, -logdet, rtol=1e-12, atol=1e-12)


def test_log_det_comes_from_the_pre_activation(backend, device):
    """At h + 2 = -104 a float32 sigmoid is 0 and its log -inf; the log-det must be -104."""
    x = torch.ones(1, 1, device=device)
    raw = torch.full((1, 1), -106.0, device=device)
    _, logdet = affine_coupling(x, (raw, torch.zeros_like(x)), scale=ScaleMap.glow(), shift_first=True)
    assert logdet.item() == pytest.approx(-104.0, abs=1e-5)
    _, logdet = affine_coupling(x, (raw, torch.zeros_like(x)), scale="softplus")
    assert logdet.item() == pytest.approx(-106.0 + 0.5413, abs=1e-4)
