"""A pytest plugin for the sanitized subprocess: tests/unit then runs on the emulated CUDA kernels.

The operators of ``fastflow_simt`` stand in for those of the cpu backend, so that what runs on "cpu" in the unit tests
runs csrc/cuda; every other backend's case is deselected. FASTFLOW_SIMT_LIBRARY is the library's path.
"""

import ctypes
import os

import pytest
import torch

from fastflow import extension

LIBRARY = os.environ["FASTFLOW_SIMT_LIBRARY"]


def operators():
    """The emulated operators as {name: OpOverload}."""
    ops = extension.define("fastflow_simt")
    torch.ops.load_library(LIBRARY)
    return {name: getattr(ops, name).default for name in extension.NAMES}


def control():
    """simt_set_order, simt_set_shared_limit and simt_launches of tests/simt/runtime.cpp."""
    library = ctypes.CDLL(LIBRARY)
    library.simt_set_order.argtypes = (ctypes.c_uint64,)
    library.simt_set_shared_limit.argtypes = (ctypes.c_int64,)
    library.simt_launches.restype = ctypes.c_int64
    return library


def pytest_configure():
    loaded = operators()
    extension.load = lambda backend: loaded


def pytest_collection_modifyitems(config, items):
    def emulated(item):
        parameters = getattr(item, "callspec", None)
        chosen = parameters and (parameters.params.get("backend") or parameters.params.get("fused"))
        op = parameters and getattr(parameters.params.get("case"), "op", None)
        lacking = (*extension.CPU_ALONE, *extension.WITHOUT_CUDA)
        return "unit" not in item.path.parts or (chosen == "cpu" and f"{op}_fwd" not in lacking)

    config.hook.pytest_deselected(items=[item for item in items if not emulated(item)])
    items[:] = [item for item in items if emulated(item)]


@pytest.fixture
def emulator():
    """The controls, set back afterwards."""
    library = control()
    library.simt_launches()
    yield library
    library.simt_set_order(0)
    library.simt_set_shared_limit(227 * 1024)
