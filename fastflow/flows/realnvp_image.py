"""RealNVP for images: checkerboard and channel couplings at several scales."""

import torch
from torch import nn

from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.images import check_image_model
from fastflow.flows.multiscale import Split, Squeeze
from fastflow.flows.permutation import Permute
from fastflow.flows.scalar import Affine, Logit
from fastflow.flows.transform import Compose
from fastflow.functional import ScaleMap
from fastflow.nn import ActNorm, AffineCoupling, ConvResNet

__all__ = ["CONFIGS", "RealNVPImage", "image_logit"]

CONFIGS = {
    "cifar10": {"image_shape": (3, 32, 32), "n_levels": 2, "hidden_channels": 64, "n_blocks": 8},  # 3.49 bits/dim
    "imagenet32": {"image_shape": (3, 32, 32), "n_levels": 4, "hidden_channels": 32, "n_blocks": 4},  # 4.28
    "imagenet64": {"image_shape": (3, 64, 64), "n_levels": 5, "hidden_channels": 32, "n_blocks": 2},  # 3.98
    "celeba64": {"image_shape": (3, 64, 64), "n_levels": 5, "hidden_channels": 32, "n_blocks": 2},
}
"""The paper's models by name, for :meth:`RealNVPImage.from_config` (Dinh et al. 2017, section 4.1; bits/dim of the
paper): keyword arguments of RealNVPImage. Where the paper normalises by batch statistics, ours has ActNorm."""


def image_logit(alpha):
    """Transforms from [-0.5, 0.5) to the real line: logit(alpha + (1 - 2 alpha)(x + 0.5)); none if alpha is None."""
    return [] if alpha is None else [Affine(torch.tensor(0.5), torch.tensor(1.0)), Logit(alpha)]


class RealNVPImage(Flow):
    """RealNVP for images (B, C, H, W) with values in [-0.5, 0.5); the base is N(0, I) over z (B, C*H*W).

    Pixels go through a logit first. Each of ``n_levels`` scales has ``n_couplings`` affine couplings in checkerboards
    that take turns; then 2x2 blocks become channels, as many couplings take turns on the two halves of those, and half
    of them, the lower rows, leave as latents. The last scale has ``n_couplings`` + 1 checkerboard couplings alone. An
    ActNorm stands before each coupling. Conditioners are nn.ConvResNet, twice as wide at each further scale. Call
    :meth:`initialize` on a batch of dequantised images before training, and :meth:`bits_per_dim` on integer images.

    Args:
        image_shape: (C, H, W), H and W divisible by 2**(n_levels - 1), W even.
        n_levels: number of scales.
        n_couplings: checkerboard couplings, and channel couplings, of each scale.
        hidden_channels, n_blocks: of the conditioners at the first scale.
        alpha: of the logit, 0 <= alpha < 1/2; None for no logit.
        scale: ScaleMap of the couplings or its name; "tanh" keeps each scale between 1/e and e.
        context_features: F of a context (B, F) that conditions the density, or None.
        context_channels: channels of a conditioning image (B, C', H, W) that does, or None.
        dequantization: as of :class:`Flow`.

    Raises:
        ValueError: a size that does not fit; the message names the argument.

    References:
        Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803.
    """

    configs = CONFIGS

    def __init__(self, image_shape, n_levels=2, n_couplings=3, hidden_channels=64, n_blocks=8, *, alpha=0.05,
                 scale="tanh", context_features=None, context_channels=None, dequantization=None):
        image_shape = check_image_model(image_shape, 2**(n_levels - 1) if n_levels > 0 else 1, n_levels=n_levels,
                                        n_couplings=n_couplings, hidden_channels=hidden_channels)

        scale = ScaleMap.of(scale)
        per_channel = 1 if scale.kind == "additive" else 2  # the shift alone

        def net(in_channels, out_channels, level, factor):
            context = {"context_features": context_features}
            if context_channels is not None:
                context |= {"context_channels": context_channels * factor**2, "arrange": nn.PixelUnshuffle(factor)}
            return ConvResNet(in_channels, out_channels, hidden_channels * 2**level, n_blocks, **context)

        def scales(shape, level):
            channels, height, width = shape
            last = level == n_levels - 1
            layers = []
            for index in range(n_couplings + last):
                coupling = AffineCoupling(net(channels, per_channel * channels, level, 2**level), split="checkerboard",
                                          flip=index % 2 == 1, scale=scale)
                layers += [ActNorm(channels), coupling]
            if last:
                return layers
            # By pixel of the block, the upper row first: halves that no checkerboard has.
            by_pixel = Permute([4 * c + pixel for pixel in range(4) for c in range(channels)])
            layers += [Squeeze(), by_pixel]
            half = 2 * channels
            for index in range(n_couplings):
                layers += [ActNorm(2 * half), AffineCoupling(net(half, per_channel * half, level, 2**(level + 1)),
                                                             flip=index % 2 == 1, scale=scale)]
            rest = Compose(*scales((half, height // 2, width // 2), level + 1))
            return [*layers, Split((2 * half, height // 2, width // 2), rest)]

        transform = Compose(*image_logit(alpha), *scales(image_shape, 0), event_shape=image_shape)
        super().__init__(transform, StandardNormal(transform.noise_shape(image_shape)), dequantization)
        self.image_shape = image_shape
