"""Free-form continuous flows for images: convolutional velocity fields at several scales."""

import torch
from torch import nn

from fastflow.flows.base import StandardNormal
from fastflow.flows.continuous import ContinuousTransform
from fastflow.flows.flow import Flow
from fastflow.flows.images import check_image_model
from fastflow.flows.multiscale import Flatten, Split, Squeeze
from fastflow.flows.realnvp_image import image_logit
from fastflow.flows.transform import Compose
from fastflow.nn import ContextShift

__all__ = ["CONFIGS", "FFJORDImage", "VelocityConvNet"]

CONFIGS = {
    "mnist": {"image_shape": (1, 28, 28), "n_levels": 3, "n_blocks": 2, "hidden_channels": (64, 64, 64)},  # 0.99
    "cifar10": {"image_shape": (3, 32, 32), "n_levels": 4, "n_blocks": 2, "hidden_channels": (64, 64, 64)},  # 3.40
}
"""The paper's image models by name, for :meth:`FFJORDImage.from_config` (Grathwohl et al. 2019, bits/dim of the paper):
keyword arguments of FFJORDImage."""


class VelocityConvNet(nn.Module):
    """A velocity field of images (B, C, H, W) by 3x3 convolutions, each of which sees the time as one more channel;
    zero at first.

    Args:
        image_shape: (C, H, W), of one x.
        hidden_channels: channels between convolutions.
        activation: constructor of the activation module; a smooth one, for the solver's sake.
        context: keyword arguments of an nn.ContextShift, which adds what the context says to the first convolution's
            answer; none for a network without a context.
    """

    def __init__(self, image_shape, hidden_channels=(64, 64, 64), *, activation=nn.Softplus, **context):
        super().__init__()
        if not hidden_channels or any(isinstance(size, bool) or not isinstance(size, int) or size < 1
                                      for size in hidden_channels):
            raise ValueError(f"hidden_channels: expected positive ints, at least one, got {hidden_channels!r}")
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"image_shape: expected (C, H, W), got {tuple(image_shape)}")
        self.event_shape = tuple(image_shape)
        sizes = (image_shape[0], *hidden_channels, image_shape[0])
        self.layers = nn.ModuleList(nn.Conv2d(a + 1, b, 3, padding=1)
                                    for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.activations = nn.ModuleList(activation() for _ in hidden_channels)
        self.context = ContextShift(sizes[1], **context)
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, t, x, context=None):
        """dx/dt at x (B, C, H, W) and time t, 0-d or (B,)."""
        time = t.to(x.dtype).expand(x.shape[0])[:, None, None, None].expand(-1, 1, *x.shape[2:])
        shift = self.context(x, context)
        h = self.layers[0](torch.cat([x, time], 1))
        h = h if shift is None else h + shift
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            h = layer(torch.cat([activation(h), time], 1))
        return h


class FFJORDImage(Flow):
    """FFJORD for images (B, C, H, W) with values in [-0.5, 0.5); the base is N(0, I) over z (B, C*H*W).

    Pixels go through a logit first. Each of ``n_levels`` scales integrates ``n_blocks`` fields, makes 2x2 blocks
    channels, integrates as many fields of those, and sends half of the channels out as latents; the last scale has
    ``n_blocks`` fields alone. The log-determinant takes Hutchinson's trace in training; in eval mode "auto" takes the
    exact one, which is dear for images: ``trace="hutchinson"`` keeps the estimate there. It starts as the logit alone.

    Args:
        image_shape: (C, H, W), H and W divisible by 2**(n_levels - 1).
        n_levels, n_blocks: number of scales, and of fields one after the other.
        hidden_channels: of each :class:`VelocityConvNet`.
        activation: constructor of the activation module.
        alpha: of the logit, 0 <= alpha < 1/2; None for no logit.
        context_features: F of a context (B, F) that conditions the density, or None.
        context_channels: channels of a conditioning image (B, C', H, W) that does, or None.
        dequantization: as of :class:`Flow`.
        options: of the :class:`ContinuousTransform`: trace, method, rtol, atol, adjoint, options.

    Raises:
        ValueError: a size that does not fit; the message names the argument.
        ImportError: torchdiffeq is missing.

    References:
        Grathwohl et al., "FFJORD: free-form continuous dynamics for scalable reversible generative models", 2019,
        arXiv:1810.01367.
    """

    configs = CONFIGS

    def __init__(self, image_shape, n_levels=4, n_blocks=2, hidden_channels=(64, 64, 64), *, activation=nn.Softplus,
                 alpha=0.05, context_features=None, context_channels=None, dequantization=None, **options):
        image_shape = check_image_model(image_shape, 2**(max(n_levels, 1) - 1), n_levels=n_levels, n_blocks=n_blocks)

        def fields(shape, factor):
            context = {"context_features": context_features}
            if context_channels is not None:
                context |= {"context_channels": context_channels * factor**2, "arrange": nn.PixelUnshuffle(factor)}
            return [ContinuousTransform(VelocityConvNet(shape, hidden_channels, activation=activation, **context),
                                        **options) for _ in range(n_blocks)]

        def scales(shape, level):
            layers = fields(shape, 2**level)
            if level == n_levels - 1:
                return [*layers, Flatten(shape)]
            squeeze = Squeeze()
            shape = squeeze.noise_shape(shape)
            rest = Compose(*scales((shape[0] // 2, *shape[1:]), level + 1))
            return [*layers, squeeze, *fields(shape, 2**(level + 1)), Split(shape, rest)]

        transform = Compose(*image_logit(alpha), *scales(image_shape, 0), event_shape=image_shape)
        super().__init__(transform, StandardNormal(transform.noise_shape(image_shape)), dequantization)
        self.image_shape = image_shape
