"""Every case of the registry in pytest-benchmark, a group per case: ``python -m pytest benchmarks --benchmark-only``.

Wall time with torch's number of threads (OMP_NUM_THREADS), on the GPU if there is one, each call then with its wait.
``fastflow bench`` interleaves the variants and writes the record.
"""

import functools

import pytest
import torch

from benchmarks import cases, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.lru_cache(maxsize=1)  # the variants of a case come one after the other
def _build(case):
    torch.compiler.reset()
    return case.build(DEVICE)


def _waiting(call):
    def run():
        call()
        torch.cuda.synchronize()
    return run


@pytest.mark.parametrize(("case", "variant"), [
    pytest.param(case, variant, id=f"{case.name}-{variant}") for case in cases.OP_CASES for variant in case.variants])
def test_op(benchmark, case, variant):
    variants = _build(case)
    assert tuple(variants) == case.variants
    call = _waiting(variants[variant]) if DEVICE == "cuda" else variants[variant]
    try:
        call()  # compiles
    except Exception as error:
        if variant == "fastflow":
            raise
        pytest.skip(f"{variant} failed: {timing.first_line(error)}")
    benchmark.group = case.name
    benchmark.name = variant
    benchmark(call)
