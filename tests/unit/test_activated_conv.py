"""activated_conv: values and gradients against float64 at many sizes, against torch's own modules, the order of sums,
non-finite values and refusals."""

import itertools

import layouts
import pytest
import torch
from cases import activated_conv_case, check_by_ratio, cotangents_of, evaluate, kernels_run
from op_checks import check_every_subset_of_gradients, check_samples_and_threads
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import backends, functional, reference

KERNELS = {"fastflow_cpu::activated_conv_fwd", "fastflow_cpu::activated_conv_bwd"}
# x, out, kernel, stride, padding of convolutions; a VAE's own; rows that no tap meets; every tap outside somewhere; one
# pixel; a kernel smaller than its stride; more than a chunk of small maps; long rows. Large enough for the largest of
# eager's errors to be a typical one.
DOWN = [((6, 1, 28, 28), 32, (4, 4), 2, 1), ((4, 32, 14, 14), 64, (4, 4), 2, 1), ((64, 5, 8, 9), 16, (3, 4), 3, 0),
        ((32, 16, 3, 5), 48, (3, 3), 1, 2), ((99, 3, 1, 1), 16, (1, 1), 1, 0), ((64, 32, 7, 6), 16, (1, 2), 3, 1),
        ((40, 2, 4, 4), 16, (4, 4), 2, 1), ((2, 3, 7, 140), 16, (5, 3), 1, 1)]
UP = [((4, 64, 7, 7), 32, (4, 4), 2, 1), ((6, 32, 14, 14), 1, (4, 4), 2, 1), ((16, 16, 4, 5), 3, (5, 3), 3, 2),
      ((32, 16, 3, 2), 16, (2, 1), 3, 0), ((99, 16, 1, 1), 5, (1, 1), 1, 0), ((40, 16, 2, 2), 32, (3, 3), 1, 1)]

# In Winograd's form in float32: 2 or 3 taps in each dimension for every residue modulo the stride, outputs cut into
# long and short segments of either number; rows that no tap meets; much padding; maps that are taken in bands.
DOWN += [((4, 32, 9, 6), 64, (3, 3), 1, 1), ((8, 16, 12, 16), 32, (6, 6), 2, 2), ((6, 16, 13, 15), 48, (4, 4), 2, 0),
         ((6, 32, 4, 3), 32, (2, 2), 1, 2), ((2, 16, 11, 13), 32, (6, 6), 3, 3), ((1, 32, 61, 41), 32, (3, 3), 1, 1),
         ((1, 16, 130, 50), 32, (4, 4), 2, 1)]
UP += [((6, 32, 5, 3), 16, (4, 4), 2, 1), ((8, 48, 4, 2), 32, (6, 6), 2, 2), ((4, 32, 8, 6), 16, (4, 4), 2, 0),
       ((4, 32, 7, 9), 32, (3, 3), 1, 2), ((2, 32, 61, 40), 16, (4, 4), 2, 1)]


def cases(activation):
    for transposed, sizes in ((False, DOWN), (True, UP)):
        for x, out, kernel, stride, padding in sizes:
            yield activated_conv_case("sizes", x, out, kernel, stride=stride, padding=padding, transposed=transposed,
                                      activation=activation)


def scaled(tensors):
    """Weights of a size that keeps the result's."""
    return {n: t / (t[0].numel() ** 0.5 if n == "weight" else 1.0) for n, t in tensors.items()}


@pytest.mark.parametrize("activation", reference.LAYER_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes(dtype, activation):
    for case in cases(activation):
        for layout in (layouts.contiguous, layouts.channels_last):
            tensors = {n: layout(t) for n, t in scaled(case.tensors(dtype)).items()}
            cotangents = {n: layout(t) for n, t in cotangents_of(case, tensors).items()}
            check_by_ratio(case, tensors, cotangents=cotangents, what=str(case.shapes))
    assert kernels_run(lambda: evaluate(case, tensors, cotangents=cotangents)) == KERNELS


def test_it_is_torchs_layers():
    """Against torch's own modules, not the reference; any layout of the result; without a bias."""
    torch.manual_seed(0)
    down = torch.nn.Conv2d(16, 32, 4, stride=2, padding=1).double()
    up = torch.nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1, bias=False).double()
    x = torch.randn(3, 16, 8, 6, dtype=torch.float64)
    h = functional.activated_conv(x, down.weight, down.bias, stride=2, padding=1, channels_last=True)
    torch.testing.assert_close(h, down(x), rtol=1e-12, atol=1e-12)
    assert h.is_contiguous(memory_format=torch.channels_last)
    y = functional.activated_conv(h, up.weight, stride=2, padding=1, transposed=True, activation="silu",
                                  channels_last=False)
    torch.testing.assert_close(y, up(torch.nn.functional.silu(h)), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_every_subset_of_gradients(transposed):
    case = activated_conv_case("masks", (2, 16, 5, 4), 16, (4, 3), stride=2, padding=1, transposed=transposed,
                               activation="silu")
    check_every_subset_of_gradients(case)


@pytest.mark.parametrize("transposed", [False, True])
def test_samples_do_not_depend_on_their_neighbours_nor_results_on_threads(threads, transposed):
    case = activated_conv_case("batch", (37, 32, 4, 4), 32, (4, 4), stride=2, padding=1, transposed=transposed,
                               activation="silu")
    check_samples_and_threads(case, threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_non_finite_inputs(value, activation):
    """As torch's layers have them, where no weight of theirs is zero: -Inf is nothing behind a rectifier, NaN stays."""
    for transposed, (channels, taps) in itertools.product((False, True), ((16, 3), (32, 4))):  # plain, Winograd's form
        case = activated_conv_case("nonfinite", (3, channels, 5, 5), channels, (taps, taps), stride=2, padding=1,
                                   transposed=transposed, activation=activation)
        tensors = case.tensors(torch.float32)
        for name, index in (("x", (1, 2, 3, 1)), ("bias", (5,))):
            spoilt = {n: t.clone() for n, t in tensors.items()}
            spoilt[name][index] = value
            got, want = (evaluate(case, spoilt, module=m)[0]["y"] for m in (functional, reference))
            assert_same_nonfinite(got, want, f"{name}={value}")
            if name == "x":
                assert_bitwise(got[::2], evaluate(case, tensors)[0]["y"][::2])


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_non_finite_operands_are_the_plain_sums(transposed):
    """float64, which has no other form, says where a gradient is NaN: not in a whole tile of Winograd's form."""
    case = activated_conv_case("nonfinite", (33, 32, 7, 6), 32, (4, 4), stride=2, padding=1, transposed=transposed,
                               activation="relu")
    for name, value in itertools.product(("x", "y"), (float("inf"), -float("inf"), float("nan"), 1e38)):
        both = []
        for dtype in (torch.float32, torch.float64):
            tensors = case.tensors(dtype)
            cotangents = cotangents_of(case, tensors)
            (tensors if name == "x" else cotangents)[name][7, 3, 2, 1] = value
            both.append(evaluate(case, tensors, cotangents=cotangents)[1])
        for grad, plain in ((grads[n] for grads in both) for n in both[0]):
            assert_same_nonfinite(grad, plain.float(), f"{name}={value}")
            assert value != 1e38 or grad.isfinite().any()


@pytest.mark.parametrize("kernel", [(5, 1), (1, 5), (1, 1)], ids=str)
def test_a_padding_that_holds_all_that_taps_meet(kernel):
    """x is met in some rows and no column, or in nothing at all: the result is the bias, x's gradient zero."""
    case = activated_conv_case("outside", (3, 16, 1, 1), 16, kernel, stride=6, padding=2, activation="silu")
    tensors = case.tensors(torch.float32)
    tensors["x"] = tensors["x"].as_strided((3, 16, 1, 1), (16, 1, 16, 16))
    results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
    assert kernels_run(lambda: evaluate(case, tensors)) <= KERNELS
    assert_bitwise(results["y"], tensors["bias"].view(-1, 1, 1).expand_as(results["y"]))
    assert not grads["x"].any()
    assert not grads["weight"].any()


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4)], ids=str)
def test_zero_sizes(shape):
    case = activated_conv_case("empty", shape, 16, (2, 2))
    tensors = case.tensors(torch.float32)
    results, grads = evaluate(case, tensors, cotangents={"y": torch.ones(shape[0], 16, 3, 3)})
    assert_bitwise(results["y"], tensors["bias"].view(-1, 1, 1).expand_as(results["y"]))
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape
    assert_bitwise(grads["bias"], torch.full((16,), 9.0 * shape[0]))


def test_what_the_kernel_does_not_take_goes_to_the_reference_and_says_so():
    def operands(out=16, dtype=torch.float32, kernel=3):
        return [t.to(dtype) for t in activated_conv_case("c", (2, 3, 4, 4), out, (kernel, kernel)).tensors().values()]

    assert backends.explain("activated_conv", *operands()).split()[0] == "cpu"
    large = [torch.ones(1, 256, 3, 3), torch.ones(256, 256, 3, 3), torch.ones(256)]
    for tensors, reason in ((operands(24), "24"), (operands(dtype=torch.bfloat16), "bfloat16"), (large, "cache")):
        assert backends.explain("activated_conv", *tensors).split()[0] == "reference"
        assert reason in backends.explain("activated_conv", *tensors)
        assert not kernels_run(lambda t=tensors: functional.activated_conv(*t))
        with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="activated_conv"):
            functional.activated_conv(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.activated_conv(*operands()).dtype == torch.bfloat16
