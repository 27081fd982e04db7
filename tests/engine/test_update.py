"""Accumulation, the average of the parameters, layout: each against the step one would write by hand."""

import copy

import pytest
import torch
from stand_in_models import Affine
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastflow import flows
from fastflow.engine import NonFiniteError, TrainStep
from fastflow.engine.ema import EMA
from fastflow.engine.state import optimizer_state, restore_optimizer
from fastflow.vae import MLPVAE, VAE, conv_decoder, conv_encoder


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), 0.05, **options)


def glow(**options):
    model = flows.Glow((3, 8, 8), **{"n_levels": 2, "n_steps": 2, "hidden_channels": 8, **options})
    model.initialize(torch.rand(8, 3, 8, 8) - 0.5)
    return model


def same(a, b, **tolerance):
    torch.testing.assert_close([p.detach() for p in a.parameters()], [p.detach() for p in b.parameters()], **tolerance)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (5, 1, 3)])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.3}, {"check_finite": "late"}])
def test_accumulated_batches_update_as_one(sizes, options):
    one, many = Affine(), Affine()
    whole = TrainStep(one, adam(one, fused=True), **options)
    parts = TrainStep(many, adam(many, fused=True), accumulate=len(sizes), **options)
    for _ in range(3):
        x = torch.randn(sum(sizes), 1, 2, 2) * 3
        before = copy.deepcopy(many)
        for i, batch in enumerate(x.split(sizes)):
            loss = parts(batch)
            torch.testing.assert_close(loss, -before.log_prob(batch).mean().detach())
            assert ("grad_norm" in parts.parts) == (i == len(sizes) - 1)
        whole(x)
        torch.testing.assert_close(parts.parts["grad_norm"], whole.parts["grad_norm"])
        same(one, many)


@pytest.mark.parametrize("steps_before", [0, 1])
def test_accumulated_batches_of_a_model_made_float64_update_as_one(steps_before):
    """To that precision: 1/9 of float32 is off by 1e-8 of the gradient."""
    model = Affine()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.5), accumulate=3)
    x = torch.randn(9, 1, 2, 2)
    for _ in range(steps_before):
        for batch in x.chunk(3):
            step(batch)
    model.double()
    twin = copy.deepcopy(model)
    for batch in x.double().chunk(3):
        step(batch)
    TrainStep(twin, torch.optim.SGD(twin.parameters(), 0.5))(x.double())
    same(model, twin, rtol=1e-13, atol=1e-13)


def test_the_optimizer_runs_once_in_n_calls():
    model = Affine()
    optimizer = adam(model)
    step = TrainStep(model, optimizer, accumulate=4, ema_decay=0.5)
    for call in range(1, 10):
        step(torch.randn(2, 1, 2, 2))
        assert [s["step"].item() for s in optimizer.state.values()] == [call // 4] * (2 if call >= 4 else 0)


def test_the_average_follows_every_update():
    model = Affine()
    step = TrainStep(model, adam(model), ema_decay=0.75)
    expected = [p.detach().clone() for p in model.parameters()]
    for _ in range(4):
        step(torch.randn(5, 1, 2, 2))
        for average, p in zip(expected, model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.25)
    averages = step.ema.state_dict()
    assert list(averages) == ["shift", "log_scale"]
    torch.testing.assert_close(list(averages.values()), expected)


def test_the_average_swaps_in_and_out():
    model = Affine()
    step = TrainStep(model, adam(model), ema_decay=0.9)
    x = torch.randn(5, 1, 2, 2)
    for _ in range(3):
        step(x)
    own = [p.detach().clone() for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), step.ema.swapped_in():
        assert all(torch.equal(p, a) for p, a in zip(model.parameters(), step.ema.parameters.values(), strict=True))
        assert not torch.equal(model.shift, own[0])
        raise RuntimeError("inside")
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_the_average_is_saved_and_loaded():
    model, other = Affine(), Affine()
    step = TrainStep(model, adam(model), ema_decay=0.9)
    step(torch.randn(5, 1, 2, 2))
    ema = EMA(other, 0.9)
    ema.load_state_dict({name: t.clone() for name, t in step.ema.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters.values(), step.ema.parameters.values(), strict=True))
    ema.reset()
    assert torch.equal(ema.parameters["shift"], other.shift)
    with pytest.raises(ValueError, match="state: expected the names .* differs in log_scale"):
        ema.load_state_dict({"shift": other.shift.detach()})
    with pytest.raises(ValueError, match=r"state: shift: expected shape \(1, 2, 2\), got \(2,\)"):
        ema.load_state_dict({"shift": torch.zeros(2), "log_scale": torch.zeros(1, 2, 2)})


def test_frozen_parameters_are_not_averaged():
    model = Affine()
    model.shift.requires_grad_(False)
    assert list(EMA(model, 0.5).parameters) == ["log_scale"]


def test_parameters_that_are_unfrozen_later_are_averaged_from_then_on():
    model = Affine()
    model.shift.requires_grad_(False)
    ema = EMA(model, 0.5)
    ema.update()
    model.shift.requires_grad_(True)
    start = model.shift.detach().clone()
    ema.update()
    with torch.no_grad():
        model.shift += 1.0
    ema.update()
    torch.testing.assert_close(ema.parameters["shift"], start + 0.5)
    with ema.swapped_in():
        torch.testing.assert_close(model.shift.detach(), start + 0.5)


def test_state_of_one_number_loads_as_it_once_was():
    """Of shape (), where the parameter has (1,) now."""
    model = MLPVAE((3,), 2, (4,), likelihood="gaussian")
    step = TrainStep(model, adam(model), ema_decay=0.5)
    step(torch.rand(4, 3))
    tensors, plain = optimizer_state(step.optimizer)
    averages = {name: t.clone() for name, t in step.ema.state_dict().items()}
    index = [name for name, _ in model.named_parameters()].index("likelihood.log_sigma")
    old = {name: t[0] if name in (f"{index}.exp_avg", f"{index}.exp_avg_sq") else t for name, t in tensors.items()}
    other = copy.deepcopy(model)
    optimizer, ema = adam(other), EMA(other, 0.5)
    restore_optimizer(optimizer, old, plain)
    torch.testing.assert_close(optimizer_state(optimizer)[0], tensors, rtol=0, atol=0)
    ema.load_state_dict(averages | {"likelihood.log_sigma": averages["likelihood.log_sigma"][0]})
    torch.testing.assert_close(ema.state_dict(), averages, rtol=0, atol=0)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_average_follows_a_model_that_is_moved(warmup):
    model = Affine()
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.05), ema_decay=0.9, ema_warmup=warmup)
    step(torch.randn(4, 1, 2, 2))
    before = {name: average.double() for name, average in step.ema.parameters.items()}
    model.double()
    step(torch.randn(4, 1, 2, 2, dtype=torch.float64))
    decay = (1 + 2) / (warmup + 2) if warmup else 0.9  # after the second update
    for name, parameter in model.named_parameters():
        want = before[name].lerp(parameter.detach(), 1 - decay)
        torch.testing.assert_close(step.ema.parameters[name], want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"clip_grad_norm": 0.1}])
def test_a_group_that_is_added_to_the_optimizer_counts(options):
    model, twin, x = glow(), glow(), torch.rand(8, 3, 8, 8) - 0.5
    twin.load_state_dict(model.state_dict())
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[:5], lr=1e-3)
    step = TrainStep(model, optimizer, **options)
    optimizer.add_param_group({"params": parameters[5:]})
    for part in x.chunk(step.accumulate):
        step(part)
    (-twin.log_prob(x).mean()).backward()
    if "clip_grad_norm" in options:
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
    torch.optim.SGD(twin.parameters(), lr=1e-3).step()
    same(model, twin)
    parameters[-1].register_hook(lambda g: g * float("nan"))
    with pytest.raises(NonFiniteError):
        for part in x.chunk(step.accumulate):
            step(part)


def test_a_step_is_made_without_a_look_at_parametrized_weights():
    model = glow()
    for module in [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]:
        torch.nn.utils.parametrizations.spectral_norm(module)
    before = copy.deepcopy(model.state_dict())
    step = TrainStep(model, adam(model, fused=True))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert "layout: as it was (there are no 2-D convolutions with weights of their own)" in step.explain()


def test_convolution_weights_go_channels_last_and_so_do_their_gradients():
    model = glow()
    plain = copy.deepcopy(model)
    step = TrainStep(model, adam(model, fused=True))
    other = TrainStep(plain, adam(plain, fused=True), channels_last=False)
    assert "channels-last, the weights of 13 convolutions too" in step.explain()
    assert "layout: as it was (channels_last=False)" in other.explain()
    for _ in range(3):
        x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
        torch.manual_seed(1)
        loss = step(x)
        torch.manual_seed(1)
        torch.testing.assert_close(loss, other(x))
    same(model, plain, rtol=1e-3, atol=1e-4)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            for t in (module.weight, module.weight.grad):
                assert t.is_contiguous(memory_format=torch.channels_last)


def test_layout_is_left_alone_where_it_would_hurt():
    model = glow()
    optimizer = adam(model, fused=True)
    TrainStep(model, optimizer, channels_last=False)(torch.rand(2, 3, 8, 8))
    assert "layout: as it was (the optimizer has state" in TrainStep(model, optimizer).explain()
    with pytest.raises(ValueError, match="channels_last: can't be done, the optimizer has state"):
        TrainStep(model, optimizer, channels_last=True)
    vae = VAE(conv_encoder((1, 8, 8), 2, (4,)), conv_decoder(2, (1, 8, 8), (4,)))
    assert "layout: as it was (channels_last=True would" in TrainStep(vae, adam(vae)).explain()
    assert "layout: channels-last" in TrainStep(vae, adam(vae), channels_last=True).explain()
    model = Affine()
    assert "layout: as it was (there are no 2-D" in TrainStep(model, adam(model)).explain()


@pytest.mark.parametrize("make, words", [
    (lambda p: torch.optim.Adam(p, fused=True), "4 parameters, fused"),
    (lambda p: torch.optim.AdamW(p), "not fused: make it with fused=True"),
    (lambda p: torch.optim.SGD(p, 0.1), "not fused: make it with fused=True"),
    (lambda p: torch.optim.RMSprop(p), "not fused: torch has no fused kernel for it"),
])
def test_explain_says_whether_the_optimizer_is_fused(make, words):
    model = Affine((1, 1, 2))
    assert words in TrainStep(model, make(model.parameters())).explain()


@pytest.mark.parametrize("arguments, kind, message", [
    ({"accumulate": 0}, ValueError, "accumulate: expected an int >= 1, got 0"),
    ({"accumulate": True}, TypeError, "accumulate: expected an int, got bool"),
    ({"ema_decay": 1.0}, ValueError, "ema_decay: expected a number in"),
    ({"ema_decay": float("nan")}, ValueError, "ema_decay: "),
    ({"check_finite": "never"}, ValueError, "check_finite: expected True, False or 'late'"),
    ({"conditioner_dtype": torch.float64}, ValueError, "conditioner_dtype: expected torch.bfloat16 or None"),
    ({"conditioner_dtype": torch.bfloat16}, ValueError, "conditioner_dtype: expected None for Affine"),
    ({"compile": 3}, TypeError, "compile: expected a bool or the name of a backend, got int"),
])
def test_arguments_that_cannot_be_are_named(arguments, kind, message):
    model = Affine()
    with pytest.raises(kind, match=message):
        TrainStep(model, adam(model), **arguments)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_the_optimizer_takes_its_own_steps(kind):
    """Bit for bit, with hooks, a scheduler, the profiler or an optimizer of the user's own, which are all heard."""
    one, many = Affine(), Affine()
    by_hand, optimizer, x = kind(many.parameters(), 0.05), kind(one.parameters(), 0.05), torch.randn(6, 1, 2, 2)
    step, heard = TrainStep(one, optimizer), []

    def both():
        by_hand.zero_grad()
        (-many.log_prob(x).mean()).backward()
        by_hand.step()
        step(x)
        for p, q in zip(one.parameters(), many.parameters(), strict=True):
            assert torch.equal(p, q)

    both()
    handle = optimizer.register_step_post_hook(lambda *_: heard.append("hook"))
    both()
    handle.remove()
    both()
    handle = register_optimizer_step_pre_hook(
        lambda this, *_: heard.append("global") if this is optimizer else None)
    both()
    handle.remove()
    assert heard == ["hook", "global"]
    with torch.profiler.profile() as seen:
        both()
    name = f"Optimizer.step#{kind.__name__}.step"
    assert sum(event.count for event in seen.key_averages() if event.key == name) == 2
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    both()
    assert optimizer._opt_called


def test_an_optimizer_with_its_own_methods_is_asked():
    class Own(torch.optim.SGD):
        calls = []

        def step(self, closure=None):
            self.calls.append("step")
            return super().step(closure)

        def zero_grad(self, set_to_none=True):
            self.calls.append("zero_grad")
            super().zero_grad(set_to_none)

    model = Affine()
    step = TrainStep(model, Own(model.parameters(), 0.1))
    step(torch.randn(3, 1, 2, 2))
    assert Own.calls == ["zero_grad", "step"]
