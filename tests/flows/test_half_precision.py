"""Flows whose parameters are of half precision: networks compute in it, z and the log-determinant in float32."""

import copy

import pytest
import torch
from flow_checks import scattered

from fastflow import flows

IMAGE, TABLE = (3, 8, 8), (4,)
MODELS = {
    "realnvp": (lambda: flows.RealNVP(4, n_layers=2, hidden=(8,)), TABLE),
    "nice": (lambda: flows.NICE(4, n_layers=2, hidden=(8,)), TABLE),
    "maf": (lambda: flows.MAF(4, n_layers=2, hidden=(8,)), TABLE),
    "iaf": (lambda: flows.IAF(4, n_layers=2, hidden=(8,)), TABLE),
    "nsf": (lambda: flows.NSF(4, n_layers=2, hidden=(8,)), TABLE),
    "ffjord": (lambda: flows.FFJORD(4, n_layers=1, hidden=(8,), method="rk4", options={"step_size": 0.1}), TABLE),
    "glow": (lambda: flows.Glow(IMAGE, 2, 2, 16), IMAGE),
    "realnvp-image": (lambda: flows.RealNVPImage(IMAGE, 2, 1, 8, 1, alpha=None), IMAGE),
    "flow++": (lambda: flows.FlowPP(IMAGE, hidden_channels=16, dequantization=None), IMAGE),
    "jet": (lambda: flows.Jet(IMAGE, patch_size=2, channels=16, couplings=2, depth=1, heads=2), IMAGE),
    "tarflow": (lambda: flows.TarFlow(IMAGE, patch_size=2, channels=16, blocks=2, layers_per_block=1, head_dim=8),
                IMAGE),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_z_stays_in_float32_around_half_precision(name, dtype):
    make, shape = MODELS[name]
    flow = scattered(make().eval(), size=0.02).to(dtype)
    exact, x = copy.deepcopy(flow).float(), torch.rand(3, *shape) - 0.5
    z, logdet = flow.transform(x)
    back, minus = flow.transform.inverse(z)
    assert {t.dtype for t in (z, logdet, back, minus)} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(back, x, rtol=0, atol=0.05 if name == "flow++" else 2e-3)
    log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob, exact.log_prob(x), rtol=0.02, atol=0.1)
    log_prob.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in flow.parameters() if p.grad is not None)
    assert flow.sample(2).dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: flows.NICE(4), lambda: flows.MAF(4, actnorm=False), lambda: flows.FFJORD(4)])
def test_data_of_half_precision(make):
    x = torch.randn(3, 4).half()
    assert make().log_prob(x).dtype == torch.float32


def test_doubles_are_still_not_mixed():
    for flow in (flows.NICE(4), flows.MAF(4, actnorm=False), flows.Glow(IMAGE, 2, 1, 16).bfloat16()):
        x = torch.randn(3, *(IMAGE if isinstance(flow, flows.Glow) else TABLE), dtype=torch.float64)
        with pytest.raises(TypeError, match="float64"):
            flow.log_prob(x)


def test_residual_flows_refuse_it():
    with pytest.raises(TypeError, match="weight: expected float32 or float64, .* got torch.bfloat16"):
        flows.ResidualFlow(4).bfloat16().log_prob(torch.randn(3, 4))
