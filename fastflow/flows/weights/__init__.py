"""Weights that other programs published, loaded into fastflow's models."""

from fastflow.flows.weights.glow import load_glow
from fastflow.flows.weights.transformers import load_jet, load_tarflow

__all__ = ["load_glow", "load_jet", "load_tarflow"]
