"""Flows that keep less for backward: the gradients of a plain pass, from fewer bytes."""

import contextlib

import pytest
import torch
from torch import nn

from fastflow import backends, flows, functional
from fastflow.engine.memory import per_image
from fastflow.flows import memory
from fastflow.nn import MLP, ActNorm, AffineCoupling, InvertibleConv1x1, WeightBank

INVERT = [("invert", None), ("invert", 1), ("invert", 2)]


class Shear:
    """z = x + tanh(x U), U strictly upper triangular: a transform that is no module, with a parameter of its own."""

    def __init__(self, features):
        self.weight = nn.Parameter(0.3 * torch.randn(features, features, dtype=torch.float64))

    def __call__(self, x, context=None):
        return x + torch.tanh(x @ self.weight.triu(1)), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        x = torch.zeros_like(z)
        for i in range(z.shape[1]):
            x[:, i] = z[:, i] - torch.tanh(x @ self.weight.triu(1))[:, i]
        return x, z.new_zeros(len(z))


def scattered(module, dtype=torch.float64, by=0.1):
    module = module.to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module


def coupling(features=6, context_features=None, **options):
    half = features // 2 if "split" not in options else features
    return AffineCoupling(MLP(half, 2 * half, (16,), context_features=context_features), **options)


def glow(dtype=torch.float64, **options):
    options = {"n_levels": 2, "n_steps": 3, "hidden_channels": 8} | options
    model = flows.Glow((3, 8, 8), **options)
    return scattered(model, dtype, 0.05), [torch.rand(3, 3, 8, 8, dtype=dtype) - 0.5], []


def realnvp(dtype=torch.float64):
    model = flows.RealNVP(5, n_layers=5, hidden=(16,), context_features=2)
    return scattered(model, dtype), [torch.randn(7, 5, dtype=dtype), torch.randn(7, 2, dtype=dtype)], []


def mixed(dtype=torch.float64):
    """Every kind of part: 1x1 convolutions, permutations, masks, compositions, inverses, a foreign transform."""
    shear = Shear(6)
    shear.weight = nn.Parameter(shear.weight.detach().to(dtype))
    c = lambda **options: coupling(context_features=2, **options)  # noqa: E731
    transform = flows.Compose(
        flows.Reverse(), ActNorm(6), InvertibleConv1x1(6), c(scale="tanh"),
        flows.Compose(c(scale="sigmoid", flip=True)), flows.Permute([3, 5, 4, 1, 0, 2]), c(split="checkerboard"), shear,
        InvertibleConv1x1(6, "plu", actnorm=ActNorm(6)),
        c(split=torch.tensor([1, 1, 0, 0, 1, 0]), shift_first=True, scale="softplus"),
        flows.Inverse(flows.Compose(c(scale="tanh"), InvertibleConv1x1(6))), flows.Reverse())
    model = scattered(flows.Flow(transform, flows.StandardNormal(6)), dtype)
    return model, [torch.randn(7, 6, dtype=dtype), torch.randn(7, 2, dtype=dtype)], [shear.weight]


def multiscale(dtype=torch.float64):
    """GlowSteps and a Split in compositions."""
    steps = lambda c: [flows.GlowStep(c, nn.Conv2d(c // 2, c, 3, padding=1)) for _ in range(2)]  # noqa: E731
    inner = flows.Compose(flows.Squeeze(), *steps(16))
    split = flows.Split((8, 4, 4), inner, prior=nn.Conv2d(4, 8, 3, padding=1))
    model = flows.Flow(flows.Compose(flows.Squeeze(), *steps(8), split), flows.StandardNormal(128))
    return scattered(model, dtype, 0.05), [torch.rand(3, 2, 8, 8, dtype=dtype)], []


def masks(dtype=torch.float64):
    """Images under every way to split, with conditioners that answer in their own packing."""
    def layer(channels_in, channels_out, **options):
        return AffineCoupling(nn.Conv2d(channels_in, channels_out, 3, padding=1), **options)
    stripes = torch.tensor([[1, 0, 0], [0, 1, 1]]).view(1, 2, 3).expand(1, 2, 3)
    transform = flows.Compose(
        layer(3, 6, split="checkerboard", scale="sigmoid"), layer(3, 6, split="checkerboard", flip=True, scale="tanh"),
        layer(3, 6, split=torch.tensor([1, 0, 1]).view(3, 1, 1), layout="interleave", scale="rational"),
        layer(3, 6, split=stripes, order="shift_scale", scale="softplus"),
        layer(1, 4, layout="interleave", scale="atan"), layer(2, 1, flip=True, scale="additive"))
    model = scattered(flows.Flow(transform, flows.StandardNormal((3, 2, 3))), dtype)
    return model, [torch.randn(4, 3, 2, 3, dtype=dtype)], []


MODELS = {"masks": masks, "glow": glow, "glow plu": lambda dtype=torch.float64: glow(dtype, parametrization="plu"),
          "glow without prior": lambda dtype=torch.float64: glow(dtype, learn_prior=False, scale="tanh"),
          "realnvp": realnvp, "mixed": mixed, "multiscale": multiscale}


def mode_of(model, name, keep_every=None):
    mode = None if name == "none" else memory.Mode(name, model, keep_every)
    if name == "invert":
        mode.drifts = []
    return mode


def run(model, inputs, more, mode, call=None):
    """The loss, and its gradients for the inputs, the parameters and ``more``."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    with memory.saving(mode):
        loss = -(model if call is None else call)(*inputs).mean()
    return loss.detach(), torch.autograd.grad(loss, [*inputs, *model.parameters(), *more])


def assert_equal_gradients(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_save_z_has_the_gradients_of_a_plain_pass(make, dtype):
    model, inputs, more = make(dtype)
    want_loss, want = run(model, inputs, more, None)
    loss, grads = run(model, inputs, more, mode_of(model, "save_z"))
    # The log-determinants are added in another order, so the loss too may differ by a rounding.
    assert_equal_gradients([loss, *grads], [want_loss, *want], 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("mode", INVERT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_invert_has_them_within_the_drift(make, dtype, mode):
    model, inputs, more = make(dtype)
    expected = run(model, inputs, more, None)
    mode = mode_of(model, *mode)
    loss, grads = run(model, inputs, more, mode)
    drift = torch.stack(mode.drifts).max().item()
    torch.testing.assert_close(loss, expected[0], rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0.0)
    rounding = 1e-14 if dtype == torch.float64 else 4e-7
    assert drift <= 300 * rounding
    assert_equal_gradients(grads, expected[1], 20 * (drift + rounding))


@pytest.mark.parametrize("mode", [("save_z", None), *INVERT], ids=str)
def test_inside_a_weight_bank(mode):
    model, inputs, more = mixed()
    expected = run(model, inputs, more, None)
    loss, grads = run(model, inputs, more, mode_of(model, *mode), WeightBank(model))
    torch.testing.assert_close(loss, expected[0])
    assert_equal_gradients(grads, expected[1], 1e-11)


@pytest.mark.parametrize("mode", [("save_z", None), *INVERT], ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_backward_twice_and_of_a_part(make, mode):
    model, inputs, _ = make()
    x = inputs[0].clone().requires_grad_()
    wanted = [x, next(model.parameters())]

    def loss_in(mode):
        with memory.saving(mode):
            return -model(x, *inputs[1:]).mean()
    expected = torch.autograd.grad(loss_in(None), wanted)
    loss = loss_in(mode_of(model, *mode))
    for leaf, grad in zip(wanted, expected, strict=True):
        found = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert_equal_gradients(found, [grad], 1e-11)
    assert_equal_gradients(torch.autograd.grad(loss, wanted), expected, 1e-11)


def test_a_frozen_flow_passes_gradients_on():
    model, (x,), _ = glow()
    model.requires_grad_(False)
    for mode in (("save_z", None), *INVERT):
        x1 = x.clone().requires_grad_()
        expected, = torch.autograd.grad(model(x1).sum(), x1)
        with memory.saving(mode_of(model, *mode)):
            value = model(x1).sum()
        assert_equal_gradients(torch.autograd.grad(value, x1), [expected], 1e-11)


@pytest.mark.parametrize("mode", ["save_z", "invert"])
def test_second_derivatives(mode):
    model, (x,), _ = glow(n_levels=1, n_steps=2)
    results = []
    for name in ("none", mode):
        leaf = x.clone().requires_grad_()
        with memory.saving(mode_of(model, name)):
            value = model(leaf).sum()
        grad, = torch.autograd.grad(value, leaf, create_graph=True)
        results.append(torch.autograd.grad((grad * grad).sum(), [leaf, *model.parameters()], allow_unused=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize("mode", [("save_z", None), *INVERT], ids=str)
def test_under_autocast_and_on_a_chosen_backend(mode):
    model, inputs, more = glow(torch.float32)
    for context in (lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: backends.use_backend("reference")):
        losses = []
        for name in (("none",), mode):
            with context(), memory.saving(mode_of(model, *name)):
                losses.append(-model(*inputs).mean())
        assert torch.equal(*losses)
        expected, found = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
        # A recovered z may round to another bfloat16, which is what the drift check is for.
        assert_equal_gradients(found, expected, 1e-6 if mode[0] == "save_z" else 0.1)


def conditioners_with(layer):
    layers = [AffineCoupling(nn.Sequential(nn.Linear(2, 16), layer(), nn.Linear(16, 4)), flip=i % 2 == 1, scale="tanh")
              for i in range(3)]
    model = flows.Flow(flows.Compose(*layers), flows.StandardNormal(4))
    return scattered(model), torch.randn(9, 4, dtype=torch.float64)


def test_save_z_draws_the_same_random_numbers_twice():
    model, x = conditioners_with(lambda: nn.Dropout(0.5))
    results = []
    for name in ("none", "save_z"):
        torch.manual_seed(5)
        mode = mode_of(model, name)
        results.append((*run(model, [x], [], mode)[1], torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert mode.random
    other, y = conditioners_with(nn.Tanh)
    run(other, [y], [], mode := mode_of(other, "save_z"))
    assert not mode.random


def test_save_z_updates_running_statistics_once():
    model, x = conditioners_with(lambda: nn.BatchNorm1d(16))
    first = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for name in ("none", "save_z"):
        model.load_state_dict(first)
        results.append((run(model, [x], [], mode_of(model, name))[1],
                        {k: v.clone() for k, v in model.state_dict().items()}))
    assert_equal_gradients(results[1][0], results[0][0], 1e-12)
    assert results[1][1].keys() == first.keys()
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in first)
    assert not all(torch.equal(first[k], results[1][1][k]) for k in first)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("mode", ["save_z", "invert"])
def test_power_iterations_advance_once(norm, mode):
    model, x = conditioners_with(lambda: nn.Tanh())
    for layer in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        norm(layer)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    results = []
    for name in ("none", mode):
        model.load_state_dict(first)
        results.append((run(model, [x], [], mode_of(model, name))[1],
                        {k: v.clone() for k, v in model.state_dict().items()}))
    assert_equal_gradients(results[1][0], results[0][0], 1e-12)
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in first)
    assert not all(torch.equal(first[k], results[1][1][k]) for k in first)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("make", [
    lambda: flows.ResidualFlow(4, n_layers=3, hidden=(8,)),
    lambda: flows.FFJORD(4, n_layers=2, hidden=(8,), method="rk4", options={"step_size": 0.25})])
def test_invert_runs_what_takes_gradients_in_its_inverse(make):
    model, x = scattered(make(), torch.float64, 0.1), torch.randn(5, 4, dtype=torch.float64)
    expected = run(model, [x], [], None)
    mode = mode_of(model, "invert")
    loss, grads = run(model, [x], [], mode)
    drift = max(mode.drifts).item()  # of the solver here, to which the two directions are inverse to each other
    assert drift < 1e-3
    assert_equal_gradients([loss, *grads], [expected[0], *expected[1]], 1e-9 + 100 * drift)


def test_invert_refuses_adaptive_solvers():
    with pytest.raises(ValueError, match="can't run .* .ContinuousTransform.: its solver would choose other steps"):
        memory.Mode("invert", flows.FFJORD(4, n_layers=2))
    memory.Mode("invert", flows.FFJORD(4, n_layers=2, adjoint=True))


@pytest.mark.parametrize(("layer", "name"), [
    (lambda: nn.Dropout(0.1), "Dropout"), (lambda: nn.BatchNorm1d(16), "BatchNorm1d"), (nn.RReLU, "RReLU")])
def test_invert_refuses_by_name(layer, name):
    model, _ = conditioners_with(layer)
    where = r"transform\.transforms\.0\.conditioner\.1"
    with pytest.raises(ValueError, match=rf"memory: 'invert' can't run {where} \({name}\)"):
        memory.Mode("invert", model)
    memory.Mode("invert", conditioners_with(lambda: nn.Dropout(0.0))[0])


@pytest.mark.parametrize(("arguments", "message"), [
    (("all",), "memory: expected one of 'save_z', 'invert', got 'all'"), (("none",), "memory: expected"),
    (("save_z", 2), "keep_every: expected None"), (("invert", 0), "keep_every: expected an int >= 1"),
    (("invert", 1.5), "keep_every"), (("invert", True), "keep_every")])
def test_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        memory.Mode(arguments[0], nn.Identity(), *arguments[1:])


def test_the_mode_ends_with_its_context():
    model, (x,), _ = glow()
    plain = per_image(lambda x: model(x).sum(), model, x, n=1)
    with contextlib.suppress(KeyError), memory.saving(mode_of(model, "invert")):
        raise KeyError
    assert memory.active() is None
    assert per_image(lambda x: model(x).sum(), model, x, n=1) == plain
    with memory.saving(mode_of(model, "save_z")), torch.no_grad():
        assert memory.active() is None
        assert not model(x).requires_grad


def test_each_conditioner_runs_once_more_and_nothing_is_factorised_again(monkeypatch):
    model, (x,), _ = glow()
    calls, factorised = [], []
    for level in model.transform.levels:
        for step in level.steps:
            step.coupling.conditioner.register_forward_hook(lambda *_: calls.append(1))
    for name in ("slogdet", "slogdet_inverse"):
        original = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda w, f=original: (factorised.append(len(w)), f(w))[1])
    for mode in (("save_z", None), *INVERT):
        calls.clear()
        factorised.clear()
        with memory.saving(mode_of(model, *mode)):
            loss = model(x).sum()
        assert len(calls) == 6
        loss.backward()
        assert len(calls) == 12 and factorised == [3, 3]


@pytest.mark.parametrize("name", ["save_z", "invert"])
def test_methods_and_backward_hooks_of_a_part_count(name):
    """A composition in another and a 1x1 convolution with a forward of its own, or a hook on gradients, run whole."""
    for part in (flows.Compose(coupling()), InvertibleConv1x1(6)):
        flow = flows.Flow(flows.Compose(ActNorm(6), part, coupling()), flows.StandardNormal(6)).double()
        x, seen, forward = torch.randn(4, 6, dtype=torch.float64), [], part.forward
        handle = part.register_full_backward_pre_hook(lambda *_, seen=seen: seen.append("hook"))
        with memory.saving(mode_of(flow, name)):
            loss = flow(x).sum()
        loss.backward()
        assert set(seen) == {"hook"}
        handle.remove()
        part.forward = lambda *args, forward=forward, seen=seen: (seen.append("forward"), forward(*args))[1]
        with memory.saving(mode_of(flow, name)):
            flow(x)
        assert set(seen) == {"hook", "forward"}


def bytes_of(model, x, name, keep_every=None):
    mode = mode_of(model, name, keep_every)

    def loss(x):
        with memory.saving(mode):
            return -model(x).mean()
    return per_image(loss, model, x, n=1)[0]


def test_bytes_per_image_of_glow_at_full_size():
    """3x32x32, three levels of 32 steps, 512 hidden channels: 688,128 bytes of z, 12,288 of them at the end."""
    model = flows.Glow((3, 32, 32), n_levels=3, n_steps=32, hidden_channels=512)
    x = torch.rand(2, 3, 32, 32) - 0.5
    assert 688_128 <= bytes_of(model, x, "save_z") <= 0.8e6
    assert bytes_of(model, x, "invert") == 12_288
    # Kept at steps 8, 16, 24 and 32 of each level.
    assert bytes_of(model, x, "invert", 8) == 12_288 + 4 * (12_288 + 6_144 + 3_072)


def test_bytes_per_image_and_depth():
    found = {}
    for n_steps in (2, 4):
        model = flows.Glow((3, 16, 16), n_levels=2, n_steps=n_steps, hidden_channels=64)
        x = torch.rand(2, 3, 16, 16) - 0.5
        found[n_steps] = {m: bytes_of(model, x, *m) for m in (("none", None), ("save_z", None), ("invert", None))}
    state = 4 * (768 + 384)  # both levels
    assert found[4]["save_z", None] - found[2]["save_z", None] == 2 * (state + 2 * 4)  # and a log-determinant each
    assert found[4]["invert", None] == found[2]["invert", None] == 4 * 768
    assert found[4]["none", None] > 8 * found[4]["save_z", None]


def test_a_table_flow_keeps_z_of_each_coupling():
    model = flows.RealNVP(4, n_layers=6, hidden=(32,))
    x = torch.randn(4, 4)
    as_one_kernel = bytes_of(model, x, "save_z")  # which keeps z of each layer in a plain pass as well
    assert 6 * 16 <= as_one_kernel <= 7 * 16 and as_one_kernel == bytes_of(model, x, "none")
    with backends.use_backend("reference"):
        assert bytes_of(model, x, "save_z") == 7 * 16 + 5 * 4
    assert bytes_of(model, x, "invert") == 16
    assert bytes_of(model, x, "invert", 3) == 32


@pytest.mark.parametrize("make", [lambda: multiscale(torch.float32),
                                  pytest.param(lambda: glow(torch.float32, n_steps=1), marks=pytest.mark.slow)])
def test_save_z_compiles_to_one_graph(make):
    model, (x,), _ = make()
    expected = run(model, [x], [], None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, grads = run(model, [x], [], mode_of(model, "save_z"), compiled)
    torch.testing.assert_close(loss, expected[0])
    assert_equal_gradients(grads, expected[1], 1e-5)


def test_invert_does_not_compile():
    model, (x,), _ = glow(n_steps=1)
    with memory.saving(mode_of(model, "invert")), pytest.raises(Exception, match="can't be traced by torch.compile"):
        torch.compile(model, fullgraph=True, backend="eager")(x)
