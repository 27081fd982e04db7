"""Inversion errors: the report against what can be computed by hand, and the stated bounds by depth and scale map."""

import math
import sys
from pathlib import Path

import pytest
import torch

from fastflow import diagnostics, flows
from fastflow.nn import MLP, AffineCoupling

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import inversion  # noqa: E402


class Biased(torch.nn.Module):
    """z = 2 x, whose inverse is off by ``error`` in sample 1, and whose log-determinants miss 0 by 0.25."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x, context=None):
        return 2 * x, x.new_full((len(x),), x.shape[1] * math.log(2.0))

    def inverse(self, z, context=None):
        error = torch.zeros_like(z)
        error[1] = self.error
        return z / 2 + error, z.new_full((len(z),), 0.25 - z.shape[1] * math.log(2.0))


def test_the_errors_are_those_made():
    x = torch.tensor([[1.0, -3.0], [3.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    report = diagnostics.inversion_error(flows.Flow(Biased(1e-3), flows.StandardNormal(2)), x)
    assert report.absolute == pytest.approx(1e-3) and report.relative == pytest.approx(1e-3 / 2)
    assert report.logdet == pytest.approx(0.25) and report.worst == 1 and report.by_depth == (report.absolute,)
    twice = diagnostics.inversion_error(flows.Compose(flows.Compose(Biased(1e-3), flows.Reverse()), Biased(2e-3)), x)
    assert twice.by_depth == pytest.approx((2e-3, 2e-3, 2e-3)) and twice.absolute == pytest.approx(2e-3)
    assert "3 layers" in str(twice)


def test_what_is_not_finite_is_infinite_and_an_empty_batch_has_no_error():
    x = torch.zeros(3, 2)
    for error in (math.nan, math.inf):
        report = diagnostics.inversion_error(Biased(error), x)
        assert report.absolute == report.relative == math.inf and report.worst == 1
    assert diagnostics.inversion_error(flows.RealNVP(2), x[:0]) == diagnostics.InversionError(0.0, 0.0, 0.0, (0.0,) * 9,
                                                                                              None)
    with pytest.raises(TypeError, match="^flow"):
        diagnostics.inversion_error(torch.nn.ReLU(), x)


def test_context_and_depth():
    flow = flows.Flow(flows.Compose(*(AffineCoupling(MLP(2, 4, (8,), context_features=1), flip=i % 2 == 1)
                                      for i in range(5))), flows.StandardNormal(4))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x, context = torch.randn(20, 4), torch.randn(20, 1)
    report = diagnostics.inversion_error(flow, x, context)
    assert len(report.by_depth) == 5 and 0.0 < report.by_depth[-1] < 1e-5 and report.by_depth[0] < 1e-4
    exact = diagnostics.inversion_error(flow.double(), x.double(), context.double())
    assert exact.absolute < 1e-12 and exact.logdet < 1e-12
    inverted = diagnostics.inversion_error(flows.Inverse(flow.transform), x.double(), context.double())
    assert len(inverted.by_depth) == 5 and inverted.absolute < 1e-12


def within_bounds(gain, precision, scale):
    bounds = inversion.BOUNDS[gain, precision][scale]
    assert len(bounds) == len(inversion.DEPTHS) and list(bounds) == sorted(bounds)
    with torch.no_grad():
        for depth, bound in zip(inversion.DEPTHS, bounds, strict=True):
            error = inversion.measure(scale, depth, gain, precision == "bfloat16")
            assert error <= bound, f"{depth} layers: {error:.1e} above {bound:.0e}"
    # Not vacuous: the deepest error is within two decades of its bound, and a lost one is no small one.
    assert error > (0.01 * bound if bound < math.inf else 0.05)


def rows(gain):
    return pytest.mark.parametrize(("precision", "scale"), list(inversion.cases(gain)))


@rows(0.5)
def test_the_stated_bounds_hold(precision, scale):
    within_bounds(0.5, precision, scale)


@pytest.mark.slow
@rows(1.0)
def test_the_stated_bounds_hold_for_wild_conditioners(precision, scale):
    within_bounds(1.0, precision, scale)


def test_the_page_is_that_of_the_bounds():
    assert inversion.PAGE.read_text() == inversion.render(), "run python -m benchmarks.inversion"


def test_what_is_stated_from_errors():
    assert inversion.stated([1e-6, 3e-5, 1e-6, 0.3]) == pytest.approx([1e-5, 1e-3, 1e-3, math.inf])
    assert inversion.stated([0.0, 0.15], lowered=True) == pytest.approx([1e-2, 1.0])
