"""Where launches count, a coupling joins the gradients of its conditioner's part and of the whole in one of them: the
results are those of the plain split."""

import pytest
import torch

from fastflow.nn import AffineCoupling, channel_affine


def layer(flip, scale="tanh"):
    torch.manual_seed(0)
    seen, changed = (3, 2) if flip else (2, 3)
    conditioner = torch.nn.Sequential(torch.nn.Conv2d(seen, 2 * changed, 3, padding=1), torch.nn.Tanh())
    return AffineCoupling(conditioner, flip=flip, scale=scale).double()


@pytest.fixture
def joined(monkeypatch):
    """As on a GPU."""
    return lambda on: monkeypatch.setattr(channel_affine, "DEFERRED_ON", {"cpu", "cuda"} if on else {"cuda"})


def gradients(coupling, x, cotangents, **options):
    leaf = x.clone().requires_grad_()
    out = coupling(leaf * 1.0)
    return out, torch.autograd.grad([o for o, g in zip(out, cotangents, strict=True) if g is not None],
                                    [leaf, *coupling.parameters()], [g for g in cotangents if g is not None],
                                    allow_unused=True, **options)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("of", ["both", "z", "logdet"])
def test_values_and_gradients(joined, flip, of):
    coupling, x = layer(flip), torch.randn(3, 5, 4, 4, dtype=torch.float64)
    cotangents = [None if of == "logdet" else torch.randn(3, 5, 4, 4, dtype=torch.float64),
                  None if of == "z" else torch.randn(3, dtype=torch.float64)]
    kept = [None if g is None else g.clone() for g in cotangents]
    results = []
    for on in (False, True):
        joined(on)
        results.append(gradients(coupling, x, cotangents))
    for got, want in zip(results[1], results[0], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert all(g is None or torch.equal(g, k) for g, k in zip(cotangents, kept, strict=True))


@pytest.mark.parametrize("flip", [False, True])
def test_repeated_and_second_derivatives(joined, flip):
    joined(True)
    coupling, x = layer(flip), torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = coupling(x * 1.0)[0].square().sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.autograd.gradcheck(lambda t: coupling(t * 1.0), x)
    assert torch.autograd.gradgradcheck(lambda t: coupling(t * 1.0), x)


def test_a_conditioner_that_does_not_look(joined):
    joined(True)
    coupling = AffineCoupling(lambda seen: torch.ones(len(seen), 6, 2, 2, dtype=seen.dtype), scale="exp")
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(coupling(x * 1.0)[0].sum(), x)
    torch.testing.assert_close(grad[:, :2], torch.ones(2, 2, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(grad[:, 2:], torch.full((2, 3, 2, 2), torch.e, dtype=torch.float64))
