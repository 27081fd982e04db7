"""Estimators by name."""

from fastflow import checks
from fastflow.estimators.antithetic import ARM, DisARM
from fastflow.estimators.base import Estimator
from fastflow.estimators.control import REBAR, RELAX
from fastflow.estimators.enumeration import Enumeration
from fastflow.estimators.relaxed import GumbelSoftmax, StraightThrough
from fastflow.estimators.score import NVIL, REINFORCE, RLOO, VIMCO, MovingAverage, NeuralBaseline, baseline_network
from fastflow.estimators.unordered import UnorderedSet

__all__ = ["ESTIMATORS", "create"]

ESTIMATORS = {
    "enumeration": lambda shape: Enumeration(),
    "reinforce": lambda shape: REINFORCE(),
    "moving-average": lambda shape: MovingAverage(),
    "neural-baseline": lambda shape: NeuralBaseline(baseline_network(shape)),
    "nvil": lambda shape: NVIL(baseline_network(shape)),
    "rloo": lambda shape: RLOO(),
    "vimco": lambda shape: VIMCO(),
    "gumbel-softmax": lambda shape: GumbelSoftmax(),
    "straight-through": lambda shape: StraightThrough(),
    "straight-through-gumbel": lambda shape: GumbelSoftmax(hard=True),
    "rebar": lambda shape: REBAR(),
    "relax": lambda shape: RELAX(baseline_network(shape)),
    "arm": lambda shape: ARM(),
    "disarm": lambda shape: DisARM(),
    "unordered-set": lambda shape: UnorderedSet(),
}


def create(estimator, event_shape):
    """The estimator of that name, its networks if any for logits (B, *event_shape); an Estimator as it is."""
    if isinstance(estimator, Estimator):
        return estimator
    if not isinstance(estimator, str):
        raise TypeError(f"estimator: expected a name or an Estimator, got {type(estimator).__name__}")
    checks.choice("estimator", estimator, tuple(ESTIMATORS))
    return ESTIMATORS[estimator](tuple(event_shape))
