"""Layers to drop into a model: couplings, invertible 1x1 convolutions, activation normalisation, Gaussian samples.

The layers that are transforms map data to noise, ``layer(x, context=None) -> (z, logdet)``, and back,
``layer.inverse(z, context=None) -> (x, logdet)``, with a log-determinant (B,) in nats for each direction.
"""

from fastflow.nn.actnorm import ActNorm
from fastflow.nn.affine_coupling import AffineCoupling
from fastflow.nn.context import ContextShift
from fastflow.nn.conv_net import ConvNet
from fastflow.nn.conv_resnet import ConvResNet
from fastflow.nn.fused_sequential import FusedSequential
from fastflow.nn.gated_attention import GatedAttentionNet
from fastflow.nn.gaussian_sample import GaussianSample
from fastflow.nn.invertible_conv import InvertibleConv1x1
from fastflow.nn.mixture_coupling import MixtureCoupling
from fastflow.nn.mlp import MLP
from fastflow.nn.spline_coupling import SplineCoupling
from fastflow.nn.weight_bank import WeightBank

__all__ = ["MLP", "ActNorm", "AffineCoupling", "ContextShift", "ConvNet", "ConvResNet", "FusedSequential",
           "GatedAttentionNet", "GaussianSample", "InvertibleConv1x1", "MixtureCoupling", "SplineCoupling",
           "WeightBank"]
