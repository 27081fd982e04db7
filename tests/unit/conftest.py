"""The backends that run in this process, as a fixture."""

import pytest
import torch

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
    name, case = request.param, getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if name in ("triton", "cuda") and case is not None and (case.op, "cuda") not in backends.PREFERENCE:
        pytest.skip(f"{case.op} has no kernel on a GPU")
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
