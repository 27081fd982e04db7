"""The features of an HVAE's levels: one kernel for all stages gives their own answers; what sends it back to them."""

import pytest
import torch
from cases import kernels_run
from torch import nn

from fastflow import backends, vae
from fastflow.nn.fused_sequential import stacked

KERNELS = {"fastflow_cpu::wide_mlp_fwd", "fastflow_cpu::wide_mlp_bwd"}


@pytest.fixture(autouse=True)
def kernel():
    if not backends.available()["cpu"]:
        pytest.skip("the CPU kernels are not built")


def way_up(dtype=torch.float64):
    torch.manual_seed(0)
    return vae.HVAE((1, 4, 5), (3, 2, 4, 2), 12, mode="residual").bottom_up.to(dtype)


def evaluate(module, x):
    """(features, gradients of a sum of them, each with other weights)."""
    features = module(x)
    loss = sum((torch.cos(k + torch.arange(d.numel(), dtype=d.dtype)).view_as(d) * d).sum()
               for k, d in enumerate(features))
    return features, torch.autograd.grad(loss, tuple(module.parameters()))


def one_by_one(module):
    def call(x):
        found = []
        for stage in module.stages:
            x = stage(x)
            found.append(x)
        return found[::-1]
    call.parameters = module.parameters
    return call


@pytest.mark.parametrize("batch", [1, 7, 70])
def test_it_is_the_stages_one_by_one(batch):
    module, x = way_up(), torch.rand(batch, 1, 4, 5, dtype=torch.float64)
    assert kernels_run(lambda: evaluate(module, x)) == KERNELS
    for got, expected in zip(evaluate(module, x), evaluate(one_by_one(module), x), strict=True):
        torch.testing.assert_close(got, type(got)(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ["hook", "activation", "dropout", "subclass", "global hook", "autocast",
                                    "reference"])
def test_what_keeps_the_stages_apart(change):
    module, x = way_up(torch.float32), torch.rand(5, 1, 4, 5)
    seen, contexts = [], []
    if change == "hook":
        module.stages[2][0].register_forward_hook(lambda *call: seen.append(1))
    elif change == "activation":
        module.stages[2][1] = nn.ReLU()
    elif change == "dropout":
        module.stages[1].append(nn.Dropout(0.0))
    elif change == "subclass":
        module.stages[3] = type("Mine", (nn.Sequential,), {})(*module.stages[3])
    elif change == "global hook":
        contexts.append(nn.modules.module.register_module_forward_hook(lambda *call: seen.append(1)))
    with (torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
          backends.use_backend("reference" if change == "reference" else None)):
        assert not kernels_run(lambda: module(x))
        got, expected = module(x), one_by_one(module)(x)
    for handle in contexts:
        handle.remove()
    assert bool(seen) == ("hook" in change)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_fewer_than_two_stages_are_called():
    assert stacked([nn.Sequential(nn.Linear(3, 3), nn.SiLU())], torch.ones(2, 3)) is None
