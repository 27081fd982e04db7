"""Layers put back: by restore, or by another accelerate once they have what no fused form has; and options that change
while they are swapped."""

import copy

import pytest
import torch
from adapter_checks import close
from torch import nn

import fastflow
from fastflow.adapters import layers as adapter_layers
from fastflow.adapters.swap import swap_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
VERIFY = pytest.mark.parametrize("verify", [False, True])
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def every_call_goes_to_the_kernel(monkeypatch):
    monkeypatch.setattr(adapter_layers, "SMALL", 0)


def residual(i, o):
    from nflows.nn.nets import ResidualNet

    return ResidualNet(i, o, 8)


def nflows(kind, *args, **options):
    torch.manual_seed(0)
    return getattr(pytest.importorskip("nflows.transforms"), kind)(*args, **options).double()


def coupling():
    return nflows("AffineCouplingTransform", [0, 1, 0, 1], residual)


def spline(**options):
    return nflows("PiecewiseRationalQuadraticCouplingTransform", [0, 1, 0, 1], residual, tails="linear", tail_bound=3.0,
                  **options)


def autoregressive():
    return nflows("MaskedAffineAutoregressiveTransform", 4, 8)


def autoregressive_spline():
    return nflows("MaskedPiecewiseRationalQuadraticAutoregressiveTransform", 4, 8, tails="linear", tail_bound=3.0)


def same(layer, original, x=X):
    for method in ("forward", "inverse"):
        for got, want in zip(getattr(layer, method)(x), getattr(original, method)(x), strict=True):
            close(got, want, 1e-10)


@VERIFY
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("make", [coupling, lambda: nflows("LULinear", 4, identity_init=False), autoregressive])
def test_a_wrapper_of_a_swapped_layers_method_outlives_restore(make, called, verify):
    layer, original = make(), make()
    fastflow.accelerate(layer, verify=verify)
    if called:
        layer(X)
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    same(layer, original)
    assert type(layer) is swap_of(layer).fused
    assert fastflow.restore(layer) == [""]
    same(layer, original)


@VERIFY
@pytest.mark.parametrize("name", ["AffineCoupling", "RQSCoupling", "ElementwiseAffine", "ElementwiseRQSpline",
                                  "ActNorm", "AffineForwardMaskedAutoregressive"])
def test_torchflows_layers_turned_round_while_swapped(name, verify):
    pytest.importorskip("torchflows")
    from torchflows.bijections.finite.autoregressive import layers

    torch.manual_seed(0)
    layer = getattr(layers, name)((4,)).double().eval()
    original = copy.deepcopy(layer)
    fastflow.accelerate(layer, verify=verify)
    same(layer, original)
    for m in (layer, original):
        m.invert()
    same(layer, original)
    fastflow.restore(layer)
    same(layer, original)
    for m in (layer, original):
        m.invert()
    same(layer, original)
    assert type(layer) is type(original)


@VERIFY
@pytest.mark.parametrize("when", ["swapped before", "swapped and called before"])
@pytest.mark.parametrize("make", [coupling, spline, lambda: nflows("LULinear", 4, identity_init=False)])
def test_layers_that_became_pyro_modules(make, when, verify):
    to_pyro_module = pytest.importorskip("pyro.nn.module").to_pyro_module_
    transforms = pytest.importorskip("nflows.transforms")
    model, original = (transforms.CompositeTransform([make(), make()]) for _ in range(2))
    pyro = copy.deepcopy(original)
    to_pyro_module(pyro)
    report = fastflow.accelerate(model, verify=verify)
    if when == "swapped and called before":
        model(X)
    to_pyro_module(model)
    same(model, original)
    assert not verify or report.verified >= {"_transforms.0", "_transforms.1"}
    assert fastflow.restore(model) == list(report.swapped)
    assert not any(isinstance(m, swap_of(m).fused) for m in model.modules() if swap_of(m) is not None)
    assert [m.__name__ for m in map(type, model.modules())] == [m.__name__ for m in map(type, pyro.modules())]
    same(model, original)


def _steep(params):
    return 2.0 + params[..., :2].sigmoid(), params[..., 2:]


def _shifted(params):
    return params.view(-1, 4, 2)[..., 1], params.view(-1, 4, 2)[..., 0]


def _doubled(inputs, params, inverse=False):
    return (0.5 if inverse else 2.0) * inputs, torch.zeros_like(inputs)


def _doubled_rows(inputs, params, inverse=False):
    return (0.5 if inverse else 2.0) * inputs, inputs.new_zeros(len(inputs))


OPTIONS = {
    "epsilon": (autoregressive, "_epsilon", 0.5),
    "scales of a MAF": (autoregressive, "_unconstrained_scale_and_shift", _shifted),
    "scales of a coupling": (coupling, "_scale_and_shift", _steep),
    "splines of a coupling": (spline, "_piecewise_cdf", _doubled),
    "splines of a MAF": (autoregressive_spline, "_elementwise", _doubled_rows),
    "tails": (spline, "tails", None),
    "tails of a MAF": (autoregressive_spline, "tails", None)}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_ones_own_count_once_they_are_set(name):
    make, attribute, value = OPTIONS[name]
    layer, original, x = make(), make(), X.sigmoid()
    fastflow.accelerate(layer, verify=False)
    before = layer(x)[0]
    for m in (layer, original):
        setattr(m, attribute, value)
    if value is None:  # without tails there is a slope at either end
        with pytest.raises(Exception) as want:
            original(x)
        with pytest.raises(type(want.value)):
            layer(x)
    else:
        same(layer, original, x)
        assert (layer(x)[0] - before).abs().max() > 1e-2
    report = fastflow.accelerate(layer, verify=False)
    assert type(layer) is type(original) and "" in report.skipped and not report.swapped


def dense(i, o):
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))


@pytest.mark.parametrize("name", ["AllInOneBlock", "GLOWCouplingBlock", "RNVPCouplingBlock", "GINCouplingBlock",
                                  "AffineCouplingOneSided"])
def test_a_clamp_that_became_a_tensor(name):
    modules, framework = pytest.importorskip("FrEIA.modules"), pytest.importorskip("FrEIA.framework")
    torch.manual_seed(0)
    net = framework.SequenceINN(4)
    for _ in range(2):
        net.append(getattr(modules, name), subnet_constructor=dense)
    original = copy.deepcopy(net.double())
    fastflow.accelerate(net, verify=False)
    net(X)
    for m in (net, original):
        for block in m.module_list:
            block.clamp = torch.full((), 0.7, dtype=torch.float64)
    for rev in (False, True):
        for got, want in zip(net(X, rev=rev), original(X, rev=rev), strict=True):
            close(got, want, 1e-10)
    assert set(fastflow.accelerate(net, verify=False).swapped) <= {""}
