"""wide_mlp: values and gradients against float64 at many sizes, against torch's own modules, non-finite values,
refusals."""

import layouts
import pytest
import torch
from cases import check_by_ratio, cotangents_of, evaluate, kernels_run, mlp_case
from op_checks import check_every_subset_of_gradients
from tolerances import assert_same_nonfinite

from fastflow import backends, functional, reference

KERNELS = {"fastflow_cpu::wide_mlp_fwd", "fastflow_cpu::wide_mlp_bwd"}
SIZES = [(128, (784, 400, 40)), (100, (20, 400, 784)), (65, (3, 70, 130, 64)), (1, (5, 1)), (33, (1, 17, 1)),
         (1000, (8, 16, 3)), (250, (300, 33, 80, 150)), (17, (600, 48, 16))]


@pytest.mark.parametrize(("batch", "sizes"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_sizes(batch, sizes, dtype, activation, threads):
    case = mlp_case("sizes", sizes, op="wide_mlp", batch=batch, activation=activation)
    for layout in (layouts.contiguous, layouts.transposed):
        tensors = {n: layout(t) if t.dim() == 2 else t for n, t in case.tensors(dtype).items()}
        cotangents = cotangents_of(case, tensors)
        for count in (1, 2):
            threads(count)
            check_by_ratio(case, tensors, cotangents=cotangents)
    assert kernels_run(lambda: evaluate(case, tensors, cotangents=cotangents)) == KERNELS


@pytest.mark.parametrize(("batch", "sizes"), [*(s for s in SIZES if len(s[1]) > 2), (32, (128,) * 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_activations_of_the_hidden_layers(batch, sizes, dtype, activation, threads):
    case = mlp_case("hidden", sizes, op="wide_mlp", batch=batch, activation=activation, hidden=True)
    tensors = case.tensors(dtype)
    cotangents = cotangents_of(case, tensors)
    for count in (1, 2):
        threads(count)
        check_by_ratio(case, tensors, cotangents=cotangents)
    for asked in (("y",), ("h0",), case.outputs[1:]):
        some = {name: cotangents[name] for name in asked}
        check_by_ratio(case, tensors, cotangents=some, needs=("x", "w0", "b0", "w1"))
    assert kernels_run(lambda: evaluate(case, tensors, cotangents=cotangents)) == KERNELS


def test_a_network_of_one_layer_has_no_hidden_ones():
    x, weight, bias = torch.randn(3, 4), torch.randn(2, 4), torch.randn(2)
    for module in (functional, reference):
        out, values = module.wide_mlp(x, [weight], [bias], hidden=True)
        assert values == () and out.shape == (3, 2)


def test_it_is_torchs_layers():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.SiLU(), torch.nn.Linear(9, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    got = functional.wide_mlp(x, [network[0].weight, network[2].weight], [network[0].bias, network[2].bias])
    torch.testing.assert_close(got, network(x), rtol=1e-13, atol=1e-13)


def test_every_subset_of_gradients():
    case = mlp_case("masks", (3, 5, 2), op="wide_mlp", batch=4)
    check_every_subset_of_gradients(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_non_finite_inputs(value, activation):
    case = mlp_case("nonfinite", (3, 5, 2), op="wide_mlp", batch=4, activation=activation)
    tensors = case.tensors(torch.float32)
    for name, index in (("x", (1, 2)), ("b0", (3,)), ("b1", (1,))):
        spoilt = {n: t.clone() for n, t in tensors.items()}
        spoilt[name][index] = value
        got, want = (evaluate(case, spoilt, module=m)[0]["y"] for m in (functional, reference))
        assert_same_nonfinite(got, want, f"{name}={value}")


@pytest.mark.parametrize(("batch", "sizes"), [(0, (3, 4, 2)), (3, (0, 4, 2)), (3, (3, 0, 2))], ids=str)
def test_zero_sizes(batch, sizes):
    case = mlp_case("empty", sizes, op="wide_mlp", batch=batch)
    tensors = case.tensors(torch.float64)
    cotangents = {"y": torch.ones(batch, sizes[-1], dtype=torch.float64)}
    got, want = (evaluate(case, tensors, cotangents=cotangents, module=m) for m in (functional, reference))
    for part in (0, 1):
        for name, value in got[part].items():
            torch.testing.assert_close(value, want[part][name], rtol=1e-13, atol=1e-13)


def test_what_the_kernel_does_not_take_goes_to_the_reference_and_says_so():
    x, weights, biases = torch.randn(2, 3), [torch.randn(4, 3), torch.randn(2, 4)], [torch.randn(4), torch.randn(2)]
    assert backends.explain("wide_mlp", x, *weights, *biases).split()[0] == "cpu"
    half = [t.bfloat16() for t in (x, *weights, *biases)]
    assert "bfloat16" in backends.explain("wide_mlp", *half)
    assert not kernels_run(lambda: functional.wide_mlp(half[0], half[1:3], half[3:]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.wide_mlp(x, weights, biases).dtype == torch.bfloat16
    with backends.use_backend("reference"):
        assert not kernels_run(lambda: functional.wide_mlp(x, weights, biases))
