"""Glow: the multi-scale flow for images."""

import collections
import math

import torch
from torch import nn

from fastflow import checks
from fastflow.flows import memory
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.glow_step import GlowStep, in_the_way, links
from fastflow.flows.images import check_image_model
from fastflow.flows.links import ShapeLink, SplitLink, TransformLink
from fastflow.flows.logdets import zero_logdet
from fastflow.flows.multiscale import ContextPrior, HaarSqueeze, Split, Squeeze, ZeroConv
from fastflow.functional import ScaleMap
from fastflow.nn import ConvNet
from fastflow.nn.factors import factorize, total_logabsdet
from fastflow.reference.layout import channels_last

__all__ = ["CONFIGS", "Glow", "GlowStep", "GlowTransform"]

SQUEEZES = {"space_to_depth": Squeeze, "haar": HaarSqueeze}

# Kingma and Dhariwal 2018, table 4 and the authors' published recipes.
_CIFAR10 = {"image_shape": (3, 32, 32), "n_levels": 3, "n_steps": 32, "hidden_channels": 512}
_IMAGENET32 = {"image_shape": (3, 32, 32), "n_levels": 3, "n_steps": 48, "hidden_channels": 512}
_IMAGENET64 = {"image_shape": (3, 64, 64), "n_levels": 4, "n_steps": 48, "hidden_channels": 512}
_ADDITIVE, _PLU = {"scale": "additive"}, {"parametrization": "plu"}

CONFIGS = {
    "cifar10": _CIFAR10,  # affine couplings, 44 million parameters, 3.35 bits/dim in the paper
    "cifar10-plu": {**_CIFAR10, **_PLU},
    "cifar10-additive": {**_CIFAR10, **_ADDITIVE},
    "imagenet32": _IMAGENET32,  # 4.09 bits/dim
    "imagenet32-plu": {**_IMAGENET32, **_PLU},
    "imagenet64": _IMAGENET64,  # 3.81 bits/dim
    "imagenet64-plu": {**_IMAGENET64, **_PLU},
    "celeba-hq256": {"image_shape": (3, 256, 256), "n_levels": 6, "n_steps": 32, "hidden_channels": 512,
                     **_ADDITIVE},  # trained on 5-bit images, n_bins=32
}
"""The paper's models by name, for :meth:`Glow.from_config`: keyword arguments of Glow."""


class GlowLevel(nn.Module):
    """One scale: its steps, and the split that ends it (None on the last)."""

    def __init__(self, steps, split):
        super().__init__()
        self.steps = nn.ModuleList(steps)
        self.split = split


class GlowTransform(nn.Module):
    """The transform of :class:`Glow`: images (B, C, H, W) to z (B, D), latents in the order in which they leave.

    All 1x1 weights are factorised together at the start of a pass, each size in one call. Images are kept
    channels-last, in which the 1x1 convolutions are plain matrix products.
    """

    saves_memory = True

    def __init__(self, image_shape, n_levels, n_steps, hidden_channels, parametrization, learn_prior, conditioner,
                 coupling, squeeze, context):
        super().__init__()
        self.event_shape = tuple(image_shape)
        self.squeeze = SQUEEZES[squeeze](channels_last=True)
        self.conditional = self.takes_context = bool(context)
        n_params = 1 if ScaleMap.of(coupling["scale"]).kind == "additive" else 2
        self.levels = nn.ModuleList()
        self.level_shapes = []  # of the data inside each level
        channels, height, width = self.event_shape
        for level in range(n_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            self.level_shapes.append((channels, height, width))
            half = channels // 2
            steps = [GlowStep(channels, conditioner(half, n_params * (channels - half), hidden_channels,
                                                    **_context_of_level(context, level)),
                              parametrization=parametrization, **coupling) for _ in range(n_steps)]
            split = None
            if level < n_levels - 1:
                prior = None
                if learn_prior:
                    prior = ZeroConv(half, 2 * (channels - half), **_context_of_level(context, level))
                split = Split((channels, height, width), prior=prior, conditional=self.conditional)
                channels = half
            self.levels.append(GlowLevel(steps, split))
        self.prior = None  # of the last level's latents
        if learn_prior and context:
            self.prior = ContextPrior(channels, **_context_of_level(context, n_levels - 1))
        self.latent_shapes = [shape if level.split is None else level.split.latent_shape
                              for level, shape in zip(self.levels, self.level_shapes, strict=True)]

    def forward(self, x, context=None):
        """(z (B, D), logdet (B,)) of x (B, C, H, W)."""
        self._check(x, context)
        path = memory.path()
        factors = self._factorize(inverse=False, undo=path.inverts)
        logdet, latents = None, []
        for level, shape, level_factors in zip(self.levels, self.level_shapes, factors, strict=True):
            x, logdet = path(x, logdet, ShapeLink(self.squeeze))
            for step, factor in zip(level.steps, level_factors, strict=True):
                x, logdet = path(x, logdet, *links(step, factor, x, context, path.inverts))
            logdet = _add_convolutions(logdet, level_factors, shape, x)
            if level.split is not None:
                x, logdet, latent = path(x, logdet, SplitLink(level.split, context))
                latents.append(latent.flatten(1))
        if self.prior is not None:
            x, logdet = path(x, logdet, TransformLink(self.prior, context))
        latents.append(x.flatten(1))
        return path.end(torch.cat(latents, 1), logdet, self._unpack_channels_last)

    def inverse(self, z, context=None):
        """(x (B, C, H, W), logdet (B,)) of z (B, D)."""
        latents = self.unpack(z)
        self._check_context(context)
        factors = self._factorize(inverse=True)
        x, logdet = None, None
        for level, shape, latent, level_factors in zip(reversed(self.levels), reversed(self.level_shapes),
                                                       reversed(latents), reversed(factors), strict=True):
            latent = channels_last(latent)
            if level.split is not None:
                x, logdet = level.split.merge(x, latent, logdet, context)
            else:
                x, logdet = (latent, None) if self.prior is None else self.prior.inverse(latent, context)
            for step, factor in zip(reversed(level.steps), reversed(level_factors), strict=True):
                x, logdet = step.coupling.inverse(x, context, logdet=logdet)
                x = step.conv.apply_factors(x, factor)
            logdet = _add_convolutions(logdet, level_factors, shape, x)
            x = self.squeeze.inverse(x)[0]
        return x, logdet

    @torch.no_grad()
    def initialize(self, x, context=None):
        """Set every ActNorm from the batch x (B, C, H, W), first to last, and return z."""
        self._check(x, context)
        latents = []
        for level in self.levels:
            x = self.squeeze(x)[0]
            for step in level.steps:
                x = step.initialize(x, context)
            if level.split is not None:
                x, latent, _ = level.split.split(x, None, context)
                latents.append(latent.flatten(1))
        if self.prior is not None:
            x = self.prior(x, context)[0]
        return torch.cat([*latents, x.flatten(1)], 1)

    def explain(self, x, context=None):
        """One line: how many steps of a call with x (B, C, H, W) go through one node of autograd, unless in the memory
        mode "invert", and why the rest do not."""
        found = collections.Counter(
            in_the_way(step, channels_last(x.new_empty(1, *shape)), context)
            for level, shape in zip(self.levels, self.level_shapes, strict=True) for step in level.steps)
        text = f"{found.pop(None, 0)} of {sum(len(level.steps) for level in self.levels)} steps as one node of autograd"
        return "; ".join([text, *(f"{count} not: {why}" for why, count in found.items())])

    def noise_shape(self, event_shape):
        return (math.prod(self.event_shape),)

    def data_shape(self, event_shape):
        return self.event_shape

    def unpack(self, z):
        """The latents (B, C, H, W) of each level, finest first, that z (B, D) packs."""
        checks.tensor("z", z)
        checks.events("z", z, (math.prod(self.event_shape),))
        parts = torch.split(z, [math.prod(shape) for shape in self.latent_shapes], 1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.latent_shapes, strict=True)]

    def _unpack_channels_last(self, z):
        return [channels_last(latent) for latent in self.unpack(z)]

    def _check(self, x, context):
        checks.tensor("x", x)
        checks.events("x", x, self.event_shape)
        self._check_context(context)

    def _check_context(self, context):
        if self.conditional != (context is not None):
            raise ValueError("context: expected a tensor, because Glow was built with context_features or "
                             "context_channels, got None" if self.conditional else
                             "context: expected None, because Glow was built without context_features and "
                             "context_channels")

    def _factorize(self, inverse, undo=False):
        """The factors of each step, level by level."""
        convs = [step.conv for level in self.levels for step in level.steps]
        bank = convs[0].bank if convs else None
        if bank is None or undo:
            flat = iter(factorize(convs, inverse, self, undo=undo))
        else:  # inside a WeightBank
            flat = iter([bank.factors(conv, inverse) for conv in convs])
        return [[next(flat) for _ in level.steps] for level in self.levels]


def _context_of_level(context, level):
    """What the conditioners of a level are told of the context: a conditioning image follows the image's squeezes."""
    if "context_channels" not in context:
        return context
    factor = 2**(level + 1)
    return {**context, "context_channels": context["context_channels"] * factor**2,
            "arrange": nn.PixelUnshuffle(factor)}


def _add_convolutions(logdet, factors, shape, x):
    """The running log-determinant (B,) plus that of a level's 1x1 convolutions, the same for every image."""
    if not factors:
        return zero_logdet(x) if logdet is None else logdet
    return torch.add(logdet, total_logabsdet(factors), alpha=shape[1] * shape[2])


class Glow(Flow):
    """Glow for images (B, C, H, W) with values around [-0.5, 0.5]; the base is N(0, I) over z (B, C*H*W).

    Each of ``n_levels`` levels squeezes 2x2 blocks into channels, runs ``n_steps`` steps (ActNorm folded into an
    invertible 1x1 convolution, affine coupling) and, but for the last, sends half of its channels out as latents under
    a Gaussian prior learned from the other half. A context conditions the couplings, these priors and, by one more,
    the latents of the last level. Conditioners are convolutions 3x3, 1x1, 3x3 with ReLU and plain biases, the last
    zero-initialised. Call :meth:`initialize` on a batch of dequantised images before training, and :meth:`bits_per_dim`
    on integer images.

    Args:
        image_shape: (C, H, W), H and W divisible by 2**n_levels.
        n_levels, n_steps: number of levels, and of steps in each.
        hidden_channels: width of the conditioners.
        parametrization: of the 1x1 weights, "plain" or "plu".
        scale: ScaleMap of the couplings or its name; None is Glow's own, z = (x + t) * sigmoid(r + 2).
        layout, order, shift_first: as in nn.AffineCoupling.
        learn_prior: whether the latents of a split, with a context the last ones too, have a learned prior,
            zero-initialised.
        conditioner: constructor called as conditioner(in_channels, out_channels, hidden_channels), for a conditional
            model also with the keyword arguments of nn.ContextShift, which tell what context it will be called with.
        squeeze: "space_to_depth" (:class:`Squeeze`) or "haar" (:class:`HaarSqueeze`), how a level begins.
        context_features: F of a context (B, F) that conditions the density, or None.
        context_channels: channels of a conditioning image (B, C', H, W) that does, or None.

    Raises:
        ValueError: a size that does not fit; the message names the argument.

    References:
        Kingma and Dhariwal, "Glow: generative flow with invertible 1x1 convolutions", 2018, arXiv:1807.03039.
    """

    configs = CONFIGS

    def __init__(self, image_shape, n_levels=3, n_steps=32, hidden_channels=512, *, parametrization="plain", scale=None,
                 layout="chunk", order="shift_scale", shift_first=True, learn_prior=True, conditioner=ConvNet,
                 squeeze="space_to_depth", context_features=None, context_channels=None):
        image_shape = check_image_model(image_shape, 2**n_levels if n_levels > 0 else 1, n_levels=n_levels,
                                        n_steps=n_steps, hidden_channels=hidden_channels)
        checks.choice("squeeze", squeeze, tuple(SQUEEZES))
        context = {name: value for name, value in (("context_features", context_features),
                                                   ("context_channels", context_channels)) if value is not None}
        coupling = {"scale": ScaleMap.glow() if scale is None else scale, "layout": layout, "order": order,
                    "shift_first": shift_first}
        transform = GlowTransform(image_shape, n_levels, n_steps, hidden_channels, parametrization, learn_prior,
                                  conditioner, coupling, squeeze, context)
        super().__init__(transform, StandardNormal((math.prod(image_shape),)))
        self.image_shape = image_shape
