"""Residual flows for images: contractive convolutional blocks at several scales."""

from torch import nn

from fastflow import checks
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.images import check_image_model
from fastflow.flows.lipschitz import LipschitzMLP, LipSwish
from fastflow.flows.lipschitz_conv import LipschitzConvNet
from fastflow.flows.multiscale import Flatten, Split, Squeeze
from fastflow.flows.realnvp_image import image_logit
from fastflow.flows.residual import InvertibleResidual
from fastflow.flows.transform import Compose
from fastflow.nn import ActNorm

__all__ = ["CONFIGS", "ResidualFlowImage"]

_COMMON = {"hidden_channels": 512, "n_exact_terms": 2}
CONFIGS = {
    "mnist": {"image_shape": (1, 28, 28), "n_blocks": 16, "alpha": 1e-6, **_COMMON},  # 0.970 bits/dim
    "cifar10": {"image_shape": (3, 32, 32), "n_blocks": 16, **_COMMON},  # 3.280, 25 million parameters
    "imagenet32": {"image_shape": (3, 32, 32), "n_blocks": 32, **_COMMON},  # 4.010
    "imagenet64": {"image_shape": (3, 64, 64), "n_blocks": 32, "factor_out": True, "squeeze_first": True,
                   **_COMMON},  # 3.757
    "celeba-hq256": {"image_shape": (3, 256, 256), "n_levels": 6, "n_blocks": 16, "n_fc_blocks": 0, "factor_out": True,
                     "squeeze_first": True, "activation": nn.ELU, "hidden_channels": 512,
                     "n_exact_terms": 8},  # trained on 5-bit images, n_bins=32; 0.992
}
"""The paper's models by name, for :meth:`ResidualFlowImage.from_config` (Chen et al. 2019, bits/dim of the paper):
keyword arguments of ResidualFlowImage."""


class ResidualFlowImage(Flow):
    """Residual flow for images (B, C, H, W) with values in [-0.5, 0.5); the base is N(0, I) over z (B, C*H*W).

    Pixels go through a logit first. Each of ``n_levels`` scales has ``n_blocks`` :class:`InvertibleResidual` of
    convolutions 3x3, 1x1 and 3x3, each behind an ActNorm; between scales 2x2 blocks become channels. Fully connected
    residual blocks on all elements end it. Densities are estimated without bias in training; in eval mode, but for tiny
    images, by the series of ``n_eval_terms``, short by at most ``truncation_bound`` per block. Call
    :meth:`initialize` on a batch of dequantised images before training, and :meth:`bits_per_dim` on integer images.

    Args:
        image_shape: (C, H, W), H and W divisible by 2**(n_levels - 1), with ``squeeze_first`` by 2**n_levels.
        n_levels, n_blocks: number of scales, and of convolutional blocks in each.
        hidden_channels: width of the convolutions.
        n_fc_blocks, fc_hidden: fully connected blocks at the end, and the sizes of their hidden layers.
        bound: Lipschitz constant of each network, below 1.
        activation: constructor of an activation module with slopes within [-1, 1]; one comes before each first
            convolution too, but that of the first block.
        alpha: of the logit, 0 <= alpha < 1/2; None for no logit.
        squeeze_first: whether 2x2 blocks become channels before the first scale too.
        factor_out: whether half of the channels leave as latents between scales.
        context_features: F of a context (B, F) that conditions the density, or None.
        dequantization: as of :class:`Flow`.
        options: of each InvertibleResidual.

    Raises:
        ValueError: a size or option that does not fit; the message names the argument.

    References:
        Chen et al., "Residual flows for invertible generative modeling", 2019, arXiv:1906.02735.
    """

    configs = CONFIGS

    def __init__(self, image_shape, n_levels=3, n_blocks=16, hidden_channels=512, *, n_fc_blocks=4,
                 fc_hidden=(128, 128), bound=0.98, activation=LipSwish, alpha=0.05, squeeze_first=False,
                 factor_out=False, context_features=None, dequantization=None, **options):
        n_fc_blocks = checks.count("n_fc_blocks", n_fc_blocks)
        image_shape = check_image_model(image_shape, 2**(max(n_levels, 1) - (not squeeze_first)), n_levels=n_levels,
                                        n_blocks=n_blocks, hidden_channels=hidden_channels)

        def scales(shape, level):
            layers = []
            for index in range(n_blocks):
                net = LipschitzConvNet(shape, (hidden_channels, hidden_channels), bound=bound, activation=activation,
                                       activate_first=level > 0 or index > 0, context_features=context_features)
                layers += [ActNorm(shape[0]), InvertibleResidual(net, **options)]
            if level == n_levels - 1:
                flatten = Flatten(shape)
                size = flatten.noise_shape(shape)[0]
                ends = [LipschitzMLP(size, fc_hidden, bound=bound, activation=activation,
                                     context_features=context_features) for _ in range(n_fc_blocks)]
                return [*layers, ActNorm(shape[0]), flatten, *(InvertibleResidual(net, **options) for net in ends)]
            squeeze = Squeeze()
            shape = squeeze.noise_shape(shape)
            if not factor_out:
                return [*layers, squeeze, *scales(shape, level + 1)]
            rest = Compose(*scales((shape[0] // 2, *shape[1:]), level + 1))
            return [*layers, squeeze, Split(shape, rest)]

        first = [Squeeze()] if squeeze_first else []
        shape = first[0].noise_shape(image_shape) if first else image_shape
        transform = Compose(*image_logit(alpha), *first, *scales(shape, 0), event_shape=image_shape)
        super().__init__(transform, StandardNormal(transform.noise_shape(image_shape)), dequantization)
        self.image_shape = image_shape
