"""The memory modes of TrainStep: what is chosen, said, measured and refused."""

import contextlib
import copy

import pytest
import torch
from stand_in_models import Affine, Gauge
from torch import nn

from fastflow import flows
from fastflow.engine import DriftError, RunError, TrainStep, memory
from fastflow.flows import memory as flow_memory
from fastflow.nn import AffineCoupling, channel_affine


def sgd(model, lr=0.01):
    return torch.optim.SGD(model.parameters(), lr=lr)


def glow(seed=0, **options):
    torch.manual_seed(seed)
    model = flows.Glow((3, 8, 8), **{"n_levels": 2, "n_steps": 2, "hidden_channels": 8} | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def images(n=5):
    return torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8)


def memory_line(step):
    return next(line for line in step.explain().splitlines() if line.startswith("memory: "))


def weights_after(step, model, n=3):
    losses = []
    for i in range(n):
        torch.manual_seed(i)
        losses.append(step(images()).item())
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("options", "tolerance"), [
    ({"memory": "auto"}, 0.0), ({"memory": "save_z"}, 0.0), ({"memory": "invert"}, 1e-10),
    ({"memory": "invert", "keep_every": 1}, 1e-10)])
def test_every_mode_takes_the_same_steps(options, tolerance):
    plain, model = glow(), glow()
    expected = weights_after(TrainStep(plain, sgd(plain), memory="none"), plain)
    found = weights_after(TrainStep(model, sgd(model), **options), model)
    for a, b in zip(found[0], expected[0], strict=True):
        assert abs(a - b) <= tolerance * abs(b)
    for a, b in zip(found[1], expected[1], strict=True):
        assert (a - b).abs().max() <= tolerance


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("mode", ["none", "save_z", "invert", "auto"])
def test_weight_gradients_that_are_computed_at_once(monkeypatch, mode, around):
    """As on a GPU, from the first step on, which counts what is saved, and where hooks keep copies of it."""
    plain, model = glow(), glow()
    expected = weights_after(TrainStep(plain, sgd(plain), memory="none"), plain, n=2)
    monkeypatch.setattr(channel_affine, "DEFERRED_ON", {"cpu", "cuda"})
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    step = TrainStep(model, sgd(model), memory=mode)
    with around():
        found = weights_after(step, model, n=2)
    assert step.memory.mode == ("save_z" if mode == "auto" else mode)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()], rtol=1e-9,
                               atol=1e-9)


def test_the_model_itself_stays_as_it_was():
    model = glow()
    step = TrainStep(model, sgd(model), memory="invert")
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    before = memory.per_image(lambda x: model(x).sum(), model, x, n=1)
    step(images())
    assert flow_memory.active() is None
    assert memory.per_image(lambda x: model(x).sum(), model, x, n=1) == before


def test_auto_saves_where_memory_is_short(monkeypatch):
    model = glow()
    needed = sum_of(memory.per_image(lambda x: -model(x).mean(), model, torch.rand(5, 3, 8, 8).double()), 5)
    for free, mode in ((4.5 * needed, "none"), (3.5 * needed, "save_z")):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        step = TrainStep(model, sgd(model))
        assert memory_line(step).startswith("memory: auto: chosen at the first batch")
        step(images())
        assert step.memory.mode == mode
        for words in (f"memory: {mode}: ", "'auto': activations of 5 images take about", "a quarter of the"):
            assert words in memory_line(step)
        assert (step.memory.saved is None) == (mode == "none")
    assert step.memory.saved < needed / 2
    assert f"{step.memory.saved / 1e3:.3g} kB kept in the first step" in memory_line(step)


def sum_of(found, n):
    rate, rest = found
    return rest + n * rate


def test_auto_where_nothing_can_be_saved_or_known(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    for model in (Gauge(), Affine()):
        step = TrainStep(model, sgd(model))
        assert memory_line(step) == (f"memory: none: every activation is kept for backward ('auto': "
                                     f"{type(model).__name__} holds no sequence of flow steps)")
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    step = TrainStep(model := glow(), sgd(model))
    step(images())
    assert "how much memory is free is not known" in memory_line(step) and step.memory.mode == "none"


def test_the_probe_of_auto_leaves_no_trace(monkeypatch):
    layers = [AffineCoupling(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)))
              for _ in range(2)]
    model = flows.Flow(flows.Compose(*layers), flows.StandardNormal(4))
    x, results = torch.randn(6, 4), []
    first = {k: v.clone() for k, v in model.state_dict().items()}
    for mode in ("none", "auto"):
        model.load_state_dict(first)
        torch.manual_seed(3)
        loss = TrainStep(model, sgd(model), memory=mode)(x)
        results.append([loss, torch.rand(2), *(v.clone() for v in model.state_dict().values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_drift_is_measured_once_and_reported():
    model = glow().float()
    step = TrainStep(model, sgd(model), memory="invert", keep_every=1)
    assert step.memory.drift is None and "kept every 1 couplings" in memory_line(step)
    step(images())
    drift = step.memory.drift
    assert 0 < drift < 1e-5
    assert f"drift {drift:.1e}, bound 0.001" in memory_line(step)
    step(images())
    assert step.memory.drift == drift


def test_an_inverse_that_fails_altogether_is_drift():
    model = glow().float()
    coupling = model.transform.levels[0].steps[0].coupling
    right = coupling._transform
    coupling._transform = lambda x, params, back, *others: right(
        x * float("inf") if back else x, params, back, *others)
    with pytest.raises(DriftError, match="relative error of inf"):
        TrainStep(model, sgd(model), memory="invert")(images())


@pytest.mark.parametrize("compiled", [
    lambda model: model.compile(backend="eager"), lambda model: model.transform.compile(backend="eager")])
def test_invert_is_refused_for_a_model_that_compiles_itself(compiled):
    model = glow()
    compiled(model)
    with pytest.raises(ValueError, match="memory: 'invert' can't be combined with torch.compile"):
        TrainStep(model, sgd(model), memory="invert")
    assert "compile: by the model's own torch.compile" in TrainStep(model, sgd(model)).explain()


@pytest.mark.parametrize("mode", ["none", "save_z"])
def test_hooks_around_a_step_see_what_is_saved_from_the_first_one_on(mode):
    model, counts = glow(), []
    step = TrainStep(model, sgd(model), memory=mode)
    for _ in range(3):
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: seen.append(t.shape) or t, lambda t: t):
            step(images())
        counts.append(len(seen))
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("broken", [False, True])
def test_drift_above_the_bound_is_refused_and_nothing_changes(broken):
    model = glow().float()
    if broken:  # an inverse that is none
        coupling = model.transform.levels[0].steps[0].coupling
        right = coupling._transform
        coupling._transform = lambda x, params, back, *others: right(x * 1.1 if back else x, params, back, *others)
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainStep(model, sgd(model), memory="invert", **({} if broken else {"drift_bound": 1e-9}))
    with pytest.raises(DriftError, match=r"memory='invert' recovers z with a relative error of .*drift_bound=.*"
                                         r"keep_every.*save_z") as caught:
        step(images())
    assert isinstance(caught.value, RunError)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(DriftError):  # it stays refused
        step(images())


def test_keeping_z_bounds_the_drift():
    drifts = {}
    for keep_every in (None, 4):
        model = glow(n_levels=1, n_steps=24).float()
        step = TrainStep(model, sgd(model), memory="invert", keep_every=keep_every, drift_bound=10.0)
        step(images())
        drifts[keep_every] = step.memory.drift
    assert drifts[4] < drifts[None]


def conditioner_with(layer):
    coupling = AffineCoupling(nn.Sequential(nn.Linear(1, 8), layer, nn.Linear(8, 2)))
    return flows.Flow(flows.Compose(coupling), flows.StandardNormal(2))


@pytest.mark.parametrize(("model", "options", "message"), [
    (glow(), {"memory": "all"}, "memory: expected one of 'auto', 'none', 'save_z', 'invert', got 'all'"),
    (Gauge(), {"memory": "save_z"}, "memory: 'save_z' is for flows made of steps .* Gauge holds none"),
    (Affine(), {"memory": "invert"}, "memory: 'invert' is for flows made of steps"),
    (glow(), {"memory": "invert", "compile": True}, "memory: 'invert' can't be combined with torch.compile"),
    (torch.compile(glow()), {"memory": "invert"}, "memory: 'invert' can't be combined with torch.compile"),
    (glow(), {"keep_every": 2}, "keep_every: expected None, .* got 2"),
    (glow(), {"memory": "save_z", "keep_every": 2}, "keep_every: expected None"),
    (glow(), {"memory": "invert", "keep_every": 0}, "keep_every: expected an int >= 1, got 0"),
    (glow(), {"drift_bound": 0.0}, "drift_bound: expected a positive number, got 0.0"),
    (glow(), {"drift_bound": float("nan")}, "drift_bound: expected a positive number"),
    (conditioner_with(nn.Dropout(0.5)), {"memory": "invert"}, r"can't run transform\.transforms\.0\.conditioner\.1 "),
    (conditioner_with(nn.BatchNorm1d(8)), {"memory": "invert"}, r"conditioner\.1 \(BatchNorm1d\)"),
])
def test_refusals_name_the_argument(model, options, message):
    with pytest.raises(ValueError, match=message):
        TrainStep(model, sgd(model), **options)


def test_save_z_inside_a_compiled_loss():
    plain, model = glow(n_steps=1), glow(n_steps=1)
    first = TrainStep(plain, sgd(plain))
    second = TrainStep(model, sgd(model), memory="save_z", compile=True)
    second._loss = torch.compile(second.objective, backend="aot_eager", fullgraph=True)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64) - 0.5
    for _ in range(2):
        torch.testing.assert_close(second(x), first(x))
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


def inside_another():
    """Two compositions, the inner one out of sight of the outer."""
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = flows.Compose(flows.RealNVP(4, n_layers=2, hidden=(8,)).transform, flows.Reverse())

        def forward(self, x, context=None):
            return self.inner(x, context)

        def inverse(self, z, context=None):
            return self.inner.inverse(z, context)
    return flows.Flow(flows.Compose(Hidden(), flows.Reverse()), flows.StandardNormal(4))


@pytest.mark.parametrize("make", [
    lambda: flows.RealNVP(4, n_layers=2, hidden=(8,)), lambda: flows.MAF(4, n_layers=2, hidden=(8,)), inside_another,
    *(pytest.param(make, marks=pytest.mark.slow) for make in (
        lambda: flows.NICE(4, hidden=(8,)), lambda: flows.NSF(4, n_layers=1, hidden=(8,)),
        lambda: flows.IAF(4, n_layers=2, hidden=(8,)),
        lambda: flows.Jet((3, 8, 8), patch_size=4, channels=8, couplings=2, depth=1, heads=2),
        lambda: flows.TarFlow((3, 8, 8), patch_size=4, channels=8, head_dim=4, blocks=2, layers_per_block=1))),
], ids=["RealNVP", "MAF", "hidden", "NICE", "NSF", "IAF", "Jet", "TarFlow"])
def test_save_z_of_every_model_inside_a_compiled_loss(make):
    """Steps, MADEs, splines and attention, with plain gradients."""
    torch.manual_seed(0)
    model = make().double()
    twin = copy.deepcopy(model)
    x = torch.rand(4, *model.base.event_shape, dtype=torch.float64) - 0.5
    x = x.view(4, 3, 8, 8) if x.shape[1:].numel() == 192 else x
    losses = [TrainStep(m, sgd(m, 1.0), **options)(x) for m, options in (
        (model, {"memory": "save_z", "compile": "aot_eager"}), (twin, {"memory": "none"}))]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    assert flow_memory.active() is None


@pytest.mark.slow
def test_save_z_through_inductor():
    plain, model = glow(n_steps=1), glow(n_steps=1)
    first = TrainStep(plain, sgd(plain))
    second = TrainStep(model, sgd(model), memory="save_z", compile=True)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64) - 0.5
    for _ in range(2):
        torch.testing.assert_close(second(x), first(x))
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


def test_saved_bytes_are_counted_by_hand():
    w = nn.Parameter(torch.randn(3, 3))
    holder = nn.ParameterList([w])
    x = torch.randn(4, 3, requires_grad=True)
    with memory.SavedBytes(holder) as saved:
        y = (x @ w).sin()  # x, w and the sine's argument
        value = y.t().cos().sum()  # the cosine's argument
    assert saved.total == 4 * (12 + 12 + 12)
    value.backward()

    def loss(x, context):
        return ((x * context).sin() @ w).sum() + w.exp().sum()  # x has no gradient
    found = memory.per_image(loss, holder, torch.randn(8, 3), torch.randn(8, 3).requires_grad_())
    assert found == (4 * (3 + 3 + 3), 4 * 9)
    assert memory.per_image(loss, holder, torch.randn(1, 3), torch.randn(1, 3))[1] == 0


def test_free_memory(tmp_path, monkeypatch):
    free = memory.free_bytes(torch.device("cpu"))
    assert 1e7 < free < 1e15
    assert memory.free_bytes(torch.device("meta")) is None
    assert memory._left_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert memory._left_in_group(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._left_in_group(tmp_path) == 700
    (tmp_path / "memory.current").write_text("1300\n")
    assert memory._left_in_group(tmp_path) == 0
    monkeypatch.setattr(memory, "_left_in_group", lambda: 5)
    assert memory.free_bytes(torch.device("cpu")) == 5


def test_a_non_finite_first_step_is_no_drift():
    model = glow().float()
    step = TrainStep(model, sgd(model), memory="invert")
    x = torch.rand(4, 3, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(RunError, match="the loss is nan"):
        step(x)
    step(x.nan_to_num())
    assert step.memory.drift < 1e-4
