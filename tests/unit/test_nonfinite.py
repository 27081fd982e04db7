"""NaN and infinities come out where eager PyTorch has them, and nowhere else."""

import nonfinite_checks
import pytest
from cases import CASES

every_case = pytest.mark.parametrize("case", nonfinite_checks.WIDE, ids=str)


@every_case
def test_poison_comes_out_where_eager_has_it(case, fused, device):
    nonfinite_checks.check_poison_in_operands(case, device)


@every_case
def test_poison_in_an_incoming_gradient(case, fused, device):
    nonfinite_checks.check_poison_in_incoming_gradients(case, device)


@pytest.mark.parametrize("case", [c for c in nonfinite_checks.WIDE if c.op == "affine_coupling"], ids=str)
def test_extreme_raw_scales_meet_extreme_x(case, fused, device):
    nonfinite_checks.check_extremes(case, device)


@pytest.mark.parametrize("size", [4, 16, 17, 33])
@pytest.mark.parametrize("case", [c for c in CASES if not c.op.startswith(("slogdet", "plu"))], ids=str)
def test_a_whole_batch_of_nan_and_of_zeros(case, size, fused, device):
    nonfinite_checks.check_a_batch_of_one_value(case, size, device)
