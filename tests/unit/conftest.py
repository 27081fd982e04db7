"""The backends that run in this process, as a fixture."""

import pytest
import torch
from cases import no_kernel

from fastflow import backends

CPU_BACKENDS = ["reference", "cpu"]
GPU_BACKENDS = [pytest.param("triton", marks=pytest.mark.gpu), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """One thread unless a test asks for more: on a shared machine a pool that waits for its turn costs more than it
    gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _enter(request):
    """Choose the backend, unless it has no kernel for the test's case, or for the one op that a module is about, its
    OP, at the test's ``size``."""
    name, params = request.param, request.node.callspec.params
    case, op, size = params.get("case"), getattr(request.module, "OP", None), params.get("size", 0)
    if case is not None:
        op, size = case.op, case.shapes["weight"][-1] if case.op.startswith("slogdet") else 0
    reason = op and no_kernel(name, op, size)
    if reason:
        pytest.skip(reason)
    if not backends.available()[name]:
        pytest.skip(f"{name}: {backends.status()[name]}")
    return backends.use_backend(name)


@pytest.fixture(params=CPU_BACKENDS + GPU_BACKENDS)
def backend(request):
    """The name of a backend, which every operation in the test runs on."""
    with _enter(request):
        yield request.param


@pytest.fixture(params=["cpu", *GPU_BACKENDS])
def fused(request):
    """Like ``backend``, without the reference: for what only kernels promise, and for what the reference defines."""
    with _enter(request):
        yield request.param


@pytest.fixture
def device(request):
    """Where the operands of the backend under test live."""
    name = request.getfixturevalue("fused" if "fused" in request.fixturenames else "backend")
    return "cuda" if name in ("triton", "cuda") else "cpu"
