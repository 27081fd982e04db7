"""Normalising flows: transforms, base distributions, exact log-likelihoods and ready models."""

from fastflow.flows.autoregressive import IAF, MAF, AffineTransformer, MaskedAutoregressive
from fastflow.flows.base import StandardLogistic, StandardNormal
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
from fastflow.flows.circular import PeriodicShift
from fastflow.flows.continuous import FFJORD, ContinuousTransform, VelocityMLP, flow_matching_loss
from fastflow.flows.decode import GaussSeidelJacobi, Guidance
from fastflow.flows.distribution import FlowDistribution
from fastflow.flows.ffjord_image import FFJORDImage, VelocityConvNet
from fastflow.flows.flow import Flow
from fastflow.flows.flowpp import FlowPP
from fastflow.flows.glow import Glow, GlowStep, GlowTransform
from fastflow.flows.images import bits_per_dim, dequantize
from fastflow.flows.jacobian import InvertibilityReport, Lambda, check_invertible
from fastflow.flows.jet import Jet
from fastflow.flows.linear import PLU, QR, Dense, Householder, LinearMap, LowRank, Orthogonal, Triangular
from fastflow.flows.lipschitz import LipschitzMLP, LipSwish, SpectralLinear
from fastflow.flows.lipschitz_conv import LipschitzConvNet, SpectralConv2d
from fastflow.flows.made import MADE
from fastflow.flows.mixture import LogisticMixture, MixtureTransformer
from fastflow.flows.multiscale import CheckerboardSqueeze, Flatten, HaarSqueeze, Split, Squeeze
from fastflow.flows.nice import NICE, DiagonalScale
from fastflow.flows.nsf import NSF, SplineTransformer
from fastflow.flows.patchify import Patchify
from fastflow.flows.permutation import Permute, Reverse
from fastflow.flows.planar import Planar, Radial
from fastflow.flows.quantile import CDF, Quantile
from fastflow.flows.realnvp import RealNVP
from fastflow.flows.realnvp_image import RealNVPImage
from fastflow.flows.residual import InvertibleResidual, ResidualFlow
from fastflow.flows.residual_image import ResidualFlowImage
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
from fastflow.flows.surjections import Augment, Slice, UniformDequantization, VariationalDequantization
from fastflow.flows.sylvester import Sylvester
from fastflow.flows.tarflow import TarFlow, TarFlowBlock
from fastflow.flows.transform import Compose, Inverse, Transform, initialize
from fastflow.flows.weights import load_glow, load_jet, load_tarflow

__all__ = ["CDF", "FFJORD", "IAF", "MADE", "MAF", "NICE", "NSF", "PLU", "QR", "Affine", "AffineTransformer", "Atan",
           "Augment", "CheckerboardSqueeze", "ClassConditionalNormal", "Compose", "ConditionalNormal",
           "ContinuousTransform", "Dense", "DiagonalNormal", "DiagonalScale", "Exp", "FFJORDImage", "Flatten", "Flow",
           "FlowDistribution", "FlowPP", "FullNormal", "GaussSeidelJacobi", "Glow", "GlowStep", "GlowTransform",
           "Guidance", "HaarSqueeze", "Householder", "Inverse", "InvertibilityReport", "InvertibleResidual", "Jet",
           "Lambda", "LeakyReLU", "LinearMap", "LipSwish", "LipschitzConvNet", "LipschitzMLP", "Log",
           "LogisticMixture", "Logit", "LowRank", "MaskedAutoregressive", "Mixture", "MixtureTransformer",
           "Orthogonal", "Patchify", "PeriodicShift", "Permute", "Planar", "Power", "Quantile", "Radial", "RealNVP",
           "RealNVPImage", "ResidualFlow", "ResidualFlowImage", "Reverse", "ScalarTransform", "Sigmoid", "Slice",
           "Softplus", "SpectralConv2d", "SpectralLinear", "SplineTransformer", "Split", "Squeeze", "StandardLogistic",
           "StandardNormal", "StudentT", "Sylvester", "Tanh", "TarFlow", "TarFlowBlock", "Transform", "Triangular",
           "TruncatedNormal", "Uniform", "UniformDequantization", "VariationalDequantization", "VelocityConvNet",
           "VelocityMLP", "bits_per_dim", "check_invertible", "dequantize", "flow_matching_loss", "initialize",
           "load_glow", "load_jet", "load_tarflow"]
