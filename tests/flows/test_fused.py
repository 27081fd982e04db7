"""Which layers of a tabular flow go through one kernel, that it gives what they give, and what it leaves alone."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict

import pytest
import torch
from cases import kernels_run
from torch import nn

from fastflow import backends, flows, functional
from fastflow.flows import plan
from fastflow.nn import MLP, ActNorm, AffineCoupling

pytestmark = pytest.mark.skipif(not backends.available()["cpu"], reason="the cpu library is not built")
FUSED, LAYER = "fastflow_cpu::mlp_flow_fwd", "fastflow_cpu::affine_coupling_fwd"


def scattered(module, size=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def realnvp(**options):
    return scattered(flows.RealNVP(5, **{"n_layers": 4, "hidden": (16, 12), **options}))


def layer_by_layer(transform, x, context=None, inverse=False):
    total = torch.zeros(len(x), dtype=x.dtype)
    for layer in reversed(transform.transforms) if inverse else transform.transforms:
        x, logdet = (layer.inverse if inverse else layer)(x, context)
        total = total + logdet
    return x, total


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("options", [{}, {"context_features": 3}, {"activation": nn.SiLU, "scale": "sigmoid"},
                                     {"hidden": ()}, {"scale": "additive"}], ids=str)
def test_one_kernel_gives_what_the_layers_give(options, inverse):
    if options.get("scale") == "additive":
        couplings = [AffineCoupling(MLP(2 + i, 3 - i, (8,), activation=nn.Tanh), flip=bool(i), scale="additive")
                     for i in (0, 1)]
        flow = flows.Flow(flows.Compose(ActNorm(5), *couplings), flows.StandardNormal(5))
        flow = scattered(flow).double()
    else:
        flow = realnvp(**options).double()
    x = torch.randn(70, 5, dtype=torch.float64, requires_grad=True)
    context = torch.randn(70, 3, dtype=torch.float64, requires_grad=True) if "context_features" in options else None
    leaves = [x, *([] if context is None else [context]), *flow.transform.parameters()]
    run = flow.transform.inverse if inverse else flow.transform
    found = []
    for call in (lambda: run(x, context), lambda: layer_by_layer(flow.transform, x, context, inverse)):
        z, logdet = call()
        found.append((z, logdet, *torch.autograd.grad(z.square().sum() + (logdet * z[:, 0]).sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert kernels_run(lambda: run(x, context)) == {FUSED}


def test_log_prob_sample_and_training_take_the_kernel():
    flow = realnvp()
    x = torch.randn(9, 5)
    assert kernels_run(lambda: flow(x).mean().backward()) == {FUSED, "fastflow_cpu::mlp_flow_bwd"}
    assert kernels_run(lambda: flow.sample(4)) == {FUSED}
    x, log_prob = flow.sample_and_log_prob(6)
    torch.testing.assert_close(log_prob, flow.log_prob(x), rtol=1e-4, atol=1e-4)
    assert flow.transform.explain(x) == "5 of 5 layers in 1 kernel on cpu"


def break_hook(flow):
    flow.transform.transforms[2].conditioner.layers[0].register_forward_hook(lambda *args: None)


def break_method(flow):
    layer = flow.transform.transforms[2]
    layer.forward = lambda x, context=None: AffineCoupling.forward(layer, x, context)


def break_subclass(flow):
    flow.transform.transforms[2].conditioner.__class__ = type("Mine", (MLP,), {})


def break_activation(flow):
    flow.transform.transforms[2].conditioner.layers[1] = nn.GELU()


def break_bias(flow):
    flow.transform.transforms[2].conditioner.layers[0].bias = None


def break_parametrization(flow):
    nn.utils.parametrizations.weight_norm(flow.transform.transforms[2].conditioner.layers[0])


def break_width(flow):
    flow.transform.transforms[2].conditioner = MLP(3, 4, (300,))


def break_layer(flow):
    flow.transform.transforms[2] = flows.Reverse()


def break_split(flow):
    flow.transform.transforms[2] = AffineCoupling(MLP(5, 10), split="checkerboard")


@pytest.mark.parametrize(("change", "reason"), [
    (break_hook, "hook"), (break_method, "method"), (break_subclass, "Mine"), (break_activation, "GELU"),
    (break_bias, "bias"), (break_parametrization, "Linear"), (break_width, "300|more than 128"),
    (break_layer, "Reverse is no"), (break_split, "split is 'checkerboard'")], ids=lambda c: getattr(c, "__name__", ""))
def test_a_layer_that_does_not_fit_is_called_by_itself(change, reason):
    flow, x = realnvp(), torch.randn(9, 5)
    flow.transform(x)  # what is kept of this call must not outlive the change
    change(flow)
    got, want = flow.transform(x), layer_by_layer(flow.transform, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    kinds = [type(run).__name__ for run in flows.fused.runs(flow.transform.transforms, x)]
    assert len(kinds) == 3 and kinds[0] == kinds[2] == "Run"
    text = flow.transform.explain(x)
    assert text.startswith("4 of 5 layers in 2 kernels on cpu; not 2: ")
    assert any(part in text for part in reason.split("|")), text
    back = flow.transform.inverse(got[0])[0]
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


def test_layers_that_take_no_context_beside_others_are_called_by_themselves():
    conditional = flows.Flow(realnvp(context_features=3).transform, flows.StandardNormal(5))
    conditional.transform.transforms.insert(2, realnvp().transform.transforms[1])
    x, context = torch.randn(9, 5), torch.randn(9, 3)
    kinds = [type(run).__name__ for run in flows.fused.runs(conditional.transform.transforms, x, context)]
    assert kinds == ["Run", "AffineCoupling", "Run"]
    assert conditional.transform.explain(x, context).endswith("not 2: its conditioner takes no context")
    assert "not 1, 3, 4, 5: its conditioner takes a context" in conditional.transform.explain(x)
    z, total = x, 0.0
    for index, layer in enumerate(conditional.transform.transforms):
        z, logdet = layer(z, None if index == 2 else context)
        total = total + logdet
    torch.testing.assert_close(conditional.transform(x, context), (z, total), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conditional.transform.inverse(z, context)[0], x, rtol=1e-3, atol=1e-3)


def test_shapes_can_be_asked_on_the_meta_device():
    with torch.device("meta"):
        flow = flows.RealNVP(3, n_layers=2)
    assert flow.log_prob(torch.randn(4, 3, device="meta")).shape == (4,)
    with pytest.raises(ValueError, match="x: expected device cpu .* got meta"):
        flows.RealNVP(3).log_prob(torch.randn(4, 3, device="meta"))


def test_what_was_found_out_is_kept_between_calls():
    flow, x = realnvp(), torch.randn(9, 5)
    layers = flow.transform.transforms
    assert type(flows.fused.runs(layers, x)[0]) is flows.fused.Run
    first, again = flows.fused.runs(layers, x)[0], flows.fused.runs(layers, x)[0]
    assert type(first) is plan.Call and first.plan is again.plan
    assert torch.equal(first(x)[0], flow.transform(x)[0])
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(twin(x), flow(x))
        assert flows.fused.runs(twin.transform.transforms, x)[0].plan is not first.plan
    gone = weakref.ref(layers)
    del flow, twin, layers, first, again
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(("name", "value"), [("flip", True), ("shift_first", True), ("order", "shift_scale"),
                                             ("layout", "interleave"), ("scale", functional.ScaleMap("sigmoid"))])
def test_attributes_may_change_between_calls(name, value):
    flow, x = scattered(flows.RealNVP(6, n_layers=3, hidden=(16,))), torch.randn(9, 6)
    before = flow.transform(x)
    layer = flow.transform.transforms[3 if name == "flip" else 2]
    value = not layer.flip if name == "flip" else value
    assert getattr(layer, name) != value
    setattr(layer, name, value)
    got, want = flow.transform(x), layer_by_layer(flow.transform, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0], before[0])


@pytest.mark.parametrize("change", [
    lambda layers: layers.__setitem__(2, scattered(AffineCoupling(MLP(3, 4, (16,)), flip=True))),
    lambda layers: layers.append(scattered(ActNorm(5))), lambda layers: layers.__delitem__(4),
    lambda layers: layers[1].conditioner.layers.__setitem__(0, scattered(nn.Linear(2, 16))),
    lambda layers: setattr(layers[1].conditioner.layers[0], "weight", nn.Parameter(torch.randn(16, 2))),
    lambda layers: setattr(layers[1].conditioner.layers[0].weight, "data", torch.randn(16, 2)),
    lambda layers: layers[2].double()])
def test_layers_may_change_between_calls(change):
    flow, x = realnvp(), torch.randn(9, 5)
    before = flow.transform(x)[0]
    change(flow.transform.transforms)
    if flow.transform.transforms[2].conditioner.layers[0].weight.dtype == torch.float64:
        with pytest.raises(TypeError, match="float64"):
            flow.transform(x)
        return
    got, want = flow.transform(x), layer_by_layer(flow.transform, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got[0], before)


def test_hooks_and_methods_count_however_they_came():
    flow, x = realnvp(), torch.randn(9, 5)
    flow(x)
    layer, seen = flow.transform.transforms[2].conditioner.layers[0], []
    layer.__setstate__(dict(layer.__dict__, _forward_hooks=OrderedDict(layer._forward_hooks)))
    handle = layer.register_forward_hook(lambda *args: seen.append(1))
    flow(x)
    assert seen == [1]
    handle.remove()
    layer.note = 1
    flow(x)
    del layer.note
    layer.forward = lambda h: seen.append(2) or nn.Linear.forward(layer, h)
    flow(x)
    assert seen == [1, 2]


def test_a_network_that_grew_is_looked_at_anew():
    flow, x = realnvp(), torch.randn(9, 5)
    flow(x)
    first, _, second = flow.transform.transforms[2].conditioner.layers[:3]
    first.weight, first.bias = nn.Parameter(torch.randn(300, 3)), nn.Parameter(torch.randn(300))
    second.weight = nn.Parameter(0.05 * torch.randn(12, 300))
    assert "more than 128" in flow.transform.explain(x)
    assert LAYER in kernels_run(lambda: flow(x))
    torch.testing.assert_close(flow.transform(x), layer_by_layer(flow.transform, x), rtol=1e-5, atol=1e-5)


def test_a_plan_that_no_longer_holds_is_dropped():
    flow, x = realnvp(), torch.randn(9, 5)
    flow(x)
    layers = flow.transform.transforms
    old = weakref.ref(layers[2])
    layers[2] = flows.Reverse()
    flow(x)
    gc.collect()
    assert old() is None


def test_a_parameter_that_two_layers_share_may_stop_being_shared():
    flow, x = scattered(flows.RealNVP(6, n_layers=4, hidden=(16,))), torch.randn(9, 6)
    first, third = (flow.transform.transforms[i].conditioner.layers[0] for i in (1, 3))
    own = third.weight
    third.weight = first.weight
    for _ in range(2):
        torch.testing.assert_close(flow.transform(x), layer_by_layer(flow.transform, x), rtol=1e-5, atol=1e-5)
    third.weight = own
    torch.testing.assert_close(flow.transform(x), layer_by_layer(flow.transform, x), rtol=1e-5, atol=1e-5)


def test_hooks_are_run():
    flow, seen = realnvp(), []
    flow(torch.randn(2, 5))
    flow.transform.transforms[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    flow(torch.randn(2, 5))
    assert seen == [(2, 5)]
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        flow(torch.randn(2, 5))
    finally:
        handle.remove()
    assert nn.Linear in seen


def test_calls_that_go_layer_by_layer_and_why():
    flow, x = realnvp(), torch.randn(9, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in flow.transform.explain(x)
        assert kernels_run(lambda: flow(x)) == {LAYER}
    with backends.use_backend("reference"):
        assert "requested" in flow.transform.explain(x)
        assert kernels_run(lambda: flow(x)) == set()
    image = flows.Compose(ActNorm(3))
    assert "(B, D)" in image.explain(torch.randn(2, 3, 4, 4))
    assert "float16" in flow.transform.explain(x.half())
    assert "parameters are not torch.float64" in flow.transform.explain(x.double())
    assert "more than 64" in flow.transform.explain(torch.randn(2, 65))
    assert "context" in flow.transform.explain(x, torch.randn(9, 2))
    alone = flows.Compose(ActNorm(5), ActNorm(5))
    assert alone.explain(x).startswith("0 of 2 layers in no kernel; not 0, 1: no coupling")
    assert flows.fused.explain(ActNorm(5), x).startswith("0 of 1 layers")


def test_weights_may_change_between_calls():
    flow, x = realnvp(), torch.randn(9, 5)
    other = realnvp()
    before = flow(x)
    flow.load_state_dict(other.state_dict())
    assert torch.equal(flow(x), other(x)) and not torch.equal(flow(x), before)
    with torch.no_grad():
        flow.transform.transforms[1].conditioner.layers[0].weight.mul_(2.0)
    torch.testing.assert_close(flow.transform(x), layer_by_layer(flow.transform, x), rtol=1e-5, atol=1e-5)
    swapped = {name: p.detach() * 1.1 for name, p in flow.named_parameters()}
    direct = realnvp()
    direct.load_state_dict(swapped, strict=False)
    assert torch.equal(torch.func.functional_call(flow, swapped, (x,)), direct(x))
    flow = nn.Sequential(flow)[0].double()
    assert flow(x.double()).dtype == torch.float64


def test_transforms_of_torch_func():
    flow, x = realnvp().double(), torch.randn(4, 5, dtype=torch.float64)
    parameters = dict(flow.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(flow, parameters, (x[None],))[0]

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    flow(x).sum().backward()
    for name, parameter in flow.named_parameters():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)
    jacobian = torch.func.jacfwd(lambda v: flow.transform(v[None])[0][0])(x[0])
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, flow.transform(x[:1])[1][0])


def test_double_backward():
    flow, x = realnvp(activation=nn.Tanh).double(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow, x) and torch.autograd.gradgradcheck(flow, x)
    score = torch.autograd.grad(flow(x).sum(), x, create_graph=True)[0]
    got = torch.autograd.grad(score.square().sum(), list(flow.transform.parameters()))
    with backends.use_backend("reference"):
        score = torch.autograd.grad(flow(x).sum(), x, create_graph=True)[0]
        want = torch.autograd.grad(score.square().sum(), list(flow.transform.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_parameters_get_no_gradient():
    flow = realnvp()
    frozen = list(flow.transform.transforms[1].parameters())
    for parameter in frozen:
        parameter.requires_grad_(False)
    flow(torch.randn(3, 5)).sum().backward()
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for layer in flow.transform.transforms[2:] for p in layer.parameters())


def test_compiled_to_one_graph_with_the_kernel():
    flow = realnvp(n_layers=2)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(6, 5)
    torch.testing.assert_close(compiled(x), flow(x))
    with torch.no_grad():
        flow.transform.transforms[1].conditioner.layers[0].weight.mul_(1.5)
        assert FUSED in kernels_run(lambda: compiled(x))
        torch.testing.assert_close(compiled(x), flow(x))


def test_the_state_dict_is_that_of_the_layers():
    keys = set(realnvp(n_layers=1, hidden=(4,)).state_dict())
    layer = "transform.transforms.1.conditioner.layers"
    assert keys == {*(f"transform.transforms.0.{n}" for n in ("bias", "log_scale", "initialized")),
                    *(f"{layer}.{i}.{n}" for i in (0, 2) for n in ("weight", "bias"))}
