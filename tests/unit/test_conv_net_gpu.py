"""Glow's conditioner by Triton's products on a GPU, beside cuDNN's convolutions: what only a GPU can say. Its
arithmetic is held to float64 in tests/interpreter."""

import layouts
import pytest
import torch
from cases import conv_case, cotangents_of, evaluate

from fastflow import backends, functional, nn

pytestmark = pytest.mark.gpu
# (B, I, H, W), hidden, O
SIZES = [((3, 6, 5, 7), 128, 12), ((2, 12, 4, 4), 160, 24), ((9, 24, 8, 8), 512, 48), ((64, 6, 16, 16), 512, 12)]


@pytest.fixture(autouse=True)
def tf32(full_precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def scaled(x, hidden, out, dtype, channels_last=True):
    case = conv_case("gpu", x, hidden, out)
    tensors = {n: t / (t[0].numel() ** 0.5 if n[0] == "w" else 1.0) for n, t in case.tensors(torch.float64).items()}
    if channels_last:
        tensors = {n: layouts.channels_last(t) if t.dim() == 4 else t for n, t in tensors.items()}
    return case, {n: t.to("cuda", dtype) for n, t in tensors.items()}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_it_errs_no_more_than_cudnn(size, dtype, channels_last):
    """In norm: in TF32 and half precision a rounding turns a rectifier here and there, in one as in the other."""
    case, tensors = scaled(*size, dtype, channels_last)
    assert backends.explain("conv_net", *tensors.values()).startswith("triton")
    cotangents = cotangents_of(case, tensors)
    found = {}
    for name, operands in (("triton", tensors), ("reference", tensors), ("truth", {n: t.double() for n, t in
                                                                                   tensors.items()})):
        with backends.use_backend("triton" if name == "triton" else "reference"):
            results, grads = evaluate(case, operands, cotangents={n: t.to(operands["x"].dtype) for n, t in
                                                                  cotangents.items()})
        found[name] = {**results, **{f"gradient of {n}": g for n, g in grads.items()}}
    for name, truth in found["truth"].items():
        mine, eager = ((found[who][name].double() - truth).norm() / truth.norm() for who in ("triton", "reference"))
        assert mine <= 2.0 * eager + torch.finfo(dtype).eps, (name, mine, eager)


@pytest.mark.parametrize("place", ["x", "w2", "b1", "b2", "b3"])
def test_nan_comes_through(place):
    case, tensors = scaled(*SIZES[-1], torch.float32)
    tensors[place][(0,) * tensors[place].dim()] = float("nan")
    got = functional.conv_net(*tensors.values()).isnan()
    with backends.use_backend("reference"):
        want = functional.conv_net(*tensors.values()).isnan()
    assert torch.equal(got, want) and want.any()


def test_autocast_and_capture():
    net = nn.ConvNet(6, 12, 128).cuda()
    torch.nn.init.normal_(net.conv3.weight, std=0.1)
    x = torch.randn(4, 6, 8, 8, device="cuda")
    want = net(x)
    with torch.autocast("cuda", torch.bfloat16):
        low = net(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = net(x)
    graph.replay()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_compile(dtype):
    """Which trusts what fakes.py says of the maps that forward keeps."""
    net = nn.ConvNet(6, 12, 128).to("cuda", dtype)
    torch.nn.init.normal_(net.conv3.weight, std=0.1)
    x = torch.randn(3, 6, 5, 7, device="cuda", dtype=dtype, requires_grad=True)
    leaves = [x, *net.parameters()]
    with backends.use_backend("triton"):
        want = net(x)
        got = torch.compile(net, fullgraph=True)(x)
        torch.testing.assert_close(got, want)
        for g, w in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)), strict=True):
            torch.testing.assert_close(g, w)


def test_backward_after_tf32_was_forbidden(monkeypatch):
    """The maps are as forward left them."""
    _, tensors = scaled(*SIZES[0], torch.float32)
    leaves = [t.requires_grad_() for t in tensors.values()]
    with backends.use_backend("triton"):
        y = functional.conv_net(*leaves)
        want = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        got = torch.autograd.grad(y.square().sum(), leaves)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() < 0.01 * w.norm()
