"""The Triton kernels on CPU tensors, in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter.

Triton reads the variable when a kernel is defined, so these tests need a process of their own.
"""

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"

if INTERPRETS:
    pytest.importorskip("triton")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "interpreter":
            # numpy warns of the overflows and NaN that the tests provoke.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
            if not INTERPRETS:
                item.add_marker(pytest.mark.skip(
                    reason="needs a process of its own: TRITON_INTERPRET=1 pytest tests/interpreter"))


@pytest.fixture
def launches(monkeypatch):
    """The name of every kernel launched so far in the test."""
    from fastflow.kernels import layout

    names, real = [], layout.launch

    def counted(kernel, programs, *args, **meta):
        if programs:
            names.append(kernel.fn.__name__)
        real(kernel, programs, *args, **meta)

    monkeypatch.setattr(layout, "launch", counted)
    return names


@pytest.fixture
def triton():
    """Operations run on the Triton backend."""
    from fastflow import backends

    with backends.use_backend("triton"):
        yield
