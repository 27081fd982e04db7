"""Normalising flows: transforms, base distributions, exact log-likelihoods and ready models."""

from fastflow.flows.base import StandardNormal
from fastflow.flows.bases import (
    ClassConditionalNormal,
    ConditionalNormal,
    DiagonalNormal,
    FullNormal,
    Mixture,
    StudentT,
    TruncatedNormal,
    Uniform,
)
from fastflow.flows.flow import Flow, FlowDistribution
from fastflow.flows.glow import Glow, GlowStep, GlowTransform
from fastflow.flows.images import bits_per_dim, dequantize
from fastflow.flows.jacobian import InvertibilityReport, Lambda, check_invertible
from fastflow.flows.linear import PLU, QR, Dense, Householder, LinearMap, LowRank, Orthogonal, Triangular
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

__all__ = ["CDF", "PLU", "QR", "Affine", "Atan", "ClassConditionalNormal", "Compose", "ConditionalNormal", "Dense",
           "DiagonalNormal", "Exp", "Flow", "FlowDistribution", "FullNormal", "Glow", "GlowStep", "GlowTransform",
           "Householder", "Inverse", "InvertibilityReport", "Lambda", "LeakyReLU", "LinearMap", "Log", "Logit",
           "LowRank", "Mixture", "Orthogonal", "Permute", "Power", "Quantile", "RealNVP", "Reverse",
           "ScalarTransform", "Sigmoid", "Softplus", "Split", "Squeeze", "StandardNormal", "StudentT", "Tanh",
           "Transform", "Triangular", "TruncatedNormal", "Uniform", "bits_per_dim", "check_invertible", "dequantize",
           "initialize"]
