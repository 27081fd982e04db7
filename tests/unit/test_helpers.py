"""The tests' own helpers catch the faults that they are there to catch."""

import layouts
import pytest
import torch
from cases import CASES, cotangents_of, evaluate, no_kernel
from tolerances import assert_bitwise, assert_by_ratio, assert_elementwise, assert_same_nonfinite

from fastflow import backends, extension


@pytest.fixture
def numbers():
    truth = torch.randn(50, dtype=torch.float64)
    eager = truth.float() * (1 + 1e-6)
    return eager, truth


def test_ratio_rule_accepts_eager_itself_and_twice_its_error(numbers):
    eager, truth = numbers
    assert_by_ratio(eager, eager, truth)
    assert_by_ratio((truth + 1.9 * (eager.double() - truth)).float(), eager, truth)


def wrong_sign(t):
    return -t


def one_element_off(t):
    return torch.cat([t[:1] + 1e-4, t[1:]])


def low_precision(t):
    return t.bfloat16().float()


def lost_nan(t):
    return torch.cat([torch.full_like(t[:1], float("nan")), t[1:]])


def shifted(t):
    return t.roll(1)


@pytest.mark.parametrize("fault", [wrong_sign, one_element_off, low_precision, lost_nan, shifted],
                         ids=lambda f: f.__name__)
@pytest.mark.parametrize("rule", [assert_by_ratio, assert_elementwise], ids=lambda f: f.__name__)
def test_rules_catch(numbers, rule, fault):
    eager, truth = numbers
    with pytest.raises(AssertionError):
        rule(fault(eager), eager, truth)


def test_ratio_rule_catches_shape_dtype_and_low_precision_truth(numbers):
    eager, truth = numbers
    for out, expected, exact in ((eager[:1], eager, truth), (eager.double(), eager, truth), (eager, eager, eager)):
        with pytest.raises(AssertionError):
            assert_by_ratio(out, expected, exact)


def test_elementwise_rule_sees_a_small_element_beside_a_large_one():
    truth = torch.tensor([1e6, 1e-6], dtype=torch.float64)
    eager = truth.float()
    out = eager.clone()
    out[1] *= 1.01
    assert_by_ratio(out, eager, truth)
    with pytest.raises(AssertionError):
        assert_elementwise(out, eager, truth)


def test_nonfinite_rule_tells_signs_and_places_apart():
    expected = torch.tensor([1.0, float("inf"), float("nan")])
    assert_same_nonfinite(expected + 1, expected)
    for fault in ([1.0, float("-inf"), float("nan")], [1.0, float("nan"), float("inf")], [1.0, float("inf"), 0.0]):
        with pytest.raises(AssertionError):
            assert_same_nonfinite(torch.tensor(fault), expected)


def test_nonfinite_rule_for_gradients_excuses_only_an_infinity_for_a_nan():
    nan, inf = float("nan"), float("inf")
    assert_same_nonfinite(torch.tensor([inf, -inf, nan]), torch.tensor([nan, nan, nan]), gradient=True)
    for got, want in ((nan, inf), (1.0, nan), (inf, -inf), (nan, 1.0), (inf, 1.0)):
        with pytest.raises(AssertionError):
            assert_same_nonfinite(torch.tensor([got]), torch.tensor([want]), gradient=True)


def test_elementwise_rule_accepts_the_right_number_for_eager_s_overflow_and_no_other():
    truth = torch.tensor([2.0, 1e300], dtype=torch.float64)
    eager = torch.tensor([float("nan"), float("inf")])
    assert_elementwise(torch.tensor([2.0, float("inf")]), eager, truth)
    for out in ([2.1, float("inf")], [2.0, 1.0]):
        with pytest.raises(AssertionError):
            assert_elementwise(torch.tensor(out), eager, truth)


def test_bitwise_rule_tells_the_last_bit():
    t = torch.randn(4)
    assert_bitwise(t, t.clone())
    with pytest.raises(AssertionError):
        assert_bitwise(torch.nextafter(t, t + 1), t)


@pytest.mark.parametrize("layout", layouts.ALL, ids=layouts.by_name)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 4, 5), (0, 3, 2, 2), (2, 3, 4, 5, 2)], ids=str)
def test_layouts_keep_shape_and_values(layout, shape):
    t = torch.randn(shape)
    out = layout(t)
    assert out.shape == t.shape and out.dtype == t.dtype
    if layout in layouts.KEEP_VALUES:
        assert torch.equal(out, t)


def test_layouts_are_what_they_say():
    t = torch.randn(3, 4, 5, 6)
    assert layouts.transposed(t).stride()[-2:] == (1, 5)
    assert layouts.permuted(t).stride() == (1, 3, 12, 60)
    assert layouts.step_sliced(t).stride(-1) == 2
    assert layouts.odd_offset(t).storage_offset() == 1 and layouts.odd_offset(t).data_ptr() % 8 != 0
    assert [layout(t).stride(dim) for layout, dim in zip(layouts.STRIDE_ZERO, (0, 1, -1), strict=True)] == [0, 0, 0]
    assert layouts.channels_last(t).is_contiguous(memory_format=torch.channels_last)
    assert layouts.channel_slice(t).stride(1) == 1 and not layouts.channel_slice(t).is_contiguous()
    assert not layouts.padded(t).is_contiguous() and layouts.padded(t).stride(-1) == 1
    assert len(layouts.ALL) >= 10


def test_uninitialised_memory_is_poisoned():
    """An output element that a kernel leaves unwritten is a huge number, not a zero that happens to be right."""
    fresh = [torch.empty(n).abs().max().item() for n in (1000, 3000, 5000, 300_000)]
    assert max(fresh) > 1e38


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_has_finite_results_and_gradients_that_depend_on_the_cotangents(case):
    tensors = case.tensors()
    results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
    assert set(grads) == set(case.differentiable)
    for name, t in {**results, **grads}.items():
        assert torch.isfinite(t).all() and t.abs().max() > 0, name


def test_only_pairs_without_a_kernel_are_skipped():
    for op in backends.OPS:
        name = f"{op.removesuffix('_inverse')}_fwd"
        assert (no_kernel("cuda", op) is not None) == (name in (*extension.CPU_ALONE, *extension.WITHOUT_CUDA)), op
        assert (no_kernel("triton", op) is not None) == (
            name in (*extension.CPU_ALONE, *extension.WITHOUT_TRITON)), op
        assert no_kernel("cpu", op) is None and no_kernel("reference", op) is None
    assert no_kernel("triton", "slogdet", 32) is None and no_kernel("cuda", "slogdet", 33) is None
    assert "33x33" in no_kernel("triton", "slogdet_inverse", 33)
