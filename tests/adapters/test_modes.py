"""Swapped layers in inference mode and under torch.func: what they remember of their buffers serves the next call."""

import copy
import math

import pytest
import torch
from adapter_checks import close
from torch import nn

import fastflow
from fastflow.adapters import layers

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")


def dense(i, o, *rest):
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))


def call(layer, x):
    return layer(x)[0]


def data(shape):
    """As much as small calls have not."""
    return torch.randn(layers.SMALL // math.prod(shape) + 1, *shape)


def coupling():
    transforms = pytest.importorskip("nflows.transforms")
    from nflows.nn.nets import ResidualNet

    return transforms.AffineCouplingTransform([0, 1, 0, 1], lambda i, o: ResidualNet(i, o, 8)), call, (4,)


def lu_linear():
    return pytest.importorskip("nflows.transforms").LULinear(4), call, (4,)


def convolution():
    return pytest.importorskip("nflows.transforms").OneByOneConvolution(4), call, (4, 2, 2)


def composite():
    transforms = pytest.importorskip("nflows.transforms")
    from nflows.nn.nets import ResidualNet

    spline = transforms.PiecewiseRationalQuadraticCouplingTransform([0, 1, 0, 1], lambda i, o: ResidualNet(i, o, 8),
                                                                    tails="linear", tail_bound=3.0)
    return transforms.CompositeTransform([spline, transforms.LULinear(4)]), call, (4,)


def masked():
    flows = pytest.importorskip("normflows").flows
    return flows.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0]), dense(4, 4), dense(4, 4)), call, (4,)


def one_by_one():
    return pytest.importorskip("normflows").flows.Invertible1x1Conv(4, True), call, (4, 3, 3)


def glow():
    block = pytest.importorskip("normflows").flows.GlowBlock(4, 16)
    block.flows[2].data_dep_init_done.fill_(1.0)
    return block, call, (4, 4, 4)


def lu_permute():
    return pytest.importorskip("normflows").flows.LULinearPermute(4), call, (4,)


def all_in_one():
    modules = pytest.importorskip("FrEIA.modules")
    return modules.AllInOneBlock([(6,)], subnet_constructor=dense), lambda m, x: m((x,))[0][0], (6,)


def soft():
    modules = pytest.importorskip("FrEIA.modules")
    block = modules.AllInOneBlock([(6,)], subnet_constructor=dense, permute_soft=True)
    return block, lambda m, x: m((x,))[0][0], (6,)


def sequence():
    framework, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    net = framework.SequenceINN(6)
    for _ in range(2):
        net.append(modules.AllInOneBlock, subnet_constructor=dense)
    return net, call, (6,)


def realnvp():
    flows = pytest.importorskip("zuko").flows
    return flows.RealNVP(6, transforms=2), lambda m, x: m().log_prob(x), (6,)


def torchflows_coupling():
    pytest.importorskip("torchflows")
    from torchflows.bijections.finite.autoregressive.layers import AffineCoupling

    return AffineCoupling((6,)), call, (6,)


EVERY = (coupling, lu_linear, convolution, composite, masked, one_by_one, glow, lu_permute, all_in_one, soft, sequence,
         realnvp, torchflows_coupling)


@pytest.mark.parametrize("before", ["a call", "accelerate", "a copy's call", "a call in float64"])
@pytest.mark.parametrize("make", EVERY)
def test_a_layer_is_trained_after_inference_mode(make, before):
    torch.manual_seed(0)
    model, run, shape = make()
    fused, x = copy.deepcopy(model), data(shape)
    with torch.inference_mode(before == "accelerate"):
        fastflow.accelerate(fused, verify=False)
    if before == "a copy's call":
        run(fused, x)
        fused = copy.deepcopy(fused)
    if before == "a call in float64":
        model, fused, x = model.double(), fused.double(), x.double()
    with torch.inference_mode():
        run(fused, x)
    grads = []
    for m in (model, fused):
        run(m, x).square().mean().backward()
        grads.append([p.grad for p in m.parameters() if p.grad is not None])
    for got, want in zip(*reversed(grads), strict=True):
        close(got, want, 1e-5)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("make", EVERY)
def test_gradients_of_a_function_of_the_parameters(make, warm):
    torch.manual_seed(0)
    model, run, shape = make()
    fused, x, found = copy.deepcopy(model), data(shape), []
    fastflow.accelerate(fused, verify=False)
    for m in (model, fused):
        wrapper = Call(m, run)
        if warm:
            wrapper(x)

        def loss(state, wrapper=wrapper):
            return torch.func.functional_call(wrapper, state, (x,)).square().mean()
        found.append(torch.func.grad(loss)(dict(wrapper.named_parameters())))
    for key, want in found[0].items():
        close(found[1][key], want, 1e-5)
    close(run(fused, x), run(model, x), 1e-5)  # nothing of the transform stays


@pytest.mark.parametrize("make", [convolution, masked, one_by_one, all_in_one, soft, lu_linear])
def test_an_ensemble_under_vmap(make):
    torch.manual_seed(0)
    members = [make()[0] for _ in range(3)]
    _, run, shape = make()
    x = torch.randn(5, *shape)
    want = torch.stack([run(m, x) for m in members])
    for m in members:
        fastflow.accelerate(m)
    wrappers = [Call(m, run) for m in members]
    state = torch.func.stack_module_state(wrappers)
    got = torch.func.vmap(lambda p, b: torch.func.functional_call(wrappers[0], (p, b), (x,)))(*state)
    close(got, want, 1e-5)


class Call(nn.Module):
    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x):
        return self.run(self.layer, x)
