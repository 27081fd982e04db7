"""The taps of a 3x3 convolution on Triton against their formulas, and the conditioner made of them."""

import pytest
import torch
from fastflow.kernels import taps as kernels
from tolerances import assert_bitwise, assert_by_ratio

from fastflow.reference import taps

SHAPES = [(2, 3, 4, 5), (3, 1, 1, 1), (1, 6, 8, 8), (2, 17, 3, 2), (5, 2, 1, 7)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def columns_of(channels):
    return -(-9 * channels // 8) * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_taps_are_gathered(shape, channel_major, dtype, launches):
    for x in (torch.randn(shape), torch.randn(shape).contiguous(memory_format=torch.channels_last),
              torch.randn(*shape[:2], shape[2] * 2, shape[3] + 1)[:, :, ::2, 1:], torch.randn(shape[0], 1, 1, 1).expand(
                  shape)):
        for sign in (1, -1):
            args = x.to(dtype), sign, channel_major, columns_of(shape[1])
            assert_bitwise(kernels.gather_taps(*args), taps.gather_taps(*args))
    assert launches == ["gather_taps_kernel"] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channel_major", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_taps_are_summed(shape, channel_major, dtype):
    batch, channels, height, width = shape
    z = torch.randn(batch * height * width, columns_of(channels)).to(dtype)
    for sign in (1, -1):
        for bias in (None, torch.randn(channels).to(dtype)):
            options = batch, channels, height, width, sign, channel_major
            got, want = kernels.sum_taps(z, bias, *options), taps.sum_taps(z, bias, *options)
            truth = taps.sum_taps(z.double(), None if bias is None else bias.double(), *options)
            assert got.stride() == want.stride() and got.dtype == dtype
            assert_by_ratio(got, want, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (600, 16), (40, 256)], ids=str)
def test_gradients_are_rectified_and_summed(shape, dtype, launches):
    grad, h = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype).relu()
    h[0, 0], grad[-1, -1] = float("nan"), float("inf")
    got, want = kernels.rectified_sum(grad, h), taps.rectified_sum(grad, h)
    assert_bitwise(got[0], want[0])
    assert got[1].dtype == want[1].dtype
    assert_by_ratio(got[1], want[1], taps.rectified_sum(grad.double(), h.double())[1])
    assert launches == ["rectified_sum_kernel", "column_sums_kernel"]


def test_nothing_to_do(launches):
    assert kernels.gather_taps(torch.empty(0, 3, 4, 4), 1, False, 32).shape == (0, 32)
    assert kernels.sum_taps(torch.empty(0, 32), None, 0, 3, 4, 4, 1, False).shape == (0, 3, 4, 4)
    assert launches == []
    masked, sums = kernels.rectified_sum(torch.empty(0, 5), torch.empty(0, 5))
    assert masked.shape == (0, 5) and torch.equal(sums, torch.zeros(5)) and launches == ["column_sums_kernel"]
