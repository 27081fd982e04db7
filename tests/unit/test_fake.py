"""FakeTensor and meta: the public functions plan exactly what they do, for every layout."""

import layouts
import pytest
import torch
from cases import CPU_CASES, FULL_PRECISION, Case
from torch._subclasses import FakeTensorMode

FORMATS = (layouts.contiguous, layouts.channels_last, layouts.channel_slice, layouts.padded, layouts.permuted,
           layouts.expanded(0))


def plan(case, tensors, convert):
    return case.call({name: convert(t) for name, t in tensors.items()})


@pytest.mark.parametrize("layout", FORMATS, ids=layouts.by_name)
@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_fake_tensors_have_the_shape_dtype_and_strides_of_real_ones(case, layout, backend, device):
    for dtype in (torch.float32, torch.float64 if FORMATS.index(layout) % 2 else torch.bfloat16):
        if case.op in FULL_PRECISION and dtype == torch.bfloat16:
            continue
        tensors = {n: layout(t) if t.dim() > 1 and n != "perm" else t for n, t in case.tensors(dtype, device).items()}
        real = case.call(tensors)
        mode = FakeTensorMode()
        with mode:
            fake = plan(case, tensors, mode.from_tensor)
        for name, got, planned in zip(case.outputs, real, fake, strict=True):
            assert got.shape == planned.shape and got.dtype == planned.dtype, name
            assert got.stride() == planned.stride(), (name, got.stride(), planned.stride())


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_meta_tensors(case):
    tensors = case.tensors(torch.float32)
    for got, planned in zip(case.call(tensors), plan(case, tensors, lambda t: t.to("meta")), strict=True):
        assert planned.is_meta and got.shape == planned.shape and got.dtype == planned.dtype


def test_gradients_of_fake_tensors_are_planned_too(backend, device):
    case = Case("packed", "affine_coupling", {"x": (3, 4, 5, 6), "params": (3, 8, 5, 6)})
    tensors = {n: layouts.channels_last(t) for n, t in case.tensors(torch.float32, device).items()}
    mode = FakeTensorMode()
    with mode:
        leaves = {n: mode.from_tensor(t).requires_grad_() for n, t in tensors.items()}
        y, logdet = case.call(leaves)
        grads = torch.autograd.grad(y.sum() + logdet.sum(), list(leaves.values()))
    for grad, t in zip(grads, tensors.values(), strict=True):
        assert grad.shape == t.shape and grad.dtype == t.dtype
