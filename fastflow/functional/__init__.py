"""The public operations: check the arguments, choose a backend, run its kernels under autograd.

Every function has a namesake with the same signature in :mod:`fastflow.reference`, which states the mathematics in
eager PyTorch. All are differentiable to any order, capturable in a CUDA graph, and visible to torch.compile.
"""

from fastflow.functional.activated_conv import activated_conv
from fastflow.functional.affine_coupling import affine_coupling
from fastflow.functional.bernoulli_log_prob import bernoulli_log_prob
from fastflow.functional.conv_net import conv_net
from fastflow.functional.gaussian import gaussian_sample_kl
from fastflow.functional.mlp import mlp
from fastflow.functional.mlp_flow import mlp_flow
from fastflow.functional.slogdet import plu_weight, slogdet, slogdet_inverse
from fastflow.functional.spline import spline, spline_params
from fastflow.functional.top_down import top_down
from fastflow.functional.wide_mlp import wide_mlp
from fastflow.reference import (  # noqa: F401 (some for layers)
    LAYOUTS,
    REDUCTIONS,
    SCALES,
    ChannelAffine,
    LatentLevel,
    MLPBlock,
    MLPCoupling,
    Permutation,
    ScaleMap,
    full_precision,
)

__all__ = ["ChannelAffine", "LatentLevel", "MLPBlock", "MLPCoupling", "Permutation", "ScaleMap", "activated_conv",
           "affine_coupling", "bernoulli_log_prob", "conv_net", "gaussian_sample_kl", "mlp", "mlp_flow", "plu_weight",
           "slogdet", "slogdet_inverse", "spline", "spline_params", "top_down", "wide_mlp"]
