"""FusedAdam against torch's own step: the same bits, and hands off what it does not cover."""

import copy

import pytest
import torch
from stand_in_models import Affine

from fastflow.engine import TrainStep, adam

ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


def parameters(*sizes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in sizes]


def twin(ours, kind, **options):
    """Copies of the parameters, and an optimizer of each; ``options`` may hold groups."""
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    return theirs, kind(ours, fused=True, **options), kind(theirs, fused=True, **options)


def gradients(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert state.keys() == b["state"][index].keys()
        for key, value in state.items():
            assert torch.equal(value, b["state"][index][key]), (index, key)


def step_both(fused, ours, theirs, mine, other):
    gradients(ours, theirs)
    with torch.no_grad():
        done = fused.step(mine)
    if not done:
        mine.step()
    other.step()
    same(mine, other)
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    return done


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "options"), [(ADAM, {}), (ADAM, {"weight_decay": 0.1, "maximize": True}),
                                               (ADAMW, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3})])
def test_the_same_bits_as_torch(kind, options, dtype):
    ours = parameters((7, 5), 3, (), (2, 0), (4, 3, 2), dtype=dtype)
    theirs, mine, other = twin(ours, kind, **options)
    fused = adam.FusedAdam()
    done = [step_both(fused, ours, theirs, mine, other) for _ in range(4)]
    assert done == [False, True, True, True]  # the first step of all makes the state
    for optimizer in (mine, other):
        optimizer.param_groups[0]["lr"] *= 0.1
        optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    assert step_both(fused, ours, theirs, mine, other)


def test_states_and_groups_that_change_count_at_once():
    ours = parameters(4, (3, 2))
    theirs, mine, other = twin(ours, ADAM)
    fused = adam.FusedAdam()
    for _ in range(3):
        step_both(fused, ours, theirs, mine, other)
    saved = copy.deepcopy(mine.state_dict())
    assert step_both(fused, ours, theirs, mine, other)
    mine.load_state_dict(copy.deepcopy(saved))
    other.load_state_dict(copy.deepcopy(saved))
    assert step_both(fused, ours, theirs, mine, other)
    assert saved["state"][0]["step"] == 3  # what was saved is not written on
    new, twins = parameters(5), parameters(5)
    twins[0].data.copy_(new[0].data)
    for optimizer, added in ((mine, new), (other, twins)):
        optimizer.add_param_group({"params": added, "lr": 0.5, "weight_decay": 0.2})
    assert not step_both(fused, ours + new, theirs + twins, mine, other)
    assert step_both(fused, ours + new, theirs + twins, mine, other)
    assert sorted({s["step"].item() for s in mine.state.values()}) == [2, 6]


def test_a_parameter_without_gradient_stays():
    ours = parameters(4, 3)
    theirs, mine, other = twin(ours, ADAM)
    fused = adam.FusedAdam()
    for _ in range(2):
        step_both(fused, ours, theirs, mine, other)
    gradients(ours, theirs)
    ours[1].grad = theirs[1].grad = None
    assert not fused.step(mine)
    mine.step()
    other.step()
    same(mine, other)
    assert step_both(fused, ours, theirs, mine, other)


@pytest.mark.parametrize("options", [{"fused": False}, {"amsgrad": True}, {"lr": torch.tensor(0.1)}])
def test_hands_off(options):
    ours = parameters(4)
    mine = ADAM(ours, **{"fused": True, **options})
    before = ours[0].detach().clone()
    fused = adam.FusedAdam()
    for _ in range(2):
        ours[0].grad = torch.randn(4)
        assert not fused.step(mine)
        assert torch.equal(ours[0], before)
        mine.step()
        before = ours[0].detach().clone()


def test_subclasses_and_scalers_are_asked():
    class Mine(ADAM):
        pass

    ours = parameters(4)
    for optimizer, attribute in ((Mine(ours, fused=True), None), (ADAM(ours, fused=True), "grad_scale")):
        ours[0].grad = torch.randn(4)
        optimizer.step()
        if attribute:
            setattr(optimizer, attribute, None)
        assert not adam.FusedAdam().step(optimizer)


def test_train_step_takes_it(monkeypatch):
    took = []
    step_of = adam.FusedAdam.step
    monkeypatch.setattr(adam.FusedAdam, "step", lambda *a: took.append(step_of(*a)) or took[-1])
    model = Affine()
    step = TrainStep(model, ADAM(model.parameters(), fused=True))
    for _ in range(3):
        step(torch.randn(8, 1, 2, 2))
    assert took == [False, True, True]
