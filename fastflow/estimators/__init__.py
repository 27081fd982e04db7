"""Gradients of expectations over discrete latents, what they cost in bias and variance, and bounds on mutual
information."""

from fastflow.estimators.antithetic import ARM, DisARM
from fastflow.estimators.base import Estimate, Estimator
from fastflow.estimators.control import REBAR, RELAX
from fastflow.estimators.enumeration import Enumeration, exact
from fastflow.estimators.latents import Bernoulli, Categorical
from fastflow.estimators.measure import Measurement, measure
from fastflow.estimators.mutual_information import (
    barber_agakov,
    barber_agakov_upper,
    info_nce,
    leave_one_out_upper,
    nwj,
    pairwise_scores,
)
from fastflow.estimators.named import ESTIMATORS, create
from fastflow.estimators.relaxed import GumbelSoftmax, StraightThrough
from fastflow.estimators.score import NVIL, REINFORCE, RLOO, VIMCO, MovingAverage, NeuralBaseline, baseline_network
from fastflow.estimators.unordered import UnorderedSet

__all__ = ["ARM", "ESTIMATORS", "NVIL", "REBAR", "REINFORCE", "RELAX", "RLOO", "VIMCO", "Bernoulli", "Categorical",
           "DisARM", "Enumeration", "Estimate", "Estimator", "GumbelSoftmax", "Measurement", "MovingAverage",
           "NeuralBaseline", "StraightThrough", "UnorderedSet", "barber_agakov", "barber_agakov_upper",
           "baseline_network", "create", "exact", "info_nce", "leave_one_out_upper", "measure", "nwj",
           "pairwise_scores"]
