"""Captured steps on a CPU: a stand-in for the recorder runs what would be in the graph, on the same static buffers.
test_capture_gpu.py shows the same things of CUDA graphs."""

import contextlib
import copy

import pytest
import torch
from captured_steps import adam, glow, pair
from stand_in_models import Affine
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import flows
from fastflow.engine import NonFiniteError, TrainStep, capture
from fastflow.vae import (
    FSQVAE,
    MLPVAE,
    VAE,
    CategoricalLikelihood,
    DiscreteVAE,
    GaussianLikelihood,
    PenalizedELBO,
    Task,
    mlp_decoder,
    mlp_encoder,
)


class StandIn:
    """Records by keeping the body. Like a graph it runs on the tensors that it was recorded with, refreshes the outputs
    in place, and holds what Python saw at recording: here, that nothing but ``body`` runs in a replay."""

    def __init__(self, device):
        self.device, self.asides, self.recordings, self.replays = device, 0, 0, 0

    @contextlib.contextmanager
    def aside(self):
        self.asides += 1
        yield

    def forget(self):
        pass

    def record(self, body):
        self.recordings += 1
        generator = torch.get_rng_state()  # capturing runs nothing
        outputs = None

        def replay():
            nonlocal outputs
            self.replays += 1
            fresh = body()
            if outputs is None:
                outputs = fresh
            _refresh(outputs, fresh)

        held = _Later(lambda: outputs)
        torch.set_rng_state(generator)
        return replay, held


class _Later:
    """The outputs of a recording, which exist from the first replay on."""

    def __init__(self, get):
        self.get = get


def _refresh(old, new):
    for a, b in zip(_flat(old), _flat(new), strict=True):
        a.copy_(b)


def _flat(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, dict) else outputs or ()
    return [t for value in values for t in _flat(value)]


@pytest.fixture
def recorder(monkeypatch):
    """The stand-ins that were made, last first."""
    made = []
    copied = capture._copied

    def make(device):
        made.insert(0, StandIn(device))
        return made[0]

    monkeypatch.setattr(capture, "recorder_for", make)
    monkeypatch.setattr(capture, "_copied", lambda o: copied(o.get() if isinstance(o, _Later) else o))
    return made


def same(captured, eager):
    torch.testing.assert_close([p.detach() for p in captured.model.parameters()],
                               [p.detach() for p in eager.model.parameters()])


@pytest.mark.parametrize("options", [
    {}, {"clip_grad_norm": 0.5, "ema_decay": 0.9}, {"check_finite": False}, {"accumulate": 3, "ema_decay": 0.5},
    {"conditioner_dtype": torch.bfloat16}])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_twenty_steps_equal_twenty_eager_ones(recorder, options, optimizer):
    make = {"adam": adam, "sgd": lambda m: torch.optim.SGD(m.parameters(), 1e-4, momentum=0.9, fused=True)}[optimizer]
    captured, eager = pair(options, glow, make)
    for i in range(20):
        x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        losses = []
        for step in (captured, eager):
            torch.manual_seed(i)
            losses.append(step(x))
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(captured.parts, eager.parts)
    same(captured, eager)
    if captured.ema is not None:
        torch.testing.assert_close(captured.ema.parameters, eager.ema.parameters)
    graphs = 2 if captured.accumulate > 1 else 1
    assert recorder[0].recordings == graphs and f"capture: {graphs} graphs recorded" in captured.explain()
    assert captured.capture and "capture: off (the model is on cpu)" in eager.explain()


def test_buffers_come_back_on_the_devices_word(recorder):
    """A moving average is copied before a replay and put back inside it."""
    class Normalized(Affine):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x, context=None):
            return super().forward(self.norm(x))

    for parts in (1, 2):
        captured, eager = pair({"accumulate": parts}, Normalized)
        for i in range(9):
            x = torch.randn(5, 1, 2, 2)
            if i in (1, 5, 7):
                with pytest.raises(NonFiniteError):
                    for _ in range(parts):
                        captured(x * float("nan"))
                    captured.check()
            for _ in range(parts):
                captured(x)
                eager(x)
        captured.check()
        assert recorder[0].replays
        torch.testing.assert_close(captured.model.state_dict(), eager.model.state_dict())


def test_a_vae_and_its_parts(recorder):
    captured, eager = pair(make=lambda: VAE(mlp_encoder((1, 4, 4), 3, (8,)), mlp_decoder(3, (1, 4, 4), (8,))))
    for i in range(6):
        x = torch.rand(5, 1, 4, 4)
        for step in (captured, eager):
            torch.manual_seed(i)
            step(x)
        assert captured.parts.keys() == {"rate", "distortion", "grad_norm"}
        torch.testing.assert_close(captured.parts, eager.parts)


def test_a_context_is_an_input_of_the_graph(recorder):
    captured, eager = pair()
    for _ in range(6):
        x, context = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
        torch.testing.assert_close(captured(x, context), eager(x, context))
    torch.testing.assert_close(captured(x), eager(x))
    same(captured, eager)


def test_targets_are_inputs_of_the_graph(recorder):
    """A dict of them, whose order may change, and one set of buffers for each combination that is given."""
    heads = (Task(nn.Linear(2, 3), CategoricalLikelihood(3), name="class"),
             Task(nn.Linear(2, 1), GaussianLikelihood(0.5), name="size"))
    captured, eager = pair(make=lambda: MLPVAE((1, 2, 2), 2, (4,), objective=PenalizedELBO(*heads)))
    for i in range(6):
        x, classes, sizes = torch.rand(5, 1, 2, 2).round(), torch.randint(3, (5,)), torch.randn(5, 1)
        targets = {"class": classes, "size": sizes} if i % 2 else {"size": sizes, "class": classes}
        losses = []
        for step in (captured, eager):
            torch.manual_seed(i)
            losses.append(step(x, targets=targets))
        torch.testing.assert_close(*losses)
    same(captured, eager)
    assert recorder[0].recordings == 1


def test_losses_that_were_returned_stay_as_they_were(recorder):
    captured, _ = pair()
    losses = [captured(torch.randn(5, 1, 2, 2) * i) for i in range(1, 8)]
    kept = [loss.item() for loss in losses]
    captured(torch.randn(5, 1, 2, 2))
    assert len(set(kept)) == 7 and kept == [loss.item() for loss in losses]
    assert recorder[0].replays == 5  # the first call is checked by the host, two warm up


def test_each_shape_has_its_graph_up_to_a_bound(recorder):
    captured, eager = pair()
    for _ in range(4):
        for batch in (2, 3, 4, 5, 6):
            x = torch.randn(batch, 1, 2, 2)
            torch.testing.assert_close(captured(x), eager(x))
    same(captured, eager)
    assert recorder[0].recordings == capture.MAX_SHAPES == 4
    assert captured._steps.eager == 8 + 3  # two calls of each of four shapes, all of the fifth but the very first


def test_the_learning_rate_may_be_scheduled_or_set(recorder):
    captured, eager = pair()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.7) for step in (captured, eager)]
    for i in range(12):
        x = torch.randn(5, 1, 2, 2)
        for step in (captured, eager):
            if i in (5, 7):
                step.optimizer.param_groups[0]["lr"] = 0.3 / i  # as a warm-up written by hand does
            step(x)
        for scheduler in schedulers:
            scheduler.step()
    same(captured, eager)
    assert recorder[0].recordings == 1


def test_other_hyperparameters_and_loaded_states_are_recorded_anew(recorder):
    captured, eager = pair()
    x = torch.randn(5, 1, 2, 2)

    def run(n):
        for _ in range(n):
            captured(x), eager(x)

    run(5)
    for step in (captured, eager):
        step.optimizer.param_groups[0]["betas"] = (0.5, 0.9)
    run(5)
    assert recorder[0].recordings == 2
    for step in (captured, eager):
        step.optimizer.load_state_dict(copy.deepcopy(eager.optimizer.state_dict()))
    run(5)
    assert recorder[0].recordings == 3 and captured.optimizer.param_groups[0]["capturable"]
    assert isinstance(captured.optimizer.param_groups[0]["lr"], torch.Tensor)
    same(captured, eager)


def test_gradients_thrown_away_between_calls_are_put_back(recorder):
    captured, eager = pair({"accumulate": 2})
    for _ in range(6):
        captured.optimizer.zero_grad(set_to_none=True)
        for step in (captured, eager):
            torch.manual_seed(0)
            step(torch.randn(5, 1, 2, 2)), step(torch.randn(4, 1, 2, 2))
    same(captured, eager)


def test_calls_without_a_graph_add_to_the_gradients_that_graphs_add_to(recorder):
    """Those that warm up a further shape, and those beyond the shapes that are recorded, after gradients were thrown
    away; a graph knows no other tensors than those that it was recorded with."""
    captured, eager = pair({"accumulate": 2})

    def run(*sizes):
        captured.optimizer.zero_grad(set_to_none=True)
        for step in (captured, eager):
            torch.manual_seed(0)
            for size in sizes:
                step(torch.randn(size, 1, 2, 2))

    for _ in range(4):
        run(5, 4)
    gradients = [p.grad for p in captured.model.parameters()]
    for sizes in ((3, 4), (5, 3), (6, 4), (7, 4), (8, 4), (9, 4), (10, 4), (5, 10), (11, 12), (5, 4)):
        run(*sizes)
        assert all(p.grad is g for p, g in zip(captured.model.parameters(), gradients, strict=True)), sizes
        same(captured, eager)
    assert len(captured._steps.shapes) == 2 * capture.MAX_SHAPES  # and those of 10 to 12 ran beside them


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_not_finite_is_skipped_and_named(recorder, accumulate):
    captured, eager = pair({"accumulate": accumulate, "ema_decay": 0.9})
    x = torch.randn(5, 1, 2, 2)
    for i in range(8):
        if i in (2, 6):  # while warming up, and in the graph
            bad = x.clone()
            bad[1] = float("nan")
            for _ in range(accumulate):
                captured(bad)
            with pytest.raises(NonFiniteError, match="the update was skipped: the batch's x is not finite"):
                captured(x)
        for _ in range(accumulate):
            captured(x), eager(x)
    same(captured, eager)
    torch.testing.assert_close(captured.ema.parameters, eager.ema.parameters)


@pytest.mark.parametrize("optimizer, check, message", [
    (lambda p: torch.optim.Adam(p), True, "capture: this Adam can't skip .* make it with fused=True, or set check_"),
    (lambda p: torch.optim.RMSprop(p), False, "capture: this RMSprop can't be captured; make it with fused=True or"),
])
def test_optimizers_that_cannot_be_captured(recorder, optimizer, check, message):
    model = Affine()
    with pytest.raises(ValueError, match=message):
        TrainStep(model, optimizer(model.parameters()), capture=True, check_finite=check)


@pytest.mark.parametrize("make, message", [
    (lambda: flows.ResidualFlow(9, n_layers=1), r"transform\.transforms\.1 \(InvertibleResidual\), because it draws"),
    (lambda: flows.ResidualFlowImage((3, 4, 4), 1, 1, 4), r"\(InvertibleResidual\), because it draws on the host"),
    (lambda: flows.FFJORD(3, hidden=(4,), method="rk4"), r"transform \(ContinuousTransform\), because its solver"),
    (lambda: flows.FFJORDImage((3, 4, 4), 1, 1, (4,)), r"\(ContinuousTransform\), because its solver reads"),
])
def test_models_that_the_host_must_follow_are_refused(recorder, make, message):
    if "Continuous" in message:
        pytest.importorskip("torchdiffeq")
    model = make()
    with pytest.raises(ValueError, match=f"capture: can't record .*{message}.*; use False"):
        TrainStep(model, adam(model), capture=True)


def test_a_residual_flow_of_exact_determinants_is_none_of_them(recorder):
    model = flows.ResidualFlow(8, n_layers=1)
    TrainStep(model, adam(model), capture=True)


class FromHost(TorchDispatchMode):
    """Refuses tensors of numbers that the host has, whose copy to a device can't be recorded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [
    lambda: FSQVAE((1, 8, 8), (4, 3), (8, 8)),
    lambda: DiscreteVAE(mlp_encoder((1, 8, 8), 3, (8,)), mlp_decoder(6, (1, 8, 8), (8,)), 6, estimator="enumeration"),
    lambda: DiscreteVAE(mlp_encoder((1, 8, 8), 3, (8,)), mlp_decoder(6, (1, 8, 8), (8,)), 2, n_classes=3,
                        estimator="enumeration"),
])
def test_a_step_copies_no_numbers_from_the_host(make):
    model, x = make(), torch.rand(4, 1, 8, 8)
    step = TrainStep(model, adam(model), check_finite=False)
    step(x)
    with FromHost():
        step(x)


def test_capturable_without_fused_needs_no_check(recorder):
    model = Affine()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1, fused=True), capture=True, check_finite=False)
    assert "not looked for" in step.explain()


def test_a_model_on_the_cpu_is_refused():
    model = Affine()
    with pytest.raises(ValueError, match="capture: expected a model on a CUDA device, this one is on cpu"):
        TrainStep(model, adam(model), capture=True)


def test_a_graph_from_before_is_named(recorder):
    """Its nodes belong to another stream, on which a captured backward would wait."""
    model = glow()
    kept = model(torch.rand(4, 3, 8, 8) - 0.5)
    step = TrainStep(model, adam(model), capture=True, check_finite=False)
    x = torch.rand(4, 3, 8, 8) - 0.5
    with pytest.raises(RuntimeError, match="capture: parameter 0 of the optimizer is part of an autograd graph from"):
        step(x)
    del kept
    step(x)


def test_a_step_with_a_probe_leaves_no_graph_behind():
    """The probe of memory="auto" runs the model's forward without its backward."""
    model = glow()
    TrainStep(model, adam(model))(torch.rand(4, 3, 8, 8) - 0.5)
    assert capture.held(list(model.parameters())) is None
