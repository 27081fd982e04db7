"""Non-finite and extreme numbers through the public operations on the Triton backend, as tests/unit checks the others.

The interpreter's numbers are numpy's, and these are IEEE's.
"""

import math

import nonfinite_checks
import pytest
import range_checks
import torch

from fastflow.reference import SCALES

every_case = pytest.mark.parametrize("case", nonfinite_checks.WIDE, ids=str)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(autouse=True)
def on_triton(triton):
    """Every test here runs on the Triton backend."""


@every_case
def test_poison_comes_out_where_eager_has_it(case):
    nonfinite_checks.check_poison_in_operands(case, places=(3,))


@pytest.mark.parametrize("case", [c for c in nonfinite_checks.WIDE if c.op != "spline"], ids=str)
def test_poison_in_an_incoming_gradient(case):
    nonfinite_checks.check_poison_in_incoming_gradients(case)


@pytest.mark.parametrize("case", [c for c in nonfinite_checks.WIDE if c.op == "affine_coupling"], ids=str)
def test_extreme_raw_scales_meet_extreme_x(case):
    nonfinite_checks.check_extremes(case, extremes=(0.0, 5.0, 120.0, 1e38, math.inf, math.nan))


@both_dtypes
@pytest.mark.parametrize("scale", range_checks.MAPS)
def test_scale_maps_over_the_whole_range(scale, dtype):
    range_checks.check_scale_map(range_checks.MAPS[scale], dtype, count=81)


@both_dtypes
@pytest.mark.parametrize("scale", SCALES)
def test_gaussians_over_the_whole_range(scale, dtype):
    range_checks.check_gaussian(scale, dtype, count=81)
