"""The public operations on the Triton backend: every case of tests/cases.py, with autograd around the kernels."""

import contextlib

import cases
import layouts
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fastflow import backends


@pytest.fixture(autouse=True)
def on_triton(triton):
    """Every test here runs on the Triton backend."""


# Another elimination than LAPACK's, in the same float64: no ratio of two single errors to hold it to.
FLOAT64_CASES = [case for case in cases.TRITON_CASES if not case.op.startswith("slogdet")]


@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in cases.TRITON_CASES),
                                         *((case, torch.float64) for case in FLOAT64_CASES)], ids=str)
def test_values_and_gradients(case, dtype):
    tensors = case.tensors(dtype)
    assert backends.explain(case.op, *tensors.values()).startswith("triton")
    cases.check_by_ratio(case, tensors, cotangents=cases.cotangents_of(case, tensors))


@pytest.mark.parametrize("case", cases.TRITON_CASES, ids=str)
def test_fake_tensors_are_planned_and_no_kernel_reads_them(case, launches):
    """Inside their mode and outside it, forward and backward."""
    tensors = case.tensors(torch.float32)
    results, grads = cases.evaluate(case, tensors, cotangents=cases.cotangents_of(case, tensors))
    mode, planned = FakeTensorMode(), []
    launches.clear()
    fake = {name: mode.from_tensor(t) for name, t in tensors.items()}
    for context in (mode, contextlib.nullcontext()):
        with context:
            leaves = {name: t.detach().requires_grad_(name in case.differentiable) for name, t in fake.items()}
            out = dict(zip(case.outputs, case.call(leaves), strict=True))
            found = torch.autograd.grad([t.sum() for t in out.values() if t.requires_grad],
                                        [leaves[name] for name in case.differentiable])
        planned.append((out, dict(zip(case.differentiable, found, strict=True))))
    assert not launches
    for plan, real in ((p, r) for pair in planned for p, r in zip(pair, (results, grads), strict=True)):
        for name, t in plan.items():
            assert isinstance(t, FakeTensor) and t.shape == real[name].shape and t.dtype == real[name].dtype
            assert real is grads or t.stride() == real[name].stride(), name


@pytest.mark.parametrize("case", cases.TRITON_CASES, ids=str)
def test_imaginary_parts_of_conjugates_are_read_with_their_sign(case):
    """Operands and incoming gradients whose memory holds the opposite of their values."""
    def negated(t):
        return torch.complex(torch.zeros_like(t), -t).conj().imag if t.is_floating_point() else t

    tensors = case.tensors(torch.float32)
    cotangents = cases.cotangents_of(case, tensors)
    want = cases.evaluate(case, tensors, cotangents=cotangents)
    assert negated(cotangents[case.outputs[-1]]).is_neg()
    got = cases.evaluate(case, {name: negated(t) for name, t in tensors.items()},
                         cotangents={name: negated(t) for name, t in cotangents.items()})
    for ours, plain in zip(got, want, strict=True):
        for name, t in plain.items():
            torch.testing.assert_close(ours[name], t, equal_nan=True)


@pytest.mark.parametrize("case", cases.AFFINE_CASES + cases.GAUSSIAN_CASES, ids=str)
@pytest.mark.parametrize("make", [layouts.permuted, layouts.odd_offset, layouts.channel_slice, layouts.expanded(0)],
                         ids=layouts.by_name)
def test_layouts(case, make):
    tensors = {name: make(t) if t.dim() > 1 else t for name, t in case.tensors(torch.float32).items()}
    cases.check_by_ratio(case, tensors, cotangents=cases.cotangents_of(case, tensors))


@pytest.mark.parametrize("case", cases.TRITON_CASES, ids=str)
def test_one_gradient_at_a_time(case):
    """Each operand alone gets the gradient that it gets among all."""
    tensors = case.tensors(torch.float64)
    cotangents = cases.cotangents_of(case, tensors)
    _, full = cases.evaluate(case, tensors, cotangents=cotangents)
    for name in case.differentiable:
        _, alone = cases.evaluate(case, tensors, needs=(name,), cotangents=cotangents)
        torch.testing.assert_close(alone[name], full[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases.TRITON_CASES, ids=str)
def test_empty_batch(case):
    tensors = case.tensors(torch.float32, batch=0)
    results, _ = cases.evaluate(case, tensors)
    assert all(t.numel() == 0 or case.options.get("n_samples") for t in results.values())
