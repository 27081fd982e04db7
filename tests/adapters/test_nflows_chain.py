"""nflows' CompositeTransform: splines and linear maps in a row as one node of autograd."""

import pytest
import torch
from adapter_checks import accelerated, close, same, scattered

import fastflow
from fastflow import backends
from fastflow.autograd import chain

pytest.importorskip("nflows")
from nflows import transforms  # noqa: E402
from nflows.nn import nets  # noqa: E402

pytestmark = pytest.mark.skipif(not backends.available()["cpu"], reason="the cpu backend was not built")
D = 4
SPLINE = {"num_bins": 3, "tails": "linear", "tail_bound": 2.0}


def coupling(start, context=None, hidden=6):
    mask = (torch.arange(D) % 2 == start).int()
    return transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask, lambda i, o: nets.ResidualNet(i, o, hidden_features=hidden, context_features=context, num_blocks=1),
        **SPLINE)


def linear():
    return transforms.LULinear(D, identity_init=False)


def composite(hidden=6):
    """Two chains with a layer between that no chain takes, and one behind."""
    return scattered(transforms.CompositeTransform([
        linear(), coupling(0, hidden=hidden), linear(), transforms.ReversePermutation(D), coupling(1, hidden=hidden),
        transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, hidden, **SPLINE), linear(),
        transforms.ReversePermutation(D)]))


def forward(model, x, *context):
    return model(x, *context)


def inverse(model, x, *context):
    return model.inverse(x, *context)


@pytest.fixture
def lengths(monkeypatch):
    """Of the chains that run."""
    seen, run = [], chain.run

    def watched(x, steps):
        seen.append(len(steps))
        return run(x, steps)
    monkeypatch.setattr(chain, "run", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_as_the_original(dtype, lengths):
    same(composite().to(dtype), (forward, inverse), [torch.randn(7, D, dtype=dtype)], 7)
    assert lengths.count(3) >= 4


def test_large_data():
    layers, x = composite(), torch.randn(5000, D)
    fused, _ = accelerated(layers)
    for got, want in zip(fused(x), layers(x), strict=True):
        close(got, want, 1e-5)


def test_gradients_asked_of_some_of_it(lengths):
    layers = composite().double()
    fused, _ = accelerated(layers)
    x = torch.randn(6, D, dtype=torch.float64)
    fused(x)
    del lengths[:]
    for frozen in range(len(layers._transforms)):
        for model in (layers, fused):
            model.requires_grad_(True)
            model._transforms[:frozen].requires_grad_(False)
        for result in (0, 1):
            found = []
            for model in (layers, fused):
                leaves = [p for p in model.parameters() if p.requires_grad]
                out = model(x)[result].square().sum()
                found.append(torch.autograd.grad(out, leaves, allow_unused=True) if leaves else ())
            for want, got in zip(*found, strict=True):
                assert (want is None or not want.any()) if got is None else True
                if got is not None:
                    close(got, torch.zeros_like(got) if want is None else want, 1e-10)
    assert 3 in lengths


def test_second_derivatives():
    layers = composite().double()
    fused, _ = accelerated(layers)
    found = []
    for model in (layers, fused):
        x = torch.linspace(-1.5, 1.5, 6 * D, dtype=torch.float64).view(6, D).requires_grad_()
        leaves = [x, *model.parameters()]
        y, logdet = model(x)
        first = torch.autograd.grad(y.square().sum() + logdet.sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    for want, got in zip(*found, strict=True):
        close(got, want, 1e-10)


def test_hooks_and_context_go_layer_by_layer(lengths):
    layers = composite()
    fused, _ = accelerated(layers)
    x = torch.randn(6, D)
    fused(x)
    del lengths[:]
    calls = []
    fused._transforms[1].register_forward_hook(lambda *args: calls.append(args))
    for got, want in zip(fused(x), layers(x), strict=True):
        close(got, want, 1e-5)
    assert len(calls) == 1 and max(lengths) == 3 and lengths.count(3) == 1
    conditional = scattered(transforms.CompositeTransform([coupling(0, 2), linear(), coupling(1, 2)]))
    del lengths[:]
    same(conditional, (forward, inverse), [x, torch.randn(6, 2)], 4)
    assert max(lengths) == 1


def test_under_torch_func_and_autocast():
    layers = composite()
    fused, _ = accelerated(layers)
    x = torch.randn(6, D)
    fused(x)
    want = torch.func.jacrev(lambda t: layers(t[None])[0][0])(x[0])
    close(torch.func.jacrev(lambda t: fused(t[None])[0][0])(x[0]), want, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x)[0].dtype == layers(x)[0].dtype


def test_what_has_no_neighbours_says_so():
    report = fastflow.accelerate(transforms.CompositeTransform([linear(), transforms.ReversePermutation(D), linear()]))
    assert "in a row" in report.skipped[""] and len(report.swapped) == 2
