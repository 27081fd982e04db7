"""The formulas for torch's counter of floating-point operations: fused networks count what torch's own layers do."""

import functools

import pytest
import torch
from cases import flow_case
from torch.utils.flop_counter import FlopCounterMode

import fastflow
from fastflow import backends, functional


def linears(*sizes):
    pairs = list(zip(sizes, sizes[1:], strict=False))
    return [torch.randn(out, into) for into, out in pairs], [torch.randn(out) for _, out in pairs]


def mlp(function, *sizes):
    weights, biases = linears(*sizes)
    return lambda x, *_: function(x, weights, biases), torch.randn(40, sizes[0]), [*weights, *biases]


def conv_net():
    shapes = (16, 3, 3, 3), (16,), (16, 16, 1, 1), (16,), (6, 16, 3, 3), (6,)
    params = [torch.randn(shape) for shape in shapes]
    return lambda x: functional.conv_net(x, *params), torch.randn(4, 3, 6, 8), params


def activated_conv(transposed):
    weight = torch.randn(*((16, 32) if transposed else (32, 16)), 4, 4)
    call = functools.partial(functional.activated_conv, stride=2, padding=1, transposed=transposed, activation="relu")
    return lambda x: call(x, weight), torch.randn(4, 16, 8, 6), [weight]


def mlp_flow():
    case = flow_case("flow", 6, (20, 20), 3, batch=40, context=2)
    tensors = case.tensors(torch.float32, "cpu")
    x = tensors.pop("x")
    return lambda x: sum(t.sum() for t in case.call({"x": x, **tensors})), x, list(tensors.values())


NETWORKS = {
    "mlp": lambda: mlp(functional.mlp, 8, 16, 16, 4), "wide_mlp": lambda: mlp(functional.wide_mlp, 8, 64, 64, 4),
    "conv_net": conv_net, "activated_conv": lambda: activated_conv(False),
    "transposed": lambda: activated_conv(True), "mlp_flow": mlp_flow,
}


@pytest.mark.skipif(not backends.available()["cpu"], reason="the CPU library is not built")
@pytest.mark.parametrize("wanted", ["both", "x", "parameters"])
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_count_what_torchs_layers_do(name, wanted):
    call, x, parameters = NETWORKS[name]()
    x.requires_grad_(wanted != "parameters" or name == "mlp_flow")
    for parameter in parameters:
        parameter.requires_grad_(wanted != "x")
    found = []
    for backend in ("cpu", "reference"):
        with (FlopCounterMode(display=False, custom_mapping=fastflow.flops.formulas()) as counter,
              backends.use_backend(backend)):
            call(x).sum().backward()
        operators = {str(operator) for operator in counter.get_flop_counts()["Global"]}
        assert all(operator.startswith("fastflow_cpu.") for operator in operators) == (backend == "cpu")
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0
