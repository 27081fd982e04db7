"""spline: values and gradients against float64 at many sizes, knots and tails, both directions, the log-determinant
against Jacobians, the forms of nflows and zuko, and what must not become NaN."""

import math

import layouts
import pytest
import torch
from cases import Case, check_by_ratio, cotangents_of, evaluate, upcast
from tolerances import assert_bitwise

from fastflow import backends, functional, reference

KINDS = (("rq", None), ("rq", 6.9), ("linear", None))
SIZES = (((7, 5), 1), ((5, 3), 2), ((70, 64), 8), ((3, 4, 5, 6), 5), ((2, 2, 70), 8), ((1, 1), 17),
         ((2, 3, 2, 2, 2), 3), ((130, 1), 4), ((1, 3000), 3))
by_kind = pytest.mark.parametrize(("kind", "clamp"), KINDS, ids=["rq", "rq_soft", "linear"])
by_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def per(kind, bins):
    return functional.spline_params(kind, bins)


def case_of(shape, bins, kind="rq", **options):
    params = (shape[0], shape[1] * per(kind, bins), *shape[2:])
    return Case("spline", "spline", {"x": shape, "params": params}, {"kind": kind, **options})


@pytest.mark.parametrize(("shape", "bins"), SIZES, ids=str)
@by_direction
@by_kind
def test_sizes(shape, bins, kind, clamp, inverse, fused, device):
    case = case_of(shape, bins, kind, inverse=inverse, clamp=clamp)
    for layout in (layouts.contiguous, layouts.channels_last):
        tensors = {n: layout(t) for n, t in case.tensors(torch.float32, device).items()}
        check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
        # In float64 the truth is no better than what is held against it.
        tensors = upcast(tensors)
        cotangents = cotangents_of(case, tensors)
        got, want = (evaluate(case, tensors, cotangents=cotangents, module=m) for m in (functional, reference))
        for part in (0, 1):
            for name, exact in want[part].items():
                size = max(exact.abs().max().item(), 1.0)
                torch.testing.assert_close(got[part][name], exact, rtol=1e-10, atol=1e-10 * size)


@by_direction
@by_kind
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_errors_of_sharp_splines(kind, clamp, scale, inverse, fused, device):
    """The largest error is that of one ill-conditioned element; quantiles of all are at most 1.5 times eager's."""
    case = case_of((2000, 8), 8, kind, inverse=inverse, clamp=clamp)
    tensors = case.tensors(torch.float32, device)
    tensors["params"] = tensors["params"] * scale
    cotangents = cotangents_of(case, tensors)
    got, eager = (evaluate(case, tensors, cotangents=cotangents, module=m) for m in (functional, reference))
    truth = evaluate(case, upcast(tensors), cotangents=upcast(cotangents), module=reference)
    for part in (0, 1):
        for name, exact in truth[part].items():
            for q in (0.5, 0.9, 0.99):
                ours, theirs = ((t[part][name].double() - exact).abs().flatten()[:1_000_000].quantile(q)
                                for t in (got, eager))
                assert ours <= 1.5 * theirs + 1e-7 * exact.abs().median(), (name, q, ours, theirs)


@by_kind
def test_both_directions_undo_each_other(kind, clamp, backend, device):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        tensors = case_of((200, 6, 3), 7, kind).tensors(dtype, device)
        x, params, carried = 2.0 * tensors["x"], tensors["params"], torch.randn(200, dtype=dtype, device=device)
        options = {"kind": kind, "clamp": clamp}
        y, there = functional.spline(x, params, logdet=carried, **options)
        back, again = functional.spline(y, params, inverse=True, logdet=there, **options)
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(again, carried, rtol=20 * tolerance, atol=20 * tolerance)
        outside = x.abs() > 3.0
        assert outside.any() and torch.equal(y[outside], x[outside])
        assert (y[~outside].abs() <= 3.0).all()


@by_direction
@by_kind
def test_log_det_is_that_of_the_jacobian(kind, clamp, inverse, backend, device):
    for seed in range(5):
        case = case_of((1, 3, 2), 4, kind, inverse=inverse, clamp=clamp)
        t = case.tensors(torch.float64, device, seed=seed)
        _, logdet = case.call(t)
        jacobian = torch.autograd.functional.jacobian(lambda x, c=case, t=t: c.call({**t, "x": x})[0], t["x"])
        sign, expected = torch.linalg.slogdet(jacobian.reshape(6, 6))
        assert sign == 1
        torch.testing.assert_close(logdet[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bins", [1, 2, 8])
@pytest.mark.parametrize("end", [1.0, 0.999, 3.0])
def test_it_passes_through_its_knots(end, bins, backend, device):
    """At knots, from the formulas of the docstring: both coordinates and the slope, in both directions."""
    torch.manual_seed(1)
    raw = torch.randn(per("rq", bins), dtype=torch.float64)
    w = 6.0 * (1e-3 + (1 - 1e-3 * bins) * torch.softmax(raw[:bins], 0))
    h = 6.0 * (1e-3 + (1 - 1e-3 * bins) * torch.softmax(raw[bins:2 * bins], 0))
    knots = [torch.cat([torch.zeros(1), t.cumsum(0)[:-1], torch.full((1,), 6.0)]).double() - 3.0 for t in (w, h)]
    ends = torch.full((1,), end, dtype=torch.float64)
    slopes = torch.cat([ends, 1e-3 + torch.nn.functional.softplus(raw[2 * bins:]), ends])
    params = raw.expand(bins + 1, -1).to(device)
    for inverse in (False, True):
        at, want = knots[::-1] if inverse else knots
        y, logdet = functional.spline(at[:, None].to(device), params, inverse=inverse, end_derivative=end)
        torch.testing.assert_close(y[:, 0].cpu(), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logdet.cpu(), slopes.log() * (-1 if inverse else 1), rtol=1e-9, atol=1e-9)


@by_direction
@by_kind
def test_the_ends_of_the_interval_and_the_tails(kind, clamp, inverse, fused, device):
    bound = 1.7
    x = torch.tensor([-bound, bound, -1.8, 1.8, -1e30, math.inf, -math.inf], device=device)[:, None]
    params = torch.randn(7, per(kind, 5), device=device)
    params[2:] = math.nan  # what they are does not matter outside
    x.requires_grad_(), params.requires_grad_()
    y, logdet = functional.spline(x, params, kind=kind, clamp=clamp, tail_bound=bound, inverse=inverse)
    torch.testing.assert_close(y[:2], x[:2], rtol=1e-6, atol=0)
    assert (y[:2].abs() <= torch.tensor(bound)).all()
    assert_bitwise(y[2:].detach(), x[2:].detach())
    assert not logdet[2:].any()
    grads = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
    assert torch.isfinite(grads[0]).all() and (grads[0][2:] == 1).all()
    assert torch.isfinite(grads[1][:2]).all() and not grads[1][2:].any()


def test_nan_and_a_bad_parameter_come_out_of_their_element_alone(fused, device):
    x, params = torch.zeros(2, 3, device=device), torch.zeros(2, 3 * 8, device=device)
    x[0, 1], params[1, 2] = math.nan, math.nan
    y, logdet = functional.spline(x, params)
    assert torch.isnan(y).tolist() == [[False, True, False], [True, False, False]] and torch.isnan(logdet).all()


@by_direction
@by_kind
def test_extreme_parameters_stay_finite(kind, clamp, inverse, fused, device):
    """Raws of +-1e4 in every pattern: bins at their minimum, slopes from 1e-3 to 1e4, discriminants that cancel."""
    torch.manual_seed(0)
    for scale in (30.0, 1e4):
        x = 6.0 * torch.rand(2000, 4, device=device) - 3.0
        params = (scale * torch.randint(-1, 2, (2000, 4 * per(kind, 6)), device=device)).float()
        x.requires_grad_(), params.requires_grad_()
        y, logdet = functional.spline(x, params, kind=kind, clamp=clamp, inverse=inverse)
        assert torch.isfinite(y).all() and torch.isfinite(logdet).all() and (y.abs() <= 3.0).all()
        for grad in torch.autograd.grad(y.sum() + logdet.sum(), (x, params)):
            assert torch.isfinite(grad).all()


def test_it_is_increasing(backend, device):
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64, device=device)[:, None]
    for kind, clamp in KINDS:
        y, logdet = functional.spline(x, torch.randn(per(kind, 8), device=device).double().expand(4001, -1), kind=kind,
                                      clamp=clamp)
        slope = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        assert (slope > 0).all()
        middle = (logdet[1:] + logdet[:-1])[:, None] / 2  # but for knots, where slopes bend or jump
        assert (slope.log() - middle).abs().median() < 1e-4


def test_one_bin_of_unit_slopes_is_the_identity(backend, device):
    x = torch.randn(50, 3, device=device).double()
    for kind in ("rq", "linear"):
        y, logdet = functional.spline(x, torch.randn(50, 3 * per(kind, 1), device=device).double(), kind=kind)
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(logdet, torch.zeros_like(logdet), rtol=0, atol=1e-12)


def test_no_channels_and_no_samples(backend, device):
    for shape in ((0, 4), (3, 0), (3, 4, 0), (0, 0, 2)):
        case = case_of(shape, 3)
        tensors = case.tensors(torch.float32, device)
        results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
        assert results["y"].shape == shape and not results["logdet"].any()
        assert grads["params"] is None or grads["params"].shape == tensors["params"].shape


def test_a_tensor_of_many_dims(fused, device):
    """More dims than a kernel takes, permuted so that none of them merge."""
    case = case_of((2, 2, 2, 1, 2, 2, 2, 2, 2, 2), 2)
    tensors = {n: layouts.permuted(t) for n, t in case.tensors(torch.float64, device).items()}
    check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


@by_direction
def test_nflows_is_one_of_its_forms(inverse, backend, device):
    nflows = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x, params = torch.randn(40, 5).double() * 2, torch.randn(40, 5 * 23).double()
    raw = params.view(40, 5, 23)
    want, log = nflows.unconstrained_rational_quadratic_spline(
        x, raw[..., :8] / 4, raw[..., 8:16] / 4, raw[..., 16:], inverse=inverse, tail_bound=2.5)
    y, logdet = functional.spline(x.to(device), params.to(device), tail_bound=2.5, gain=0.25, inverse=inverse)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logdet.cpu(), log.sum(1), rtol=1e-8, atol=1e-8)


@by_direction
def test_zuko_is_one_of_its_forms(inverse, backend, device):
    transforms = pytest.importorskip("zuko.transforms")
    x, params = torch.randn(40, 5).double() * 3, torch.randn(40, 5 * 23).double()
    raw = params.view(40, 5, 23)
    zuko = transforms.MonotonicRQSTransform(raw[..., :8], raw[..., 8:16], raw[..., 16:])
    want, log = (zuko.inv if inverse else zuko).call_and_ladj(x)
    y, logdet = functional.spline(x.to(device), params.to(device), tail_bound=5.0, clamp=-math.log(1e-3), min_width=0.0,
                                  min_height=0.0, min_derivative=0.0, inverse=inverse)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logdet.cpu(), log.sum(1), rtol=1e-8, atol=1e-8)


@by_direction
def test_pyro_is_one_of_its_forms(inverse, backend, device):
    pyro = pytest.importorskip("pyro.distributions.transforms.spline")
    x, params = torch.randn(40, 5).double() * 2, torch.randn(40, 5 * 23).double()
    raw = params.view(40, 5, 23)
    want, log = pyro._monotonic_rational_spline(x, raw[..., :8].softmax(-1), raw[..., 8:16].softmax(-1),
                                                torch.nn.functional.softplus(raw[..., 16:]), inverse=inverse)
    y, logdet = functional.spline(x.to(device), params.to(device), inverse=inverse, end_derivative=0.999)
    torch.testing.assert_close(y.cpu(), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(logdet.cpu(), log.sum(1), rtol=1e-8, atol=1e-8)


BOUNDED = ("circular", None)
by_tails = pytest.mark.parametrize("tails", BOUNDED, ids=["circular", "no_tails"])


def bounded(tails, shape, bins, dtype=torch.float64, seed=0, bound=3.0):
    """(x inside the interval, params) of random splines."""
    generator = torch.Generator().manual_seed(seed)
    x = bound * (2.0 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1.0)
    channels = shape[1] * functional.spline_params("rq", bins, tails)
    params = torch.randn((shape[0], channels, *shape[2:]), generator=generator, dtype=torch.float64)
    return x.to(dtype), params.to(dtype)


@by_direction
@by_tails
def test_splines_without_linear_tails_are_those_of_nflows_and_normflows(tails, inverse):
    rational_quadratic_spline = pytest.importorskip("nflows.transforms.splines").rational_quadratic_spline
    unconstrained_rational_quadratic_spline = pytest.importorskip(
        "normflows.utils.splines").unconstrained_rational_quadratic_spline

    x, params = bounded(tails, (50, 4), 6)
    widths, heights, slopes = params.unflatten(1, (4, -1)).split([6, 6, 6 if tails else 7], -1)
    if tails == "circular":
        want = unconstrained_rational_quadratic_spline(x, widths, heights, slopes, inverse, tails, 3.0)
    else:
        want = rational_quadratic_spline(x, widths, heights, slopes, inverse, -3.0, 3.0, -3.0, 3.0)
    y, logdet = functional.spline(x, params, tails=tails, inverse=inverse)
    torch.testing.assert_close(y, want[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logdet, want[1].sum(1), rtol=1e-10, atol=1e-10)


@by_tails
@pytest.mark.parametrize("options", [{}, {"clamp": 6.9}, {"gain": 0.5}], ids=str)
def test_without_linear_tails_jacobian_inverse_and_gradients(options, tails):
    options = {"tails": tails, "tail_bound": 1.7, **options}
    for bins in (1, 4):
        x, params = bounded(tails, (3, 2, 2), bins, bound=1.7)
        y, logdet = functional.spline(x, params, **options)
        for i in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda x, i=i, p=params: functional.spline(x, p[i:i + 1], **options)[0], x[i:i + 1])
            torch.testing.assert_close(torch.linalg.slogdet(jacobian.reshape(4, 4))[1], logdet[i])
        back, none = functional.spline(y, params, inverse=True, logdet=logdet, **options)
        torch.testing.assert_close(back, x, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(none, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
        for inverse in (False, True):
            assert torch.autograd.gradcheck(lambda *t, i=inverse: functional.spline(*t, inverse=i, **options),
                                            (x[:1].clone().requires_grad_(), params[:1].clone().requires_grad_()))


@by_direction
@by_tails
def test_learned_slopes_at_the_ends(tails, inverse):
    """min_derivative + softplus of their params; on a circle both ends have one, and nothing jumps at the seam."""
    params = bounded(tails, (1, 1), 4)[1].expand(2, -1)
    x = torch.tensor([[-3.0], [3.0]], dtype=torch.float64)
    y, logdet = functional.spline(x, params, tails=tails, inverse=inverse)
    slopes = 1e-3 + torch.nn.functional.softplus(params[0, [8, 8 if tails else 12]])
    torch.testing.assert_close(logdet, slopes.log() * (-1 if inverse else 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(y, -x.abs() if tails else x, rtol=1e-12, atol=1e-12)
    if tails == "circular":
        near = torch.tensor([[3.0 - 1e-9], [-3.0 + 1e-9]], dtype=torch.float64)
        y, logdet = functional.spline(near, params, tails=tails, inverse=inverse)
        torch.testing.assert_close(logdet[0], logdet[1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y[0] - 6.0, y[1], rtol=0, atol=1e-7)


@by_direction
def test_angles_are_wrapped(inverse):
    bound = math.pi
    x, params = bounded("circular", (40, 3), 5, bound=bound)
    options = {"tails": "circular", "tail_bound": bound, "inverse": inverse}
    y, logdet = functional.spline(x, params, **options)
    for turns in (1, -1, 7):
        moved = (x + turns * 2.0 * bound).requires_grad_()
        found = functional.spline(moved, params, **options)
        torch.testing.assert_close(found, (y, logdet), rtol=1e-9, atol=1e-9)
        leaf = x.clone().requires_grad_()
        grads = [torch.autograd.grad(sum(t.sum() for t in functional.spline(v, params, **options)), v)[0]
                 for v in (leaf, moved)]
        torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-7)
    assert torch.isnan(functional.spline(torch.full((1, 1), math.inf), torch.zeros(1, 15), **options)[0]).all()


@by_direction
def test_without_tails_what_is_outside_has_no_density(inverse):
    x = torch.tensor([[0.5, 3.1], [-math.inf, 0.5], [math.nan, 5.0], [3.0, -3.0]]).requires_grad_()
    params = torch.randn(4, 2 * 16)
    params[0, 16:] = params[1, :16] = math.nan
    params.requires_grad_()
    y, logdet = functional.spline(x, params, tails=None, inverse=inverse)
    assert torch.isneginf(logdet[:2]).all() and torch.isnan(logdet[2]) and torch.isfinite(logdet[3])
    assert torch.isfinite(y[[0, 1, 3]]).all() and torch.isnan(y[2]).tolist() == [True, False]
    grads = torch.autograd.grad(y[[0, 1, 3]].sum() + logdet[[0, 1, 3]].sum(), (x, params))
    assert all(torch.isfinite(g[[0, 1, 3]]).all() for g in grads) and not grads[0][0, 1] and not grads[0][1, 0]


@by_tails
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [3.0, math.pi, 3.3, 0.1])
def test_results_are_inside_the_half_open_interval(bound, dtype, tails):
    end = torch.tensor(bound, dtype=dtype)
    x = torch.stack([end, end * (1.0 - torch.finfo(dtype).eps), -end, end * 0.999])[:, None]
    params = torch.zeros(4, functional.spline_params("rq", 3, tails), dtype=dtype)
    for inverse in (False, True):
        y, logdet = functional.spline(x, params, tails=tails, tail_bound=bound, inverse=inverse)
        assert y.dtype == dtype and (y >= -end).all() and (y < end).all() and torch.isfinite(logdet).all()


def test_edge_densities_that_linear_tails_can_not_have():
    """p = 2x on (0, 1): a single bin whose slopes, 2x at 0 and 1, have a mean that is its own is that very map."""
    x = torch.tensor([0.001, 0.3, 0.999], dtype=torch.float64)
    params = torch.tensor([0.0, 0.0, -60.0, math.log(math.expm1(2.0))], dtype=torch.float64).expand(3, -1)
    z, logdet = functional.spline((2.0 * x - 1.0)[:, None], params, tails=None, tail_bound=1.0, min_derivative=0.0)
    torch.testing.assert_close((z[:, 0] + 1.0) / 2.0, x * x)
    torch.testing.assert_close(logdet.exp(), 2.0 * x)


def test_tails_that_do_not_fit_are_refused_and_have_no_kernels(fused):
    x, params = torch.zeros(2, 3), torch.zeros(2, 3 * 6)
    for call, message in ((lambda: functional.spline(x, params, tails="round"), "tails: expected one of 'linear', 'ci"),
                          (lambda: functional.spline(x, params, tails=None), r"params: .*3\*\(3K \+ 1\)"),
                          (lambda: functional.spline(x, params, kind="linear", tails=None), "tails: .*kind 'linear'"),
                          (lambda: functional.spline_params("linear", 3, "circular"), "tails"),
                          (lambda: functional.spline(x, params, tails="circular", end_derivative=0.9),
                           "end_derivative: expected 1")):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()
    assert [functional.spline_params("rq", 4, tails) for tails in ("linear", *BOUNDED)] == [11, 12, 13]
    with pytest.raises(RuntimeError, match=f"{fused}.*linear tails"):
        functional.spline(x, params, tails="circular")
    with backends.use_backend(None):
        functional.spline(x, params, tails="circular")
        assert backends.explain("spline", x, params, tails="circular").startswith("reference (the kernels' splines")
