"""The Triton kernels on CPU tensors, in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreter.

Triton reads the variable when a kernel is defined, so these tests need a process of their own.
"""

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET", "0") == "1"

if INTERPRETS:
    pytest.importorskip("triton")


def pytest_configure():
    if INTERPRETS:
        patch_the_language_once()
        check_integers()


def patch_the_language_once():
    """A launch puts the interpreter's functions into triton.language; each call of another function inside the launch
    would go through that language again, a third of these tests' time, to put the same functions there."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another version of Triton
        return
    patch = interpreter._patch_lang

    def patch_if_needed(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = patch_if_needed


def check_integers():
    """Sums, differences and products of signed integers of fewer than 64 bits, as offsets are, must not overflow. The
    interpreter works this out too, a third of these tests' time, but as its assertions are off, nobody asks."""
    import numpy as np
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, left, right, operation):
        kind = left.type.scalar
        if kind.is_int_unsigned() or kind.int_bitwidth >= 64:
            return
        name = operation.__name__
        exact = operations[name](left.handle.data, right.handle.data, dtype=np.int64)
        if exact.min() < kind.get_int_min_value() or exact.max() > kind.get_int_max_value():
            raise OverflowError(f"{name} of {kind}: {exact.min()} to {exact.max()}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


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
