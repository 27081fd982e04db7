"""The matrix kernels, called directly, against the reference."""

import itertools
import math

import layouts
import pytest
import torch
from fastflow.kernels import plu_weight, slogdet
from tolerances import GRADIENT_FACTOR, assert_by_ratio

from fastflow import reference


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values(size, dtype, launches):
    weight = torch.randn(3, size, size).to(dtype)
    if size > 2:
        weight[1] = torch.eye(size)[torch.randperm(size)]
        weight[2, 0] = 0.0
    got = slogdet.slogdet_fwd(weight, True)
    assert launches == ["slogdet_kernel"]
    eager, truth = reference.slogdet_inverse(weight), reference.slogdet_inverse(weight.double())
    assert torch.equal(got[0], eager[0])
    for name, out, near, exact in zip(("sign", "logabsdet", "inverse"), got, eager, truth, strict=True):
        assert_by_ratio(out, near, exact, magnitude=size, what=name)
    without = slogdet.slogdet_fwd(weight, False)
    assert torch.equal(without[0], got[0]) and without[2].shape == (0,)
    torch.testing.assert_close(without[1], got[1])


def test_every_permutation_has_its_parity_and_inverse():
    matrices = torch.stack([torch.eye(4)[list(order)] for order in itertools.permutations(range(4))])
    sign, logabsdet, inverse = slogdet.slogdet_fwd(matrices, True)
    assert torch.equal(sign, torch.linalg.det(matrices).sign())
    assert not logabsdet.any() and torch.equal(inverse, matrices.mT)


def test_broken_matrices_leave_the_others_alone():
    weight = torch.randn(5, 6, 6)
    alone = [slogdet.slogdet_fwd(weight[i : i + 1], True) for i in (0, 4)]
    weight[1, 2, 3] = math.nan
    weight[2, :, 3] = weight[2, :, 1] = 0.0
    weight[3] = 1e30
    sign, logabsdet, inverse = slogdet.slogdet_fwd(weight, True)
    assert sign[1].isnan() and logabsdet[1].isnan() and inverse[1].isnan().all()
    assert (sign[2:4] == 0).all() and (logabsdet[2:4] == -math.inf).all() and inverse[2:4].isnan().all()
    for i, one in zip((0, 4), alone, strict=True):
        assert all(torch.equal(a[i], b[0]) for a, b in zip((sign, logabsdet, inverse), one, strict=True))


@pytest.mark.parametrize("want_inverse", [False, True])
@pytest.mark.parametrize("size", [2, 7, 20])
def test_equal_rows_cancel_without_rounding(size, want_inverse):
    weight = torch.randn(6, size, size)
    weight[:, -1] = weight[:, 0]
    sign, logabsdet, _ = slogdet.slogdet_fwd(weight, want_inverse)
    assert not sign.any() and (logabsdet == -math.inf).all()


@pytest.mark.parametrize("make", layouts.KEEP_VALUES, ids=layouts.by_name)
def test_layouts(make):
    weight = torch.randn(2, 3, 5, 5)
    for out, dense in zip(slogdet.slogdet_fwd(make(weight), True), slogdet.slogdet_fwd(weight, True), strict=True):
        assert torch.equal(out, dense) and out.is_contiguous()


def test_empty_batch_and_size_limit():
    sign, logabsdet, inverse = slogdet.slogdet_fwd(torch.randn(2, 0, 3, 3), True)
    assert sign.shape == logabsdet.shape == (2, 0) and inverse.shape == (2, 0, 3, 3)
    with pytest.raises(ValueError, match="weight: expected matrices up to 32x32"):
        slogdet.slogdet_fwd(torch.randn(1, 33, 33), False)


@pytest.mark.parametrize("size, dtype", [(1, torch.float32), (4, torch.float32), (7, torch.float32),
                                         (7, torch.float64)])
def test_plu_weight(size, dtype, launches, monkeypatch):
    for name, small in (("TILE", 4), ("DOUBLE_TILE", 4), ("TERMS", 2)):  # several tiles and blocks of terms
        monkeypatch.setattr(plu_weight, name, small)
    count = 2
    operands = [torch.randn(count, size, size).to(dtype).mT, torch.randn(count, size, size).to(dtype),
                (0.3 * torch.randn(count, size)).to(dtype), torch.randn(count, size).sign().to(dtype)]
    perm = torch.argsort(torch.rand(count, size), -1)
    grad = torch.randn(count, size, size).to(dtype)

    def expected(in_dtype):
        leaves = [t.to(in_dtype).detach().requires_grad_(i < 3) for i, t in enumerate(operands)]
        weight = reference.plu_weight(*leaves, perm)
        return weight.detach(), *torch.autograd.grad(weight, leaves[:3], grad.to(in_dtype))

    got = plu_weight.plu_weight_fwd(*operands, perm), *plu_weight.plu_weight_bwd(grad, *operands, perm)
    assert launches == ["plu_weight_fwd_kernel", "plu_weight_bwd_kernel"]
    for i, (out, near, exact) in enumerate(zip(got, expected(dtype), expected(torch.float64), strict=True)):
        assert_by_ratio(out, near, exact, factor=GRADIENT_FACTOR if i else 2.0, magnitude=math.sqrt(size))
    assert not got[1].triu().any() and not got[2].tril().any()


def test_plu_of_no_matrices():
    empty = torch.randn(0, 4, 4)
    weight = plu_weight.plu_weight_fwd(empty, empty, empty[:, 0], empty[:, 0], torch.zeros(0, 4, dtype=torch.int64))
    assert weight.shape == (0, 4, 4)
