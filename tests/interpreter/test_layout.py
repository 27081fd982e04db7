"""Coalescing, memory formats, and offsets in 64 bits."""

import layouts
import pytest
import torch
import triton
import triton.language as tl
from fastflow.kernels import layout
from triton.runtime.errors import InterpreterError


@triton.jit
def offsets_kernel(out_ptr, batch, first: tl.int64, sizes, strides, base, RANK: tl.constexpr, UNIT: tl.constexpr,
                   WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[None, :]
    index = first + at
    if not WIDE:
        index = index.to(tl.int32)
    rows = tl.zeros([1, 1], tl.int64) + batch
    tl.store(out_ptr + at, layout.offsets_of(rows, index, sizes, strides, base, RANK, UNIT))


@triton.jit
def narrow_kernel(out_ptr, batch, stride):
    tl.store(out_ptr, batch * stride)


def offsets(plan, operand, batch, first, count, base=0):
    out = torch.empty(1, count, dtype=torch.int64)
    offsets_kernel[(1,)](out, batch, first, plan.sizes, plan.strides[operand], base, **plan.meta(), BLOCK=count)
    return out[0]


@pytest.mark.parametrize("make", layouts.ALL, ids=layouts.by_name)
@pytest.mark.parametrize("reorder", [False, True])
def test_every_element_is_visited_once_at_its_offset(make, reorder):
    t = make(torch.arange(3 * 4 * 2 * 8, dtype=torch.float64).view(3, 4, 2, 8))
    other = torch.empty(3, 4, 2, 8)
    plan = layout.plan(tuple(t.shape), (t.stride(), other.stride()), reorder=reorder)
    flat = torch.as_strided(t, (t.untyped_storage().nbytes() // 8,), (1,), 0)
    for batch in range(3):
        mine = flat[t.storage_offset() + offsets(plan, 0, batch, 0, 64)]
        logical = offsets(plan, 1, batch, 0, 64) - batch * 64
        assert torch.equal(logical.sort()[0], torch.arange(64))
        assert torch.equal(mine, t[batch].reshape(-1)[logical])
        if not reorder:
            assert torch.equal(logical, torch.arange(64))


def test_dims_run_as_few_and_units_divide():
    x = (2 * 6 * 64, 64, 8, 1)
    plan = layout.plan((5, 6, 8, 8), (x, (768, 64, 8, 1)), (384,))
    assert (plan.rank, plan.unit, plan.n, plan.sizes, plan.bases) == (1, 16, 384, (24,), (24,))
    channels_last = (12 * 64, 1, 96, 12)
    plan = layout.plan((5, 6, 8, 8), (channels_last, channels_last), (6,), reorder=True)
    assert (plan.rank, plan.unit, plan.sizes) == (2, 2, (64, 3))
    assert plan.strides[0] == (384, 6, 1)


def test_offsets_need_64_bits_and_have_them():
    """With strides of a virtual tensor of many gigabytes, whose 32-bit product wraps: which no kernel could hide."""
    shape, stride = (4096, 4, 2**20), (2**33 + 48, 2**31 + 16, 1)
    plan = layout.plan(shape, (stride,))
    first = 3 * 2**20 + 7
    expected = 4000 * stride[0] + 3 * stride[1] + 7 + 16
    assert offsets(plan, 0, 4000, first, 16, base=16 // plan.unit)[0] == expected
    wide = layout.plan((2, 2**32), ((2**32, 1),))
    assert wide.wide
    assert offsets(wide, 0, 1, 2**32 - 16, 16)[-1] == 2**33 - 1
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="mul of int32: 7864320000"):
        narrow_kernel[(1,)](out, 1000, 7_864_320)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 2, 3, 5), (3, 4, 5), *layouts.AMBIGUOUS_SHAPES, (0, 3, 4, 4)])
@pytest.mark.parametrize("make", layouts.ALL, ids=layouts.by_name)
def test_memory_format_is_the_one_torch_suggests(shape, make):
    t = make(torch.zeros(shape))
    suggested = torch._prims_common.suggest_memory_format(t)
    assert layout.suggests_channels_last(t) == (suggested != torch.contiguous_format)
    assert layout.empty_like_format(t, t.shape, t.dtype).stride() == torch.empty(
        shape, memory_format=suggested).stride()
