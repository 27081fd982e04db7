"""What more than one operation is held to in the same way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import cotangents_of, evaluate, subsets
from tolerances import assert_bitwise

TESTS = Path(__file__).resolve().parent


def check_every_subset_of_gradients(case):
    """Those that are asked for are the ones that all together give, in float64."""
    tensors = case.tensors(torch.float64)
    cotangents = cotangents_of(case, tensors)
    _, full = evaluate(case, tensors, cotangents=cotangents)
    for needs in subsets(case.differentiable, 1):
        _, grads = evaluate(case, tensors, needs=needs, cotangents=cotangents)
        assert set(grads) == set(needs)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, full[name], rtol=1e-12, atol=1e-12)


def check_samples_and_threads(case, threads):
    """Bit for bit: 37 samples x by 2 and 3 threads as by one, and three of them alone as among the others."""
    tensors = case.tensors(torch.float32)
    cotangents = cotangents_of(case, tensors)
    threads(1)
    results, grads = evaluate(case, tensors, cotangents=cotangents)
    for count in (2, 3):
        threads(count)
        again = evaluate(case, tensors, cotangents=cotangents)
        for part, other in zip((results, grads), again, strict=True):
            for name, t in part.items():
                assert_bitwise(other[name], t, f"{count} threads {name}")
    for b in (0, 17, 36):
        one = {**tensors, "x": tensors["x"][b : b + 1]}
        alone, alone_grads = evaluate(case, one, cotangents={"y": cotangents["y"][b : b + 1]})
        assert_bitwise(alone["y"], results["y"][b : b + 1])
        assert_bitwise(alone_grads["x"], grads["x"][b : b + 1])


def check_with_instructions(isa, script):
    """``script`` runs to its end in a process whose kernels keep to the instruction set "avx2" or "baseline"; modules
    of tests/ and tests/unit are importable there. Skipped where every other test has these instructions."""
    if isa == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip(f"{isa} is what this processor has")
    start = f"import sys; sys.path[:0] = {[str(TESTS / 'unit'), str(TESTS)]}\n"
    run = subprocess.run([sys.executable, "-c", f"{start}{script}\nprint('right')"], capture_output=True, text=True,
                         timeout=300, check=False, env={**os.environ, "FASTFLOW_ISA": isa})
    assert run.stdout == "right\n", run.stdout + run.stderr[-2000:]
