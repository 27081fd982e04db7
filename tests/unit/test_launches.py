"""Launches counted without a GPU. Triton's declarations are held against the launchers themselves, run on meta tensors;
tests/interpreter and tests/simt hold them, and those of CUDA, against kernels that run."""

import importlib.util
import inspect

import cases
import pytest
import torch
from launch_cases import LAUNCH_CASES, operator_calls

from fastflow import backends, extension, flows, functional, launches

pytestmark = pytest.mark.skipif(not backends.available()["cpu"], reason="the cpu library is not built")
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("row", LAUNCH_CASES, ids=lambda row: f"{row[0].op}-{row[0]}")
def test_launches_of_a_call(row, backend):
    case, *numbers = row
    forward, backward = numbers[:2] if backend == "triton" else numbers[2:]
    if forward is None:
        with pytest.raises(ValueError, match=f"no {backend} kernel"), launches.count(backend):
            cases.evaluate(case, case.tensors(torch.float32))
        return
    tensors = case.tensors(torch.float32)
    with launches.count(backend) as counted:
        cases.evaluate(case, tensors)
    assert counted.total == forward
    cotangents = cases.cotangents_of(case, tensors)
    with launches.count(backend) as counted:
        cases.evaluate(case, tensors, cotangents=cotangents)
    assert counted.total == forward + backward


ON_A_GPU = set(extension.NAMES) - set(extension.CPU_ALONE)
BATCHES = (0, 1, 3, 64, 65, 512, 513)
EVENTS = ((2,), (2, 0), (2, 5), (3, 1), (2, 2048), (2, 2050), (2, 8192), (2, 8200))


@needs_triton
def test_triton_declares_what_its_launchers_launch(monkeypatch):
    """Many shapes, zero sizes among them; the launchers run on meta tensors, and only the launch is left out."""
    from fastflow.kernels import layout

    grids = []
    monkeypatch.setattr(layout, "launch", lambda kernel, programs, *args, **meta: grids.append(programs))
    declared, seen = launches.declared("triton"), set()
    for name, args in operator_calls("meta", BATCHES, EVENTS, mixed_priors=True):
        if name in extension.WITHOUT_TRITON:
            continue
        grids.clear()
        extension.launchers()[name](*args)
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        assert declared[name](*args) == sum(map(bool, grids)), (name, shapes, grids)
        seen.add(name)
    assert seen == ON_A_GPU - set(extension.WITHOUT_TRITON)


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_operator_declares_its_launches(backend):
    declared = launches.declared(backend)
    lacking = {*extension.CPU_ALONE, *(extension.WITHOUT_TRITON if backend == "triton" else extension.WITHOUT_CUDA)}
    assert set(declared) == set(extension.NAMES) - lacking
    for schema in extension.SCHEMAS:
        name, _, rest = schema.partition("(")
        if name in lacking:
            continue
        arguments = rest.partition(")")[0].split(", ")
        inspect.signature(declared[name]).bind(*arguments)


@needs_triton
@pytest.mark.parametrize("parametrization", ["plain", "plu"])
def test_a_glow_training_step(parametrization):
    """One launch per coupling and direction, one factorisation per size of 1x1 weight, whatever the depth."""
    n_levels, n_steps = 3, 4
    flow = flows.Glow((3, 16, 16), n_levels, n_steps, hidden_channels=4, parametrization=parametrization)
    x = torch.rand(2, 3, 16, 16) - 0.5
    with launches.count() as counted:
        flow(x).mean().neg().backward()
    couplings = n_levels * n_steps + n_levels - 1  # a split's learned prior is an affine coupling too
    weights = {"slogdet_fwd": n_levels} if parametrization == "plain" else {
        "plu_weight_fwd": n_levels, "plu_weight_bwd": n_levels}
    expected = {"affine_coupling_fwd": couplings, "affine_coupling_bwd": couplings, **weights}
    assert counted.by_operator == counted.calls == expected
    assert counted.by_stem["affine_coupling"] == 2 * couplings
    assert counted.total == sum(expected.values())
    assert f"total                {counted.total:>6} launches" in str(counted)


@needs_triton
def test_what_a_backend_refuses_is_not_counted():
    weight = torch.eye(48).expand(2, 48, 48)
    with pytest.raises(ValueError, match="up to 32x32"), launches.count("triton"):
        functional.slogdet(weight)
    assert extension.observers == ()
    with launches.count() as counted:  # the table gives it to cuda, and what is larger yet to torch
        functional.slogdet(weight)
        functional.slogdet(torch.eye(200))
    assert counted.by_operator == {"slogdet_fwd": 1} and counted.calls == {"slogdet_fwd": 2}


@needs_triton
def test_convolutions_that_a_gpu_leaves_to_cudnn_are_not_counted(monkeypatch):
    """Too few hidden channels, or a precision for which the kernels are not preferred."""
    def counted(hidden, dtype=torch.float32):
        operands = cases.conv_case("count", (1, 2, 4, 4), hidden, 3).tensors(dtype)
        with launches.count() as found:
            functional.conv_net(*(t.requires_grad_() for t in operands.values())).sum().backward()
        return found.total

    assert (counted(128), counted(112), counted(128, torch.float64)) == (10, 0, 0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert counted(128) == 0


def test_blocks_nest_and_end():
    x, params = torch.randn(2, 3), torch.randn(2, 6)
    with launches.count("cuda") as outer:
        with launches.count("cuda") as inner:
            functional.affine_coupling(x, params)
        functional.affine_coupling(x, params)
    functional.affine_coupling(x, params)
    assert (inner.total, outer.total) == (1, 2)
    with launches.count("cuda") as counted, backends.use_backend("reference"):
        functional.affine_coupling(x, params)
    assert counted.total == 0


def test_bad_backend_is_named():
    with pytest.raises(ValueError, match="backend: expected 'triton' or 'cuda', got 'cpu'"), launches.count("cpu"):
        pass


def test_nothing_is_counted_without_native_kernels(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda: {name: name == "reference" for name in backends.NAMES})
    with pytest.raises(RuntimeError, match="no native backend"), launches.count("cuda"):
        pass


def test_results_and_gradients_are_the_same_while_counting():
    x, params = torch.randn(4, 6, requires_grad=True), torch.randn(4, 12, requires_grad=True)

    def run():
        y, logdet = functional.affine_coupling(x, params)
        return y, *torch.autograd.grad(y.sum() + logdet.sum(), (x, params))

    plain = run()
    with launches.count("cuda"):
        assert all(map(torch.equal, run(), plain))
