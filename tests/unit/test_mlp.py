"""mlp, small fully connected networks: values and gradients against float64 over sizes and activations, against
torch's own modules, strides, other instruction sets, non-finite numbers, what the kernel leaves to PyTorch."""

import sys

import layouts
import pytest
import torch
from cases import check_together as check
from cases import cotangents_of, evaluate, kernels_run, mlp_case, subsets
from op_checks import check_with_instructions
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import backends, functional, reference

KERNELS = {"fastflow_cpu::mlp_fwd", "fastflow_cpu::mlp_bwd"}
# Layer sizes and a batch: one layer; thin ends; whole vectors; one beside them; a tile, one sample more, many tiles.
PLAIN = [((5, 4), 7), ((3, 64, 2), 96), ((16, 32, 48), 97), ((7, 33, 15, 9), 200), ((1, 1, 1), 1), ((64, 130, 70), 500)]
RESIDUAL = [((3, 32, 32, 32, 6), 97), ((5, 17, 17, 17, 17, 17, 23), 130), ((4, 9, 2), 5), ((40, 96, 96, 96, 92), 700)]
NETWORKS = [*((*n, False) for n in PLAIN), *((*n, True) for n in RESIDUAL)]


@pytest.mark.parametrize(("sizes", "batch", "residual"), NETWORKS, ids=str)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes(sizes, batch, residual, activation, dtype):
    case = mlp_case("sizes", sizes, batch=batch, activation=activation, residual=residual)
    assert kernels_run(lambda: check(case, dtype, size=0.8)) == KERNELS


@pytest.mark.parametrize("layout", [layouts.transposed, layouts.padded, layouts.permuted], ids=lambda f: f.__name__)
def test_strides(layout):
    case = mlp_case("strides", (6, 20, 20, 20, 5), batch=100, residual=True)
    tensors = case.tensors(torch.float32)
    got = evaluate(case, {n: layout(t) for n, t in tensors.items()})
    want = evaluate(case, tensors)
    for part in (0, 1):
        for name, t in got[part].items():
            assert_bitwise(t, want[part][name], name)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_zero_sizes(shape):
    case = mlp_case("empty", (shape[1], 5, 2), batch=shape[0])
    tensors = case.tensors(torch.float32)
    results, grads = evaluate(case, tensors, cotangents={"y": torch.ones(shape[0], 2)})
    assert results["y"].shape == (shape[0], 2)
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape and (shape[1] == 0 or not grad.any()), name


def test_it_is_the_modules():
    """Against torch's own layers, and nflows' residual network written out, not the reference."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 20), torch.nn.SiLU(), torch.nn.Linear(20, 3)).double()
    x = torch.randn(9, 4, dtype=torch.float64)
    got = functional.mlp(x, (net[0].weight, net[2].weight), (net[0].bias, net[2].bias), activation="silu")
    torch.testing.assert_close(got, net(x), rtol=1e-12, atol=1e-12)
    first, a, b, last = (torch.nn.Linear(*sizes).double() for sizes in ((4, 20), (20, 20), (20, 20), (20, 3)))
    h = first(x)
    h = h + b(torch.relu(a(torch.relu(h))))
    layers = (first, a, b, last)
    got = functional.mlp(x, [m.weight for m in layers], [m.bias for m in layers], residual=True)
    torch.testing.assert_close(got, last(h), rtol=1e-12, atol=1e-12)


def test_every_subset_of_gradients():
    case = mlp_case("subsets", (3, 5, 2), batch=7, activation="tanh")
    tensors = case.tensors(torch.float32)
    cotangents = cotangents_of(case, tensors)
    _, want = evaluate(case, tensors, cotangents=cotangents)
    for needs in subsets(case.differentiable):
        _, grads = evaluate(case, tensors, needs=needs, cotangents=cotangents)
        assert set(grads) == set(needs)
        for name, grad in grads.items():
            assert_bitwise(grad, want[name], name)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_numbers_go_where_the_reference_takes_them(activation, value):
    case = mlp_case("poison", (4, 6, 6, 6, 3), batch=18, activation=activation, residual=True)
    for name in ("x", "w1", "b0"):
        tensors = case.tensors(torch.float32)
        tensors[name].view(-1)[1] = value
        cotangents = cotangents_of(case, tensors)
        got, want = (evaluate(case, tensors, cotangents=cotangents, module=m) for m in (functional, reference))
        for part in (0, 1):
            for key, t in got[part].items():
                assert_same_nonfinite(t, want[part][key], f"{name}={value}: {key}", gradient=True)


def test_threads_do_not_change_the_result():
    case = mlp_case("threads", (8, 48, 48, 48, 5), batch=1000, residual=True)
    tensors, found, before = case.tensors(torch.float32), [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(evaluate(case, tensors))
    finally:
        torch.set_num_threads(before)
    for part in (0, 1):
        for name, t in found[0][part].items():
            assert_bitwise(t, found[1][part][name], name)


def test_what_the_kernel_does_not_take_goes_to_the_reference_and_says_so():
    x, w, b = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    assert backends.explain("mlp", x, w, b).split()[0] == "cpu"
    half = x.bfloat16(), w.bfloat16(), b.bfloat16()
    assert "bfloat16" in backends.explain("mlp", *half) and not backends.serves("mlp", *half)
    assert functional.mlp(half[0], [half[1]], [half[2]]).dtype is torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in backends.explain("mlp", x, w, b)
        assert functional.mlp(x, [w], [b]).dtype is torch.bfloat16
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="mlp"):
        functional.mlp(half[0], [half[1]], [half[2]])


CODE = """
import torch
from cases import check_together, mlp_case
for dtype in (torch.float32, torch.float64):
    for sizes, activation in (((3, 33, 33, 33, 6), "silu"), ((5, 16, 16, 16, 92), "relu")):
        case = mlp_case("isa", sizes, batch=101, activation=activation, residual=True)
        check_together(case, dtype, size=0.8)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="x86 instruction sets")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    check_with_instructions(isa, CODE)
