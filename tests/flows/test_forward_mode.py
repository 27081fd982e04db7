"""Forward-mode derivatives of transforms that take gradients on their way."""

import pytest
import torch
from flow_checks import scattered
from torch.autograd import forward_ad

from fastflow import flows

FIXED = {"method": "rk4", "options": {"step_size": 0.25}}
MODELS = {
    "ffjord": lambda: flows.FFJORD(3, hidden=(8,), **FIXED),
    "residual": lambda: flows.ResidualFlow(3, n_layers=2, hidden=(8,)),
    "lambda": lambda: flows.Flow(flows.Lambda(torch.sinh), flows.StandardNormal(3)),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", MODELS)
def test_the_tangent_is_that_of_the_gradient(name, grad_mode, frozen):
    flow = scattered(MODELS[name]().double(), size=0.3)
    flow.requires_grad_(not frozen)
    x, v = torch.randn(2, 4, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(flow.log_prob(leaf).sum(), leaf)
    with grad_mode(), forward_ad.dual_level():
        _, tangent = forward_ad.unpack_dual(flow.log_prob(forward_ad.make_dual(x, v)))
    torch.testing.assert_close(tangent, (gradient * v).sum(1), rtol=1e-9, atol=1e-9)
