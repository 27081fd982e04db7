"""Glow's conditioner as matrix products: against the convolutions, in every dtype, asked singly and together."""

import pytest
import torch
from tolerances import GRADIENT_FACTOR, assert_by_ratio

from fastflow import functional, nn, reference
from fastflow.autograd import conv_products
from fastflow.autograd.conv_products import ConvNetProducts

NAMES = ("x", "w1", "b1", "w2", "b2", "w3", "b3")
# (B, I, O, H, W, N)
SIZES = [(3, 6, 12, 5, 7, 16), (2, 12, 24, 4, 4, 8), (1, 1, 2, 1, 1, 16), (2, 5, 3, 8, 3, 16), (4, 24, 48, 2, 2, 32)]


def operands(size, dtype=torch.float64, device="cpu", channels_last=True):
    batch, inner, out, height, width, hidden = size
    shapes = ((batch, inner, height, width), (hidden, inner, 3, 3), (hidden,), (hidden, hidden, 1, 1), (hidden,),
              (out, hidden, 3, 3), (out,))
    found = [torch.randn(s, dtype=torch.float64) * (1.0 if i == 0 else s[0 if len(s) == 1 else 1] ** -0.5)
             for i, s in enumerate(shapes)]
    if channels_last:
        found = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in found]
    return [t.to(device, dtype) for t in found]


def check(call, size, dtype, device="cpu", channels_last=True, factor=1.0):
    plain = operands(size, dtype, device, channels_last)
    leaves = [t.detach().requires_grad_() for t in plain]
    exact = [t.detach().double().requires_grad_() for t in plain]
    eager = [t.detach().requires_grad_() for t in plain]
    y, want, truth = call(*leaves), reference.conv_net(*eager), reference.conv_net(*exact)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_by_ratio(y, want, truth, factor=2.0 * factor, what="y")
    grad = torch.randn(truth.shape, dtype=torch.float64, device=device).to(dtype)
    for name, got, plain, true in zip(NAMES, *(torch.autograd.grad(o, i, grad.to(o.dtype)) for o, i in (
            (y, leaves), (want, eager), (truth, exact))), strict=True):
        assert_by_ratio(got, plain, true, factor=GRADIENT_FACTOR * factor, what=f"gradient of {name}")


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, dtype, channels_last):
    check(lambda *o: ConvNetProducts.apply(*o, dtype), size, dtype, channels_last=channels_last)


@pytest.mark.parametrize("wanted", NAMES)
def test_gradients_asked_singly(wanted):
    leaves = [t.requires_grad_(name == wanted) for name, t in zip(NAMES, operands(SIZES[0]), strict=True)]
    y = ConvNetProducts.apply(*leaves, torch.float64)
    want = reference.conv_net(*leaves)
    grad = torch.randn_like(want)
    mine = leaves[NAMES.index(wanted)]
    torch.testing.assert_close(torch.autograd.grad(y, mine, grad)[0], torch.autograd.grad(want, mine, grad)[0])


def test_second_derivatives_and_gradcheck():
    leaves = [t.requires_grad_() for t in operands((1, 2, 3, 3, 2, 8))]
    assert torch.autograd.gradcheck(lambda *o: ConvNetProducts.apply(*o, torch.float64), leaves)
    assert torch.autograd.gradgradcheck(lambda *o: ConvNetProducts.apply(*o, torch.float64), leaves)


def test_a_lower_dtype_inside():
    """As under autocast: the result in it, the gradients in the dtype of what they belong to."""
    leaves = [t.requires_grad_() for t in operands(SIZES[0], torch.float32)]
    y = ConvNetProducts.apply(*leaves, torch.bfloat16)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    want = reference.conv_net(*leaves)
    for got, true in zip((y, *grads), (want, *torch.autograd.grad(want.square().sum(), leaves)), strict=True):
        assert (got - true).abs().max() < 0.06 * true.abs().max()


@pytest.mark.parametrize("place", range(7))
def test_nan_comes_through(place):
    inputs = operands((2, 3, 4, 3, 3, 8), torch.float32)
    inputs[place][(0,) * inputs[place].dim()] = float("nan")
    got, want = ConvNetProducts.apply(*inputs, torch.float32), reference.conv_net(*inputs)
    assert got.isnan()[want.isnan()].all() and want.isnan().any()
    assert place in (1, 5) or torch.equal(got.isnan(), want.isnan())  # a weight that is NaN meets the border's zeros


def test_frozen_weights_get_no_gradient_and_x_gets_its_own():
    x, *weights = operands(SIZES[0])
    grad, = torch.autograd.grad(ConvNetProducts.apply(x.requires_grad_(), *weights, torch.float64).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(reference.conv_net(x, *weights).sum(), x)[0])


def test_on_a_cpu_the_convolutions_have_their_own_kernel():
    x, w1, *_, w3, _ = operands((1, 2, 3, 4, 4, 128))
    assert not conv_products.serves(x, w1, w3, 0.0)


@pytest.fixture
def recorded():
    with conv_products.recorded():
        yield


def on_gpu(size):
    return conv_products.serves(*(operands(size, torch.float32, "cuda")[i] for i in (0, 1, 5)), 0.0)


@pytest.mark.gpu
def test_on_a_gpu_small_maps_are_left_to_the_library_unless_recorded():
    assert not on_gpu((4, 6, 12, 8, 8, 128))
    assert on_gpu((512, 3, 6, 16, 16, 256))
    with conv_products.recorded():
        assert on_gpu((4, 6, 12, 8, 8, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(3, 6, 12, 5, 7, 128), (2, 12, 24, 4, 4, 160), (9, 24, 48, 8, 8, 512)], ids=str)
def test_on_a_gpu(size, dtype, tf32, monkeypatch, recorded):
    """In TF32 where convolutions are; products have a switch of their own, which stays as it was."""
    assert on_gpu(size)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    if tf32 and dtype == torch.float32:  # its errors turn a rectifier here and there: held to in the mean
        inputs = operands(size, dtype, "cuda")
        mine, exact = [t.clone().requires_grad_() for t in inputs], [t.double().requires_grad_() for t in inputs]
        y, truth = functional.conv_net(*mine), reference.conv_net(*exact)
        pairs = [(y, truth), *zip(*(torch.autograd.grad(o.square().sum(), i) for o, i in ((y, mine), (truth, exact))),
                                  strict=True)]
        assert all((got - want).norm() < 0.02 * want.norm() for got, want in pairs)
    else:
        check(functional.conv_net, size, dtype, "cuda", factor=2.0 if dtype == torch.bfloat16 else 1.0)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.gpu
@pytest.mark.parametrize("place", range(7))
def test_on_a_gpu_nan_comes_through(place, recorded):
    inputs = operands((64, 6, 12, 16, 16, 512), torch.float32, "cuda")
    inputs[place][(0,) * inputs[place].dim()] = float("nan")
    got, want = (f(*inputs).isnan() for f in (functional.conv_net, reference.conv_net))
    if place in (1, 5):  # whether a weight that is NaN meets the border's zeros is the library's choice
        got, want = got[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1]
    assert torch.equal(got, want) and want.any()


@pytest.mark.gpu
def test_on_a_gpu_autocast_and_capture(recorded):
    net = nn.ConvNet(6, 12, 128).cuda()
    torch.nn.init.normal_(net.conv3.weight, std=0.1)
    x = torch.randn(4, 6, 8, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        low = net(x)
    assert low.dtype == torch.bfloat16
    want = net(x)
    torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = net(x)
    graph.replay()
    torch.testing.assert_close(got, want)


