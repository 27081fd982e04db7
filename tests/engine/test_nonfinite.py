"""Losses and gradients that are not finite: nothing changes, and the message says where they came from."""

import copy

import pytest
import torch
from stand_in_models import Affine
from torch import nn

from fastflow import flows
from fastflow.engine import NonFiniteError, TrainStep

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.05, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
}


class Kink(Affine):
    """A finite loss, whose gradient is not finite where x has an element of exactly 7."""

    def forward(self, x, context=None):
        return super().forward(x) + ((x - 7 + self.shift * 0).abs().sqrt() * 0).flatten(1).sum(1)


def state_of(model, optimizer, step):
    state = [t.clone() for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [p.detach().clone() for p in model.parameters()] + state + [t.clone() for t in step.ema.parameters.values()]


def poisoned(value=float("nan")):
    x = torch.randn(5, 1, 2, 2)
    x[2, 0, 1, 1] = value
    return x


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model, x", [(Affine, poisoned()), (Affine, poisoned(float("inf"))), (Kink, poisoned(7.0))])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_late_the_device_skips_and_the_next_call_says_so(name, model, x, clip):
    model = model()
    optimizer = OPTIMIZERS[name](model.parameters())
    step = TrainStep(model, optimizer, check_finite="late", ema_decay=0.9, clip_grad_norm=clip)
    good = torch.randn(5, 1, 2, 2)
    for _ in range(2):
        step(good)
    before = state_of(model, optimizer, step)
    loss = step(x)  # says nothing yet
    assert torch.isfinite(loss) == isinstance(model, Kink)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer, step), strict=True))
    with pytest.raises(NonFiniteError, match="the update was skipped"):
        step(good)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer, step), strict=True))
    step(good)
    step.check()
    assert not any(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer, step), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_the_batch_had_not_been(name):
    batches = [torch.randn(5, 1, 2, 2) for _ in range(6)]
    runs = []
    for bad in (None, 1, 3):  # 1: the first update after the one that the host checks
        model = Affine()
        step = TrainStep(model, OPTIMIZERS[name](model.parameters()), check_finite="late", ema_decay=0.5)
        for i, batch in enumerate(batches):
            if i == bad:
                step(poisoned())
                with pytest.raises(NonFiniteError):
                    step.check()
                step.check()
            step(batch)
        runs.append([*model.parameters(), *step.ema.parameters.values()])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_the_very_first_update_is_checked_at_once():
    model = Affine()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step = TrainStep(model, optimizer, check_finite="late")
    with pytest.raises(NonFiniteError, match="the loss is nan; the step was not taken"):
        step(poisoned())
    assert not optimizer.state and all((p == 0).all() for p in model.parameters())
    step(torch.randn(5, 1, 2, 2))
    step(poisoned())
    with pytest.raises(NonFiniteError, match="the update was skipped"):
        step.check()


@pytest.mark.parametrize("check", [True, "late"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_bad_batch_of_an_accumulation_drops_the_update(check, bad):
    model = Affine()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step = TrainStep(model, optimizer, accumulate=3, check_finite=check, ema_decay=0.9)
    good = [torch.randn(2, 1, 2, 2) for _ in range(3)]
    for x in good:
        step(x)
    before = state_of(model, optimizer, step)
    with pytest.raises(NonFiniteError, match="the batch's x is not finite"):
        for i in range(4):
            step(poisoned() if i == bad else good[0])
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(model, optimizer, step), strict=True))
    twin = copy.deepcopy(model)
    other = OPTIMIZERS["adam"](twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for x in good:  # the next three are a whole update again
        step(x)
    TrainStep(twin, other)(torch.cat(good))
    torch.testing.assert_close([p.detach() for p in model.parameters()], [p.detach() for p in twin.parameters()])


class Overflow(nn.Module):
    """A conditioner that overflows for inputs above a bound."""

    def __init__(self, net):
        super().__init__()
        self.net, self.bound = net, 3.0

    def forward(self, x, context=None):
        return self.net(x) / (x.abs().amax() < self.bound)


def glow():
    model = flows.Glow((1, 8, 8), n_levels=2, n_steps=2, hidden_channels=4)
    coupling = model.transform.levels[1].steps[0].coupling
    coupling.conditioner = Overflow(coupling.conditioner)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("check", [True, "late"])
def test_the_first_module_is_named(check):
    model = glow()
    step = TrainStep(model, OPTIMIZERS["adam"](model.parameters()), check_finite=check)
    x = torch.rand(4, 1, 8, 8) - 0.5
    step(x)
    name = "transform.levels.1.steps.0.coupling.conditioner"
    with pytest.raises(NonFiniteError, match=f"module '{name}' was the first with an output that") as caught:
        step(x * 100)
        step.check()
    assert caught.value.module == name
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.isfinite(step(x))
    step.check()


def test_an_invertible_convolution_is_named():
    model = glow()
    step = TrainStep(model, OPTIMIZERS["adam"](model.parameters()))
    with torch.no_grad():
        model.transform.levels[0].steps[1].conv.weight.mul_(100)
        model.transform.levels[0].steps[1].conv.actnorm.bias.fill_(3e38)
    with pytest.raises(NonFiniteError) as caught:
        step(torch.rand(4, 1, 8, 8) - 0.5)
    assert caught.value.module == "transform.levels.0.steps.1.conv"
    assert not any("apply_factors" in vars(module) for module in model.modules())


@pytest.mark.parametrize("make, x, words, module", [
    (Affine, poisoned(), "the batch's x is not finite", None),
    (Kink, poisoned(7.0), "outputs are finite, the gradient of shift is not", None),
])
def test_what_is_no_module_is_named_too(make, x, words, module):
    model = make()
    with pytest.raises(NonFiniteError, match=words) as caught:
        TrainStep(model, OPTIMIZERS["sgd"](model.parameters()))(x)
    assert caught.value.module is module


def test_a_parameter_is_named():
    model = Affine()
    with torch.no_grad():
        model.log_scale[0, 0, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="the parameter log_scale is not finite"):
        TrainStep(model, OPTIMIZERS["sgd"](model.parameters()))(torch.randn(2, 1, 2, 2))


class Unlucky(nn.Module):
    """Fails for one noise in a hundred or so."""

    def forward(self, x):
        return x / (torch.rand(()) > 0.01)


class Noisy(Affine):
    def __init__(self):
        super().__init__()
        self.unlucky = Unlucky()

    def forward(self, x, context=None):
        return self.unlucky(super().forward(x))


@pytest.mark.parametrize("check", [True, "late"])
def test_the_replay_has_the_noise_of_the_step(check):
    """Found again only with the generator where it was: another noise would be fine."""
    model = Noisy()
    step = TrainStep(model, OPTIMIZERS["sgd"](model.parameters()), check_finite=check)
    x = torch.randint(256, (3, 1, 2, 2), dtype=torch.uint8)
    with pytest.raises(NonFiniteError) as caught:
        for _ in range(5000):
            step(x)
    assert caught.value.module == "unlucky"
    bad = poisoned()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with pytest.raises(NonFiniteError):
        step(bad)
        step.check()
    assert torch.equal(torch.rand(2), expected[1:])  # one draw by the step; the diagnosis leaves no trace


def test_off_it_looks_at_nothing():
    model = Affine()
    step = TrainStep(model, OPTIMIZERS["sgd"](model.parameters()), check_finite=False)
    step(poisoned())
    assert torch.isnan(model.shift).any() and step.parts == {} and "not looked for" in step.explain()


def test_late_needs_an_optimizer_that_can_skip():
    model = Affine()
    with pytest.raises(ValueError, match="check_finite: 'late' needs .* make the Adam with fused=True"):
        TrainStep(model, torch.optim.Adam(model.parameters()), check_finite="late")
    step = TrainStep(model, OPTIMIZERS["adam"](model.parameters()), check_finite="late")
    assert "skipped on the device, the next call says so" in step.explain()
