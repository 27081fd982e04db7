"""The kernels' own elementary functions against longer arithmetic, over stratified arguments."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastflow.kernels import maths

COUNT = 1 << 15
INF, NAN = math.inf, math.nan


@triton.jit
def evaluate_kernel(x_ptr, first_ptr, second_ptr, NAME: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(x_ptr + at)
    second = x
    if NAME == "exp":
        first = maths.exp(x)
    elif NAME == "expm1":
        first, second = maths.expm1_and_excess(x)
    elif NAME == "log":
        first = maths.log(x)
    elif NAME == "log1p":
        first = maths.log1p(x)
    elif NAME == "sigmoid":
        first, second, _ = maths.sigmoid_parts(x)
    elif NAME == "softplus":
        first = maths.softplus(x)
        second = maths.logsigmoid(x)
    elif NAME == "tanh":
        first, second = maths.tanh_and_slope(x)
    else:
        first = maths.atan(x)
    tl.store(first_ptr + at, first)
    tl.store(second_ptr + at, second)


def evaluate(name, x):
    padded = torch.cat([x, torch.ones(triton.next_power_of_2(x.numel()) - x.numel(), dtype=x.dtype)])
    first, second = torch.empty_like(padded), torch.empty_like(padded)
    evaluate_kernel[(1,)](padded, first, second, NAME=name, COUNT=padded.numel())
    return first[: x.numel()], second[: x.numel()]


def arguments(name, dtype):
    """Magnitudes from subnormal to the function's range, both signs, and a dense normal sample."""
    rng = np.random.default_rng(0)
    lowest = -95.0 if dtype == torch.float32 else -700.0
    small = np.exp(rng.uniform(lowest, 4.0, COUNT)) * rng.choice([-1.0, 1.0], COUNT)
    x = np.concatenate([small, rng.normal(size=COUNT), rng.uniform(-80.0, 80.0, COUNT)])
    if name == "log":
        x = np.abs(x)
    elif name == "log1p":
        x = np.clip(x / 80.0, -0.5, 1.0)
    elif name in ("tanh", "sigmoid"):
        x = np.clip(x, -40.0, 40.0)
    return torch.tensor(x, dtype=dtype)


def truth(name, x):
    """(first result, second or None) in extended precision."""
    a = x.numpy().astype(np.longdouble)
    with np.errstate(all="ignore"):
        return {
            "exp": lambda: (np.exp(a), None), "expm1": lambda: (np.expm1(a), None), "log": lambda: (np.log(a), None),
            "log1p": lambda: (np.log1p(a), None), "sigmoid": lambda: (1 / (1 + np.exp(-a)), 1 / (1 + np.exp(a))),
            "softplus": lambda: (np.log1p(np.exp(-np.abs(a))) + np.maximum(a, 0),
                                 np.minimum(a, 0) - np.log1p(np.exp(-np.abs(a)))),
            "tanh": lambda: (np.tanh(a), None), "atan": lambda: (np.arctan(a), None)}[name]()


def worst_ulp(out, exact):
    rounded = exact.astype(out.numpy().dtype)
    return float(np.nanmax(np.abs(out.numpy().astype(np.longdouble) - exact) / np.spacing(np.abs(rounded))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, ulp", [("exp", 1.0), ("expm1", 1.5), ("log", 1.0), ("log1p", 1.0), ("sigmoid", 2.6),
                                       ("softplus", 1.7), ("tanh", 1.6), ("atan", 1.9)])
def test_accuracy(name, ulp, dtype):
    x = arguments(name, dtype)
    for out, exact in zip(evaluate(name, x), truth(name, x), strict=True):
        if exact is not None:
            assert worst_ulp(out, exact) <= ulp


def test_what_cancels():
    """exp(x) - 1 - x keeps its relative precision near 0, and 1 - tanh^2 far out."""
    x = torch.linspace(-0.34, 0.34, 4001, dtype=torch.float32)
    exact = torch.special.expm1(x.double()) - x.double()
    _, excess = evaluate("expm1", x)
    series = x.double() ** 2 / 2 + x.double() ** 3 / 6  # below 1e-4, where float64 cancels too
    exact = torch.where(x.abs() < 1e-4, series, exact)
    assert ((excess.double() - exact).abs() <= 3e-7 * exact).all()
    x = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float32)
    _, slope = evaluate("tanh", x)
    exact = 1.0 / torch.cosh(x.double()) ** 2
    assert ((slope.double() - exact).abs() <= 1e-6 * exact + 2e-7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, at, expected", [
    ("exp", (INF, -INF, 1000.0, -1000.0, 0.0), (INF, 0.0, INF, 0.0, 1.0)),
    ("expm1", (INF, -INF, 1000.0, -1000.0, 0.0), (INF, -1.0, INF, -1.0, 0.0)),
    ("log", (INF, 0.0, 1.0, -1.0, -INF), (INF, -INF, 0.0, NAN, NAN)),
    ("sigmoid", (INF, -INF, 0.0), (1.0, 0.0, 0.5)),
    ("softplus", (INF, -INF), (INF, 0.0)),
    ("tanh", (INF, -INF, 0.0), (1.0, -1.0, 0.0)),
    ("atan", (INF, -INF, 0.0), (math.pi / 2, -math.pi / 2, 0.0))])
def test_special_values_and_nan(name, at, expected, dtype):
    out, _ = evaluate(name, torch.tensor([*at, NAN], dtype=dtype))
    torch.testing.assert_close(out, torch.tensor([*expected, NAN], dtype=dtype), equal_nan=True, rtol=1e-7, atol=0.0)
