"""The spline kernels, called directly, against the reference and its float64 autograd; tests/unit/test_spline.py, run
on a GPU, holds them to much more."""

import math

import layouts
import pytest
import torch
from cases import Case, check_by_ratio, cotangents_of, evaluate
from fastflow.kernels import spline as kernels
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import functional, reference

SCALARS = (0, False, 3.0, 1e-3, 1e-3, 1e-3, 1.0, 0.0, 1.0)  # rational-quadratic
BY_KIND = pytest.mark.parametrize("options", [{}, {"inverse": True, "clamp": 6.9}, {"kind": "linear", "inverse": True}],
                                  ids=["rq", "rq_soft_inverse", "linear_inverse"])


@pytest.fixture(autouse=True)
def on_triton(triton):
    """Every call of functional in these tests runs on the Triton backend."""


def case_of(shape, bins, **options):
    per = functional.spline_params(options.get("kind", "rq"), bins)
    return Case("spline", "spline", {"x": shape, "params": (shape[0], per * shape[1], *shape[2:])}, options)


@pytest.mark.parametrize("shape, bins", [((3, 1), 1), ((2, 5, 1, 1), 3), ((3, 10), 17), ((2, 300), 2),
                                         ((2, 2, 2, 1, 2, 2, 2), 2)], ids=str)
def test_shapes_of_a_sample_and_numbers_of_bins(shape, bins):
    case = case_of(shape, bins)
    tensors = case.tensors(torch.float32)
    check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


@pytest.mark.parametrize("x_dtype, params_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
                                                   (torch.float16, torch.float32)], ids=str)
def test_mixed_dtypes(x_dtype, params_dtype):
    case = case_of((2, 4, 4, 4), 3)
    tensors = case.tensors(torch.float32)
    tensors = {"x": tensors["x"].to(x_dtype), "params": tensors["params"].to(params_dtype)}
    check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


@pytest.mark.parametrize("make", [layouts.channels_last, layouts.permuted, layouts.odd_offset, layouts.channel_slice,
                                  layouts.expanded(0)], ids=layouts.by_name)
def test_layouts(make):
    case = case_of((3, 4, 2, 6), 2, kind="linear")
    tensors = {name: make(t) for name, t in case.tensors(torch.float32).items()}
    check_by_ratio(case, tensors, cotangents={n: make(t) if t.dim() > 1 else t.expand(3) for n, t in
                                              cotangents_of(case, tensors).items()})


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 4, 0), (0, 0, 2)], ids=str)
def test_zero_sizes(shape):
    case = case_of(shape, 3)
    tensors = case.tensors(torch.float32)
    running = torch.randn(shape[0])
    results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
    assert results["y"].shape == shape and not results["logdet"].any()
    assert grads["x"] is None or grads["x"].shape == shape
    assert_bitwise(functional.spline(tensors["x"], tensors["params"], logdet=running)[1], running)


def test_large_samples_take_two_launches(launches):
    case = case_of((2, 2, 2100), 2, kind="linear", inverse=True)
    case.shapes["logdet"] = (2,)
    tensors = case.tensors(torch.float32)
    check_by_ratio(case, tensors)
    assert launches == ["spline_fwd_kernel", "row_sums_kernel"]


@BY_KIND
def test_tails_keep_what_they_are_given(options):
    """Outside, x and its gradient pass as they came whatever the parameters are; the interval's ends stay inside."""
    x = torch.tensor([-1.7, 1.7, -1.8, 1.8, 1e30, math.inf, -math.inf])[:, None]
    case = case_of((7, 1), 4, tail_bound=1.7, **options)
    params = case.tensors(torch.float32)["params"]
    params[2:] = math.nan
    x.requires_grad_(), params.requires_grad_()
    y, logdet = functional.spline(x, params, **case.options)
    torch.testing.assert_close(y[:2], x[:2], rtol=1e-6, atol=0)
    assert (y[:2].abs() <= torch.tensor(1.7)).all() and not logdet[2:].any()
    assert_bitwise(y[2:].detach(), x[2:].detach())
    grads = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
    assert torch.isfinite(grads[0]).all() and (grads[0][2:] == 1).all()
    assert torch.isfinite(grads[1][:2]).all() and not grads[1][2:].any()


@BY_KIND
def test_extreme_parameters_stay_finite(options):
    """Raws of +-1e4 in every pattern: bins at their minimum, discriminants that cancel below 0."""
    case = case_of((8, 64), 3, **options)
    x = (6.0 * torch.rand(8, 64) - 3.0).requires_grad_()
    params = (1e4 * torch.randint(-1, 2, case.shapes["params"])).float().requires_grad_()
    y, logdet = functional.spline(x, params, **case.options)
    assert torch.isfinite(y).all() and torch.isfinite(logdet).all() and (y.abs() <= 3.0).all()
    for grad in torch.autograd.grad(y.sum() + logdet.sum(), (x, params)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_stand_where_eager_has_them(bad):
    case = case_of((3, 4), 3)
    tensors = case.tensors(torch.float32)
    tensors["x"][0, 1] = tensors["params"][1, 2] = tensors["params"][2, 15] = bad
    got, eager = (evaluate(case, tensors, module=m)[0] for m in (functional, reference))
    for name, out in got.items():
        assert_same_nonfinite(out, eager[name], name)


def test_gradients_that_are_not_needed_or_not_given(launches):
    x, params, grad = torch.randn(2, 3, 4), torch.randn(2, 24, 4), torch.randn(2)
    full = kernels.spline_bwd(x, grad, x, params, True, True, *SCALARS)
    only_x = kernels.spline_bwd(x, grad, x, params, True, False, *SCALARS)
    only_params = kernels.spline_bwd(x, grad, x, params, False, True, *SCALARS)
    assert torch.equal(only_x[0], full[0]) and only_x[1].shape == only_params[0].shape == (0,)
    assert torch.equal(only_params[1], full[1]) and launches == 3 * ["spline_bwd_kernel"]
    of_y = kernels.spline_bwd(x, None, x, params, True, True, *SCALARS)
    of_log = kernels.spline_bwd(None, grad, x, params, True, True, *SCALARS)
    for a, b, both in zip(of_y, of_log, full, strict=True):
        torch.testing.assert_close(a + b, both, rtol=1e-4, atol=1e-4)


def test_a_sample_does_not_depend_on_its_batch():
    x, params = torch.randn(5, 20), torch.randn(5, 40)
    y, total = kernels.spline_fwd(x, params, None, *SCALARS)
    part, part_total = kernels.spline_fwd(x[2:4], params[2:4], None, *SCALARS)
    assert torch.equal(part, y[2:4]) and torch.equal(part_total, total[2:4])
