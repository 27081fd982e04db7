"""Normalising flows: transforms, base distributions, exact log-likelihoods and ready models."""

from fastflow.flows.base import StandardNormal
from fastflow.flows.elementary import Exp, Log, Permute, Reverse
from fastflow.flows.flow import Flow, FlowDistribution
from fastflow.flows.glow import Glow, GlowStep, GlowTransform
from fastflow.flows.images import bits_per_dim, dequantize
from fastflow.flows.multiscale import Split, Squeeze
from fastflow.flows.realnvp import RealNVP
from fastflow.flows.transform import Compose, Inverse, Transform, initialize

__all__ = ["Compose", "Exp", "Flow", "FlowDistribution", "Glow", "GlowStep", "GlowTransform", "Inverse", "Log",
           "Permute", "RealNVP", "Reverse", "Split", "Squeeze", "StandardNormal", "Transform", "bits_per_dim",
           "dequantize", "initialize"]
