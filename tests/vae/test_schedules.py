"""Schedules: exact values, units, state."""

import math

import pytest
import torch

from fastflow.vae import CosineSchedule, CyclicalSchedule, LinearSchedule, SigmoidSchedule


def values(schedule, times):
    return [schedule.at(t) for t in times]


def test_linear():
    assert values(LinearSchedule(0.5, 2.5, 4, begin=2), (0, 2, 3, 4, 5, 6, 99)) == [0.5, 0.5, 1, 1.5, 2, 2.5, 2.5]
    assert values(LinearSchedule(1.0, 0.0, 4), (0, 1, 4)) == [1.0, 0.75, 0.0]


def test_cosine():
    schedule = CosineSchedule(1, 3, 6)
    for t, expected in ((0, 1), (1, 2 - math.sqrt(3) / 2), (2, 1.5), (3, 2), (4, 2.5), (6, 3), (7, 3)):
        assert math.isclose(schedule.at(t), expected, rel_tol=1e-15)


def test_sigmoid():
    schedule = SigmoidSchedule(0, 1, 10, steepness=6)

    def logistic(t):
        return 1 / (1 + math.exp(-6 * (t / 10 - 0.5)))

    for t in range(11):
        assert math.isclose(schedule.at(t), (logistic(t) - logistic(0)) / (logistic(10) - logistic(0)), abs_tol=1e-15)
    assert schedule.at(0) == 0 and schedule.at(5) == 0.5 and schedule.at(10) == schedule.at(11) == 1


def test_cyclical():
    schedule = CyclicalSchedule(0, 1, 8, begin=1, cycles=2, ratio=0.5)
    assert values(schedule, range(9)) == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert values(schedule, range(9, 17)) == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert values(schedule, (17, 18, 25, 1000)) == [1, 1, 1, 1]
    assert CyclicalSchedule(0, 1, 8, cycles=None).at(8_000_002) == 0.5


@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_units_and_state(unit):
    schedule = LinearSchedule(0, 1, 10, unit=unit)
    schedule.step(3)
    schedule.epoch()
    assert schedule.value == float(schedule) == (0.3 if unit == "step" else 0.1)
    resumed = LinearSchedule(0, 1, 10, unit=unit)
    follower = resumed.tensor()
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.value == schedule.value and follower == torch.tensor(schedule.value)


def test_tensor_follows_in_place():
    schedule = CosineSchedule(0, 4, 4)
    beta = schedule.tensor(dtype=torch.float64)
    before = beta.data_ptr()
    for expected in (schedule.at(1), 2.0, schedule.at(3), 4.0, 4.0):
        schedule.step()
        assert math.isclose(beta.item(), expected, rel_tol=1e-15)
    assert beta.data_ptr() == before


def test_every_tensor_follows():
    schedule = LinearSchedule(0, 1, 10, unit="epoch")
    single, double = schedule.tensor(), schedule.tensor(dtype=torch.float64)
    assert schedule.tensor() is single and schedule.tensor(dtype=torch.float64) is double
    schedule.seek(700, 3)
    assert schedule.count == 3 and single.item() == pytest.approx(0.3) and double.item() == 0.3


@pytest.mark.parametrize(("call", "message"), [
    (lambda: LinearSchedule(length=0), "length"),
    (lambda: LinearSchedule(end=math.inf), "end"),
    (lambda: LinearSchedule(begin=-1), "begin"),
    (lambda: LinearSchedule(unit="batch"), "unit"),
    (lambda: SigmoidSchedule(steepness=0), "steepness"),
    (lambda: CyclicalSchedule(cycles=0), "cycles"),
    (lambda: CyclicalSchedule(ratio=0), "ratio"),
    (lambda: LinearSchedule().step(-1), "n:"),
    (lambda: LinearSchedule().seek(-5, 0), "steps"),
    (lambda: LinearSchedule().load_state_dict({"count": -3}), "count"),
    (lambda: LinearSchedule(length=True), "length"),
    (lambda: LinearSchedule(begin="a"), "begin"),
    (lambda: LinearSchedule("a", 1, 3), "^start: expected a number, got str"),
    (lambda: LinearSchedule(0, None, 3), "^end: expected a number, got NoneType"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
