"""y = L U x + b as one node of autograd: against float64 finite differences, and the plain formula."""

import pytest
import torch

from fastflow.autograd import lu_linear

NAMES = ("x", "lower", "upper", "raw", "bias")


def operands(features, batch=7):
    n = features * (features - 1) // 2
    shapes = (batch, features), (n,), (n,), (features,), (features,)
    return [(0.5 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes]


def run(features):
    def call(*tensors):
        return lu_linear.run(*tensors, 1e-3, lu_linear.places_of(features, "cpu", tensors[0].dtype))
    return call


@pytest.fixture(params=["layers", "products"], autouse=True)
def form(request, monkeypatch):
    """Small data and large."""
    if request.param == "products":
        monkeypatch.setattr(lu_linear, "SMALL", 0)


@pytest.mark.parametrize("features", [1, 2, 5, 8])
def test_it_is_the_product_of_its_factors(features):
    x, lower, upper, raw, bias = tensors = operands(features)
    y, logabsdet = run(features)(*tensors)
    below, above = torch.eye(features, dtype=torch.float64), torch.zeros(features, features, dtype=torch.float64)
    below[torch.tril_indices(features, features, -1).unbind()] = lower.detach()
    above[torch.triu_indices(features, features, 1).unbind()] = upper.detach()
    above.diagonal().copy_(torch.nn.functional.softplus(raw.detach()) + 1e-3)
    torch.testing.assert_close(y, x @ (below @ above).T + bias)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(below @ above)[1].expand(len(x)))


@pytest.mark.parametrize("features", [1, 2, 5])
def test_first_and_second_derivatives(features):
    assert torch.autograd.gradcheck(run(features), operands(features))
    assert torch.autograd.gradgradcheck(run(features), operands(features))


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
@pytest.mark.parametrize("result", [0, 1])
def test_gradients_asked_singly_of_one_result(wanted, result):
    tensors = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(operands(4))]
    out = run(4)(*tensors)[result]
    if result == 1 and NAMES[wanted] != "raw":
        grad, = torch.autograd.grad(out.sum(), tensors[wanted], allow_unused=True)
        assert grad is None or not grad.any()
    else:
        assert torch.autograd.gradcheck(lambda t: run(4)(*tensors[:wanted], t, *tensors[wanted + 1:])[result],
                                        [tensors[wanted]])


def test_under_autocast_and_torch_func():
    x, *weights = (t.detach().float() for t in operands(4))
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = run(4)(leaf, *(w.requires_grad_() for w in weights))
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.float().sum(), [leaf, *weights], allow_unused=True)
    assert all(g is None or g.dtype == torch.float32 for g in grads)
    jacobian = torch.func.jacrev(lambda t: run(4)(t, *weights)[0].sum(0))(x)
    weight = torch.autograd.functional.jacobian(lambda t: run(4)(t[None], *weights)[0][0], x[0])
    torch.testing.assert_close(jacobian[:, 0], weight)
