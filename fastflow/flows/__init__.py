"""Normalising flows: transforms, base distributions, exact log-likelihoods and ready models."""

from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow, FlowDistribution
from fastflow.flows.glow import Glow, GlowStep, GlowTransform
from fastflow.flows.images import bits_per_dim, dequantize
from fastflow.flows.multiscale import Split, Squeeze
from fastflow.flows.permutation import Permute, Reverse
from fastflow.flows.quantile import CDF, Quantile
from fastflow.flows.realnvp import RealNVP
from fastflow.flows.scalar import (
    Affine,
    Atan,
    Exp,
    LeakyReLU,
    Log,
    Logit,
    Power,
    ScalarTransform,
    Sigmoid,
    Softplus,
    Tanh,
)
from fastflow.flows.transform import Compose, Inverse, Transform, initialize

__all__ = ["CDF", "Affine", "Atan", "Compose", "Exp", "Flow", "FlowDistribution", "Glow", "GlowStep", "GlowTransform",
           "Inverse", "LeakyReLU", "Log", "Logit", "Permute", "Power", "Quantile", "RealNVP", "Reverse",
           "ScalarTransform", "Sigmoid", "Softplus", "Split", "Squeeze", "StandardNormal", "Tanh", "Transform",
           "bits_per_dim", "dequantize", "initialize"]
