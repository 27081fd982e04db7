"""Forward-mode AD of bounds whose gradients are not those of their values: the tangent is the gradient's."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, jvp

from fastflow import vae

BOUNDS = {"dreg": {}, "stl": {}, "piwae": {"groups": 2}, "iwae": {}}
X = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("make", [lambda **options: vae.MLPVAE((4,), 2, (6,), **options),
                                  lambda **options: vae.HVAE((4,), (2, 2), 6, **options)])
@pytest.mark.parametrize("bound", BOUNDS)
def test_the_tangent_of_a_bound_is_that_of_its_gradient(bound, make):
    torch.manual_seed(0)
    model = make(objective=vae.BoundObjective(bound, 4, **BOUNDS[bound])).double()
    eps = torch.randn(4, 2, 2, dtype=torch.float64)
    eps = [eps, eps.flip(0)] if isinstance(model, vae.HierarchicalVAE) else eps
    params = dict(model.named_parameters())
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    value = model(X, 4, 0.7, eps=eps).value.sum()
    gradients = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
    expected = sum((gradients[name] * tangents[name]).sum() for name in params)

    def call(params):
        return functional_call(model, params, (X, 4, 0.7), {"eps": eps}).value.sum()

    found, tangent = jvp(call, ({name: p.detach() for name, p in params.items()},), (tangents,))
    torch.testing.assert_close(found, value.detach())
    torch.testing.assert_close(tangent, expected)
    with forward_ad.dual_level():  # of parameters that require gradients
        dual = call({name: forward_ad.make_dual(p, tangents[name]) for name, p in params.items()})
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent.detach(), expected)
