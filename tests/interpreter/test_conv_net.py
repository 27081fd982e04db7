"""Glow's conditioner on Triton: values and gradients in every dtype and memory format, what is asked for singly, lower
dtypes inside, what is not finite, and the launches."""

import functools
import itertools

import layouts
import pytest
import torch
import torch.nn.functional as F
from cases import check_by_ratio, conv_case, cotangents_of, evaluate
from fastflow.kernels import conv_net as kernels
from tolerances import assert_bitwise

from fastflow import backends, functional, nn, reference
from fastflow.autograd.conv_net import ConvNetFunction

FORWARD = ["product_kernel"] * 3 + ["sum_taps_kernel"]
BACKWARD = ["product_kernel"] * 3 + ["sum_taps_kernel", "weight_gradients_kernel", "finish_kernel"]
# (B, I, H, W), hidden, O: Glow's own; odd everything; one pixel; a row; a column; many channels.
SIZES = [((2, 6, 8, 8), 32, 12), ((3, 5, 5, 7), 21, 3), ((2, 1, 1, 1), 16, 1), ((1, 3, 1, 9), 20, 5),
         ((2, 5, 7, 1), 7, 3), ((3, 24, 4, 4), 48, 48)]
LARGE = ((3, 2, 9, 13), 136, 17)  # several tiles in each direction, several parts of the pixels


@pytest.fixture(autouse=True)
def on_triton(triton):
    """Every test here runs on the Triton backend."""


def scaled(case, dtype, layout=layouts.contiguous):
    tensors = {n: layout(t) for n, t in case.tensors(torch.float64).items()}
    return {n: (t / (t[0].numel() ** 0.5 if n[0] == "w" else 1.0)).to(dtype) for n, t in tensors.items()}


@pytest.fixture
def turned(monkeypatch):
    """Maps for backward have a channel in a row, as on a GPU in float32."""
    monkeypatch.setattr(kernels, "_turns", lambda x: x.dtype == torch.float32)


def every_size():
    """Each precision with each size but the last in the quick suite, at one slope or the other; the rest in the slow
    one."""
    choices = itertools.product(enumerate(("tf32", "ieee", "float64")), enumerate((0.0, 0.2)), enumerate(SIZES))
    for (i, precision), (j, slope), (k, size) in choices:
        slow = (i + j + k) % 2 == 1 or size is SIZES[-1]
        yield pytest.param(precision, slope, *size, marks=pytest.mark.slow if slow else ())
    yield "tf32", 0.0, *LARGE
    yield pytest.param("ieee", 0.0, *LARGE, marks=pytest.mark.slow)


@pytest.mark.parametrize(("precision", "slope", "x", "hidden", "out"), every_size(), ids=str)
def test_sizes(precision, slope, x, hidden, out, monkeypatch):
    """The interpreter multiplies in full; the tiles are those of each precision, the maps of TF32 turned."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision == "tf32")
    monkeypatch.setattr(kernels, "_turns", lambda x: precision == "tf32")
    case = conv_case("sizes", x, hidden, out, negative_slope=slope)
    for layout in (layouts.contiguous, layouts.channels_last):
        tensors = scaled(case, torch.float64 if precision == "float64" else torch.float32, layout)
        cotangents = {n: layout(t) for n, t in cotangents_of(case, tensors).items()}
        check_by_ratio(case, tensors, cotangents=cotangents)


@pytest.mark.parametrize("make", layouts.ALL, ids=layouts.by_name)
@pytest.mark.parametrize("rooms", [False, True])
def test_layouts(make, rooms, monkeypatch):
    """Two weights as they lie, and copied into rooms of their own first."""
    monkeypatch.setattr(kernels, "_need_rooms", lambda x, weights, dims: rooms)
    case = conv_case("layouts", (3, 5, 4, 6), 18, 4, negative_slope=0.1)
    tensors = {n: make(t) if t.dim() == 4 else t for n, t in scaled(case, torch.float32).items()}
    check_by_ratio(case, tensors, cotangents={n: make(t) for n, t in cotangents_of(case, tensors).items()})


@pytest.mark.parametrize("make", [lambda b: torch.stack([b, b + 7.0, b], 1)[:, 0], lambda b: b[0].expand(len(b)),
                                  lambda b: torch.cat([b[:1], b])[1:]],
                         ids=["column", "expanded", "offset"])
def test_layouts_of_biases(make):
    case = conv_case("biases", (3, 5, 4, 6), 18, 4)
    tensors = {n: make(t) if t.dim() == 1 else t for n, t in scaled(case, torch.float32).items()}
    check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))


def test_formats_of_results_and_gradients():
    case = conv_case("formats", (2, 5, 4, 6), 16, 3)
    for layout in (layouts.contiguous, layouts.channels_last):
        tensors = scaled(case, torch.float32, layout)
        results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
        assert results["y"].stride() == layout(torch.empty(2, 3, 4, 6)).stride()
        assert all(grads[n].stride() == t.stride() for n, t in tensors.items())


def test_launches(launches):
    case = conv_case("launches", (2, 3, 4, 5), 16, 3)
    tensors = scaled(case, torch.float32)
    cotangents = cotangents_of(case, tensors)

    def launched(**options):
        launches.clear()
        evaluate(case, tensors, **options)
        return list(launches)

    assert launched(needs=()) == FORWARD
    assert launched(cotangents=cotangents) == FORWARD + BACKWARD
    assert launched(needs=("x",), cotangents=cotangents) == FORWARD + BACKWARD[:4]
    assert launched(needs=("b2",), cotangents=cotangents) == FORWARD + BACKWARD[:2] + BACKWARD[4:]


@pytest.mark.parametrize("turns", [False, True])
def test_backward_reads_the_maps_that_it_is_given(turns, monkeypatch):
    """Whatever the precision has become since."""
    tensors = scaled(conv_case("maps", (3, 5, 7, 9), 36, 4, negative_slope=0.1), torch.float32)
    x, w1, b1, w2, b2, w3, b3 = tensors.values()
    cotangent = torch.randn(3, 4, 7, 9)
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    want = torch.autograd.grad(reference.conv_net(*leaves, negative_slope=0.1), leaves, cotangent)
    monkeypatch.setattr(kernels, "_turns", lambda x: turns)
    for forward, backward in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", forward)
        _, h1, h2 = kernels.conv_net_fwd(x, w1, b1, w2, b2, w3, b3, 0.1, True)
        assert h1.shape == h2.shape == ((36, 2, 128) if turns else (189, 36))
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", backward)
        for needs in ((True, True), (True, False), (False, True)):
            got = kernels.conv_net_bwd(cotangent, x, w1, w2, w3, h1, h2, 0.1, *needs)
            for g, true, need in zip(got, want, (needs[0], *[needs[1]] * 6), strict=True):
                assert g.numel() == 0 if not need else (g - true).norm() < 1e-5 * true.norm()


def test_what_lies_beyond_the_last_pixel_of_a_turned_map_counts_for_nothing(turned, monkeypatch):
    case = conv_case("beyond", (3, 5, 5, 7), 20, 4)
    tensors = scaled(case, torch.float32)
    cotangents = cotangents_of(case, tensors)
    _, want = evaluate(case, tensors, cotangents=cotangents)
    real = kernels._map
    monkeypatch.setattr(kernels, "_map", lambda *args, **options: real(*args, **options).fill_(float("nan")))
    _, got = evaluate(case, tensors, cotangents=cotangents)
    assert all(torch.equal(got[n], g) for n, g in want.items())


def test_pixels_by_divisions_are_those_by_reciprocals(monkeypatch):
    case = conv_case("wide", (3, 5, 5, 7), 20, 4)
    tensors = scaled(case, torch.float32)
    cotangents = cotangents_of(case, tensors)
    results, want = evaluate(case, tensors, cotangents=cotangents)
    assert not kernels._divisors(3 * 5 * 7, 5, 7)[1]
    real = kernels._divisors
    monkeypatch.setattr(kernels, "_divisors", lambda *image: (real(*image)[0], True))
    again, got = evaluate(case, tensors, cotangents=cotangents)
    assert torch.equal(again["y"], results["y"]) and all(torch.equal(got[n], g) for n, g in want.items())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 28, 255, 256, 257, 1000])
def test_reciprocals_divide_exactly_while_they_say_so(size):
    for height, width in ((size, 1), (1, size)):
        most = next(2**k for k in range(31, 0, -1) if not kernels._divisors(2**k, height, width)[1])
        divisors, _ = kernels._divisors(most, height, width)
        assert most >= 2**19
        n = torch.cat([torch.arange(2000), torch.randint(most, (2000,)), most + torch.arange(-2000, 256)])
        n = torch.cat([n, n // size * size, n // size * size - 1]).clamp(min=0)
        assert torch.equal((n * divisors[2 if width == 1 else 3]) >> 30, n // size)


def in_tf32(t):
    """float32 to the nearest number of 10 bits, ties away from zero; what is not finite stays."""
    bits = (t.view(torch.int32) + 0x1000) & -0x2000
    return torch.where(t.isnan(), t, bits.view(torch.float32))


class Rounded(torch.autograd.Function):
    """A value as a product in TF32 reads it; or the gradient alone."""

    @staticmethod
    def forward(ctx, t, back):
        ctx.back = back
        return t.clone() if back else in_tf32(t.float()).double()

    @staticmethod
    def backward(ctx, grad):
        return in_tf32(grad.float()).double() if ctx.back else grad, None


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last, layouts.padded], ids=layouts.by_name)
@pytest.mark.parametrize("hidden", [16, 72])
@pytest.mark.usefixtures("turned")
def test_operands_of_tf32_are_rounded_to_nearest(hidden, layout, monkeypatch, launches):
    """As on a GPU, where its tensor cores drop what is not: against products in float64 of rounded operands."""
    monkeypatch.setattr(kernels, "_rounds", lambda precision: precision == "tf32")
    case = conv_case("tf32", (3, 5, 6, 7), hidden, 4)
    tensors = {n: layout(t) if t.dim() == 4 else t for n, t in scaled(case, torch.float32).items()}
    cotangents = cotangents_of(case, tensors)
    results, grads = evaluate(case, tensors, cotangents=cotangents)
    assert launches == FORWARD + BACKWARD
    exact = {n: t.double().requires_grad_() for n, t in tensors.items()}
    x, w1, b1, w2, b2, w3, b3 = exact.values()
    x, w1, w2, w3 = (Rounded.apply(t, False) for t in (x, w1, w2, w3))
    h1 = Rounded.apply(Rounded.apply(F.conv2d(x, w1, padding=1), True).add(b1[:, None, None]).relu(), False)
    h2 = Rounded.apply(Rounded.apply(F.conv2d(h1, w2), True).add(b2[:, None, None]).relu(), False)
    y = Rounded.apply(F.conv2d(h2, w3, padding=1), True) + b3[:, None, None]
    true = dict(zip(exact, torch.autograd.grad(y, list(exact.values()), cotangents["y"].double()), strict=True))
    for name, got, want in (("y", results["y"], y), *((n, grads[n], true[n]) for n in grads)):
        # A sum near the middle between two roundings may go either way: most do not, and those that do are few.
        assert (got - want).norm() < 1e-4 * want.norm(), name
        assert (got - want).abs().median() < 1e-6 * want.abs().max(), name


@pytest.mark.parametrize("bits", [0x7fffffff, 0x7f800001, 0xffffffff - 2**32, 0x7fc00000], ids=hex)
def test_every_nan_survives_rounding(bits, monkeypatch):
    monkeypatch.setattr(kernels, "_rounds", lambda precision: precision == "tf32")
    tensors = scaled(conv_case("nan", (2, 3, 5, 6), 16, 4), torch.float32)
    for name in ("x", "w2", "b1"):
        spoilt = {n: t.clone() for n, t in tensors.items()}
        spoilt[name].view(torch.int32)[(0,) * tensors[name].dim()] = bits
        got, want = functional.conv_net(*spoilt.values()), reference.conv_net(*spoilt.values())
        assert want.isnan().any() and torch.equal(got.isnan(), want.isnan()), name


@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last], ids=layouts.by_name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, layout):
    """Operands in it, then parameters in float32 as under autocast: gradients have the dtype of what they belong to."""
    case = conv_case("half", (3, 5, 6, 7), 40, 4)
    exact = {n: t.to(dtype).double().requires_grad_() for n, t in scaled(case, torch.float64, layout).items()}
    truth = reference.conv_net(*exact.values())
    grad = torch.randn(truth.shape).to(dtype)
    true = torch.autograd.grad(truth, list(exact.values()), grad.double())
    for kept in (dtype, torch.float32):
        leaves = {n: t.detach().to(dtype if n == "x" else kept).requires_grad_() for n, t in exact.items()}
        y = ConvNetFunction.apply(*leaves.values(), "triton", 0.0)
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
        assert y.dtype == dtype
        for leaf, got, want in zip((y, *leaves.values()), (y, *grads), (truth, *true), strict=True):
            assert got.dtype == leaf.dtype
            assert (got.double() - want).norm() < 0.05 * want.norm()


def test_autocast_lowers_x_and_the_gradients_stay():
    case = conv_case("autocast", (2, 3, 4, 5), 16, 4)
    leaves = {n: t.requires_grad_() for n, t in scaled(case, torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv_net(*leaves.values())
        double = functional.conv_net(*(t.detach().double() for t in leaves.values()))
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    want = reference.conv_net(*leaves.values())
    for got, true in zip((y, *grads), (want, *torch.autograd.grad(want.square().sum(), list(leaves.values()))),
                         strict=True):
        assert (got - true).norm() < 0.1 * true.norm()
    assert all(g.dtype == torch.float32 for g in grads)
    first, = torch.autograd.grad(functional.conv_net(*leaves.values()).square().sum(), leaves["x"], create_graph=True)
    assert torch.autograd.grad(first.square().sum(), leaves["w2"])[0].dtype == torch.float32


def second_derivatives(f, leaves):
    first = torch.autograd.grad(f(*leaves, negative_slope=0.3).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), (leaves[0], leaves[3]))


def test_second_derivatives_and_gradcheck():
    leaves = [t.requires_grad_() for t in scaled(conv_case("twice", (1, 1, 2, 3), 2, 2), torch.float64).values()]
    for slope in (0.0, 0.3):  # along random directions, for the interpreter's sake
        assert torch.autograd.gradcheck(functools.partial(functional.conv_net, negative_slope=slope), leaves,
                                        fast_mode=True)
    found = (second_derivatives(f, leaves) for f in (functional.conv_net, reference.conv_net))
    for name, got, want in zip("xw", *found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["x", "w1", "b1", "w2", "b2", "w3", "b3"])
def test_what_is_not_finite_comes_through(name, value):
    tensors = scaled(conv_case("nonfinite", (2, 3, 7, 8), 16, 4), torch.float32)
    tensors[name][(0,) * tensors[name].dim()] = value
    got, want = functional.conv_net(*tensors.values()), reference.conv_net(*tensors.values())
    assert not want.isfinite().all() or (value < 0.0 and name in ("b1", "b2"))  # which the rectifier makes a zero
    if name in ("w1", "w3"):  # whether such a weight meets the border's zeros is an implementation's affair
        got, want = got[..., 2:-2, 2:-2], want[..., 2:-2, 2:-2]
    torch.testing.assert_close(got, want, equal_nan=True)


def test_nan_in_a_gradient_comes_through():
    case = conv_case("nan", (2, 3, 5, 6), 16, 4)
    tensors = scaled(case, torch.float32)
    cotangents = cotangents_of(case, tensors)
    cotangents["y"][1, 2, 3, 3] = float("nan")
    _, got = evaluate(case, tensors, cotangents=cotangents)
    with backends.use_backend("reference"):
        _, want = evaluate(case, tensors, cotangents=cotangents)
    for name, grad in want.items():
        assert grad.isnan().any() and got[name].isnan()[grad.isnan()].all(), name
    assert not got["x"][0].isnan().any()


def test_samples_do_not_mix_and_runs_are_equal():
    case = conv_case("samples", (4, 3, 5, 6), 16, 4)
    tensors = scaled(case, torch.float32)
    cotangents = cotangents_of(case, tensors)
    results, grads = evaluate(case, tensors, cotangents=cotangents)
    again, once_more = evaluate(case, tensors, cotangents=cotangents)
    assert_bitwise(again["y"], results["y"])
    assert all(torch.equal(once_more[n], g) for n, g in grads.items())
    alone, of_one = evaluate(case, {**tensors, "x": tensors["x"][2:3]}, cotangents={"y": cotangents["y"][2:3]})
    torch.testing.assert_close(alone["y"], results["y"][2:3])
    torch.testing.assert_close(of_one["x"], grads["x"][2:3])


def test_what_it_refuses():
    tensors = list(scaled(conv_case("refused", (2, 3, 4, 4), 16, 4), torch.float32).values())
    with pytest.raises(RuntimeError, match="no empty weights"):
        functional.conv_net(tensors[0][:, :0], tensors[1][:, :0], *tensors[2:])
    with pytest.raises(RuntimeError, match="different dtypes"):
        backends.explain("conv_net", tensors[0].double(), *tensors[1:])


def test_when_it_is_preferred(monkeypatch, launches):
    """As on a GPU: in many hidden channels and few others, where products may be as inexact as cuDNN's."""
    monkeypatch.setitem(backends.PREFERENCE, ("conv_net", "cpu"), ("triton",))
    monkeypatch.setattr(backends._state, "within_reach", {})

    def explained(channels, hidden, out, dtype=torch.float32):
        operands = conv_case("rule", (2, channels, 2, 2), hidden, out).tensors(dtype)
        return backends.explain("conv_net", *operands.values())

    with backends.use_backend(None):
        assert explained(6, 128, 12).startswith("triton")
        assert explained(6, 128, 12, torch.bfloat16).startswith("triton")
        for sizes in ((6, 127, 12), (65, 128, 12), (6, 128, 65)):
            assert explained(*sizes).startswith("reference (fewer than 128 hidden channels or more than 64 others")
        assert "left to cuDNN" in explained(6, 128, 12, torch.float64)
        net, x = nn.ConvNet(2, 4, 128), torch.randn(2, 2, 3, 3)
        net(x)
        assert launches == FORWARD
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        net(x)
        assert launches == FORWARD and "without TF32" in explained(6, 128, 12)
        with torch.autocast("cpu", torch.bfloat16):  # computes in bfloat16
            assert net(x).dtype == torch.bfloat16
        assert launches == FORWARD * 2


def test_torch_compile_has_its_own_unless_asked(monkeypatch, launches):
    monkeypatch.setitem(backends.PREFERENCE, ("conv_net", "cpu"), ("triton",))
    monkeypatch.setattr(backends._state, "within_reach", {})
    monkeypatch.setattr(backends, "CONV_NET_HIDDEN", 16)
    net, x = nn.ConvNet(2, 4, 16), torch.randn(2, 2, 3, 3)
    for wanted, expected in ((None, []), ("triton", FORWARD + BACKWARD)):
        torch._dynamo.reset()
        launches.clear()
        with backends.use_backend(wanted):
            y = torch.compile(net, backend="aot_eager", fullgraph=True)(x.requires_grad_())
            y.square().sum().backward()
        assert launches == expected
        torch.testing.assert_close(y, net(x))
