"""Copies of a TrainStep, by copy.deepcopy and pickle, go on as the step itself does."""

import copy
import pickle

import pytest
import torch

from fastflow import flows
from fastflow.engine import NonFiniteError, TrainStep


def step_of(optimizer, **options):
    torch.manual_seed(0)
    model = flows.RealNVP(4, n_layers=2, hidden=(8,))
    return TrainStep(model, optimizer(model.parameters()), **options)


def same(one, other):
    return all(map(torch.equal, one.model.parameters(), other.model.parameters()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))],
                         ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_a_copy_counts_its_updates_on(copied, kind):
    """Adam's bias correction, 1 - beta^n, is of n updates in both."""
    step, x = step_of(lambda parameters: kind(parameters, 1e-2, fused=True)), torch.randn(16, 4)
    for _ in range(3):
        step(x)
    other = copied(step)
    for _ in range(3):
        step(x)
        other(x)
    assert {float(state["step"]) for state in other.optimizer.state.values()} == {6.0} and same(step, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda step: pickle.loads(pickle.dumps(step))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_amid_an_accumulated_update_has_what_was_accumulated(copied):
    step = step_of(lambda parameters: torch.optim.SGD(parameters, 0.1), accumulate=2)
    x = torch.randn(7, 4)
    step(x[:4])
    other, dropped = copied(step), copied(step)
    with pytest.raises(NonFiniteError):
        dropped(x[4:] * float("nan"))
    for one in (step, other):
        one(x[4:])
    whole = step_of(lambda parameters: torch.optim.SGD(parameters, 0.1))
    assert not same(step, whole) and same(dropped, whole)
    whole(x)
    assert same(step, other)
    torch.testing.assert_close(list(other.model.parameters()), list(whole.model.parameters()))
