"""A spline coupling with its network as one node of autograd: against the operations that it consists of, and twice
differentiated."""

import pytest
import torch

from fastflow import backends, reference
from fastflow.autograd import mlp_spline

pytestmark = pytest.mark.skipif(not backends.available()["cpu"], reason="the cpu backend was not built")
BINS = 4
SPLINE = (3.0, 0.01, 0.02, 1e-3, 0.7, None)


def network(passive, active, dtype, activation="relu", residual=True, hidden=9):
    generator = torch.Generator().manual_seed(passive)
    sizes = [passive, hidden, *([hidden, hidden] if residual else []), (3 * BINS - 1) * active]
    weights = [torch.randn(o, i, generator=generator, dtype=torch.float64) / i**0.5
               for i, o in zip(sizes, sizes[1:], strict=False)]
    biases = [torch.randn(o, generator=generator, dtype=torch.float64) for o in sizes[1:]]
    return tuple([t.to(dtype).requires_grad_() for t in ts] for ts in (weights, biases)) + (activation, residual, ())


def composed(x, order, kept, net, spline, inverse):
    """The operations one after the other, in the reference."""
    weights, biases, activation, residual, masks = net
    weights = [w * mask for w, mask in zip(weights, masks or [1.0] * len(weights), strict=True)]
    moved = x if order is None else x[:, order]
    passive, active = (moved[:, :kept], moved[:, kept:]) if kept > 0 else (moved[:, kept:], moved[:, :kept or None])
    raw = reference.mlp(passive, weights, biases, activation=activation, residual=residual)
    bound, width, height, derivative, gain, clamp = spline
    y, logdet = reference.spline(active, raw, tail_bound=bound, min_width=width, min_height=height,
                                 min_derivative=derivative, gain=gain, clamp=clamp, inverse=inverse)
    y = torch.cat([passive, y] if kept > 0 else [y, passive], 1) if kept else y
    return (y if order is None else y[:, torch.argsort(order)]), logdet


ARRANGEMENTS = [(0, None), (2, None), (-3, None), (3, [1, 3, 4, 0, 2]), (-2, [4, 0, 2, 1, 3])]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("kept", "order"), ARRANGEMENTS, ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "silu", "residual": False}], ids=str)
def test_it_is_the_operations(options, kept, order, inverse):
    order = order and torch.tensor(order)
    back, batch = order if order is None else torch.argsort(order), 120
    x = (2 * torch.randn(batch, 5, dtype=torch.float64)).requires_grad_()
    weights = torch.cos(torch.arange(batch * 5.0, dtype=torch.float64)).view(batch, 5)
    net = network(abs(kept) or 5, 5 - abs(kept), torch.float64, **options)
    if kept == 0:
        net = (*net[:4], [(torch.rand_like(w) < 0.6).double() for w in net[0]])
    leaves = [x, *net[0], *net[1]]
    for spline in (SPLINE, (5.0, 0.0, 0.0, 0.0, 1.0, 6.9)):
        y, logdet = mlp_spline.run(x, order, back, kept, net, spline, inverse)
        with torch.no_grad():
            plain = mlp_spline.run(x, order, back, kept, net, spline, inverse)
        assert torch.equal(plain[0], y) and torch.equal(plain[1], logdet)
        found = []
        for results in ((y, logdet), composed(x, order, kept, net, spline, inverse)):
            found.append([*results])
            of_y, of_logdet = (results[0] * weights).sum(), (results[1] * weights[:, 0]).sum()
            for outputs in (of_y + of_logdet, of_y, of_logdet):
                found[-1] += torch.autograd.grad(outputs, leaves, retain_graph=True)
        for got, want in zip(*found, strict=True):
            assert (got - want).abs().max() <= 1e-9 * (1 + want.abs().max())


def test_gradients_that_are_not_wanted():
    net = network(2, 3, torch.float64)
    for of_x, of_net in ((True, False), (False, True)):
        x = torch.randn(6, 5, dtype=torch.float64, requires_grad=of_x)
        own = tuple([t.detach().requires_grad_(of_net) for t in ts] for ts in net[:2]) + net[2:]
        outputs = sum(t.sum() for t in mlp_spline.run(x, None, None, 2, own, SPLINE))
        want = sum(t.sum() for t in composed(x, None, 2, own, SPLINE, False))
        leaves = [t for t in (x, *own[0], *own[1]) if t.requires_grad]
        for got, exact in zip(*(torch.autograd.grad(t, leaves) for t in (outputs, want)), strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kept", "order"), [(1, [2, 0, 1]), (-1, None), (0, None)], ids=str)
def test_gradcheck_and_gradgradcheck(kept, order):
    order = order and torch.tensor(order)
    back = order if order is None else torch.argsort(order)
    weights, biases, *rest, masks = network(abs(kept) or 3, 3 - abs(kept), torch.float64, "tanh", hidden=2)
    if kept == 0:
        masks = [(torch.arange(w.numel()) % 3 > 0).view_as(w) for w in weights]
    x = 0.5 * torch.randn(2, 3, dtype=torch.float64)

    def function(x, *params):
        return mlp_spline.run(x, order, back, kept, (params[:4], params[4:], *rest, masks), SPLINE)

    operands = (x.requires_grad_(), *weights, *biases)
    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)
