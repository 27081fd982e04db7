"""conv_net, Glow's conditioner: values and gradients against float64 at many sizes, against plain modules, the order of
sums, refusals, and the layer that uses it."""

import copy

import layouts
import pytest
import torch
from cases import check_by_ratio, conv_case, cotangents_of, evaluate, kernels_run
from op_checks import check_every_subset_of_gradients, check_samples_and_threads
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import backends, functional, reference
from fastflow.nn import ConvNet

# (B, I, H, W), hidden, O: Glow's own; odd everything; one pixel; a row; a column; more than a chunk of small images;
# images larger than a chunk, of few channels and of many; a number of tiles that fills no vector; long rows, of both.
SIZES = [((3, 6, 16, 16), 64, 12), ((5, 12, 8, 8), 32, 24), ((40, 7, 4, 4), 16, 9), ((2, 1, 1, 1), 16, 1),
         ((1, 3, 1, 9), 48, 5), ((2, 5, 7, 1), 80, 3), ((2, 3, 13, 5), 96, 6), ((1, 2, 20, 20), 16, 2),
         ((2, 17, 20, 20), 16, 19), ((3, 9, 6, 10), 80, 5), ((2, 3, 3, 135), 32, 5), ((1, 8, 4, 150), 48, 9)]
KERNELS = {"fastflow_cpu::conv_net_fwd", "fastflow_cpu::conv_net_bwd"}


@pytest.mark.parametrize(("x", "hidden", "out"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.01])
def test_sizes(x, hidden, out, dtype, slope):
    case = conv_case("sizes", x, hidden, out, negative_slope=slope)
    for layout in (layouts.contiguous, layouts.channels_last):
        tensors = {n: layout(t) for n, t in case.tensors(dtype).items()}
        tensors = {n: t / (t[0].numel() ** 0.5 if n[0] == "w" else 1.0) for n, t in tensors.items()}
        cotangents = {n: layout(t) for n, t in cotangents_of(case, tensors).items()}
        assert kernels_run(lambda t=tensors, c=cotangents: evaluate(case, t, cotangents=c)) == KERNELS
        check_by_ratio(case, tensors, cotangents=cotangents)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 3, 3)], ids=str)
def test_zero_sizes(shape):
    case = conv_case("empty", shape, 16, 2)
    tensors = case.tensors(torch.float32)
    results, grads = evaluate(case, tensors, cotangents={"y": torch.ones(shape[0], 2, *shape[2:])})
    assert results["y"].shape == (shape[0], 2, *shape[2:])
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape and (shape[1] == 0 or not grad.any()), name


def test_it_is_the_three_convolutions():
    """Against torch's own modules, not the reference."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(32, 32, 1),
                              torch.nn.LeakyReLU(0.2), torch.nn.Conv2d(32, 6, 3, padding=1)).double()
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    operands = [p.detach() for p in net.parameters()]
    torch.testing.assert_close(functional.conv_net(x, *operands, negative_slope=0.2), net(x), rtol=1e-12, atol=1e-12)


def test_every_subset_of_gradients():
    case = conv_case("masks", (2, 3, 5, 4), 16, 4)
    check_every_subset_of_gradients(case)


@pytest.mark.parametrize(("channels", "out"), [(3, 5), (6, 12)])
def test_samples_do_not_depend_on_their_neighbours_nor_results_on_threads(threads, channels, out):
    case = conv_case("batch", (37, channels, 4, 4), 32, out)
    check_samples_and_threads(case, threads)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("width", [5, 4])
def test_non_finite_inputs(value, slope, width):
    """A rectifier without slope turns -Inf to 0 and keeps NaN, forward and backward, as torch's does; Winograd's form
    (of even images) would make NaN of infinities."""
    case = conv_case("nonfinite", (2, 6, 6, width), 16, 8, negative_slope=slope)
    tensors = case.tensors(torch.float32)
    for name, index in (("x", (1, 2, 3, 1)), ("b1", (5,)), ("b2", (2,)), ("b3", (1,))):
        spoilt = {n: t.clone() for n, t in tensors.items()}
        spoilt[name][index] = value
        cotangents = cotangents_of(case, tensors)
        got, want = (evaluate(case, spoilt, cotangents=cotangents, module=m) for m in (functional, reference))
        for part in (0, 1):
            for key, t in got[part].items():
                assert_same_nonfinite(t, want[part][key], f"{name}={value}: {key}", gradient=True)


@pytest.mark.parametrize("name", ["x", "cotangent"])
def test_an_infinity_leaves_other_samples_alone(name):
    """In Winograd's form, too, whose results a sample that is not finite does not use."""
    case = conv_case("infinity", (20, 6, 4, 4), 32, 12)
    tensors = case.tensors(torch.float32)
    cotangents = cotangents_of(case, tensors)
    results, grads = evaluate(case, tensors, cotangents=cotangents)
    spoilt = {n: t.clone() for n, t in tensors.items()}, {n: t.clone() for n, t in cotangents.items()}
    (spoilt[0]["x"] if name == "x" else spoilt[1]["y"])[3, 1, 2, 2] = float("inf")
    again, again_grads = evaluate(case, spoilt[0], cotangents=spoilt[1])
    others = torch.arange(20) != 3
    assert_bitwise(again["y"][others], results["y"][others])
    assert_bitwise(again_grads["x"][others], grads["x"][others])
    assert not torch.isfinite(again_grads["w1"]).all()
    assert not torch.isfinite(again["y"][3] if name == "x" else again_grads["x"][3]).all()


@pytest.mark.parametrize("shape", [(4, 6, 16, 16), (4, 12, 8, 8), (4, 24, 4, 4)], ids=str)
def test_winograds_form_at_glows_scales(shape):
    """Inputs whose channels differ a hundredfold and have a mean, where sums and differences of pixels lose digits."""
    case = conv_case("scales", shape, 128, 2 * shape[1])
    tensors = case.tensors(torch.float32)
    tensors = {n: t / (t[0].numel() ** 0.5 if n[0] == "w" else 1.0) for n, t in tensors.items()}
    tensors["x"] = (tensors["x"] + 3.0) * torch.logspace(-1, 1, shape[1])[:, None, None]
    check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


def test_what_the_kernel_does_not_take_goes_to_the_reference_and_says_so():
    def operands(hidden=16, dtype=torch.float32):
        return [t.to(dtype) for t in conv_case("c", (2, 3, 4, 4), hidden, 2).tensors(torch.float32).values()]

    assert backends.explain("conv_net", *operands()).split()[0] == "cpu"
    for tensors, reason in ((operands(24), "24"), (operands(dtype=torch.bfloat16), "bfloat16")):
        assert backends.explain("conv_net", *tensors).split()[0] == "reference"
        assert reason in backends.explain("conv_net", *tensors) and not backends.serves("conv_net", *tensors)
        assert not kernels_run(lambda t=tensors: functional.conv_net(*t))
        with backends.use_backend("cpu"):
            assert not backends.serves("conv_net", *tensors)
            with pytest.raises(RuntimeError, match="conv_net"):
                functional.conv_net(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.conv_net(*operands()).dtype == torch.bfloat16
        assert "autocast" in backends.explain("conv_net", *operands())


def test_the_layer_uses_it_and_steps_aside_for_hooks_and_replacements():
    torch.manual_seed(0)
    net = ConvNet(3, 4, 16)
    torch.nn.init.normal_(net.conv3.weight)
    x = torch.randn(2, 3, 5, 5)
    want = net(x)
    assert kernels_run(lambda: net(x).sum().backward()) == KERNELS
    seen = []
    handle = net.conv2.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    assert seen == [(2, 16, 5, 5)]
    handle.remove()
    assert kernels_run(lambda: net(x))
    replaced = copy.deepcopy(net)
    replaced.conv2 = torch.nn.Sequential(replaced.conv2)
    torch.testing.assert_close(replaced(x), want, rtol=1e-5, atol=1e-5)
    for name in ("reference", "cpu"):
        with backends.use_backend(name):
            torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    narrow = ConvNet(3, 4, 8)
    with backends.use_backend("cpu"):
        assert not kernels_run(lambda: narrow(x))
