"""Encoders and decoders to start from."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.nn import FusedSequential

__all__ = ["LogCounts", "Rescale", "conv_decoder", "conv_encoder", "conv_feature_decoder", "conv_feature_encoder",
           "mlp_decoder", "mlp_discriminator", "mlp_encoder"]


def mlp_encoder(event_shape, latent_features, hidden=(256, 256), activation=nn.SiLU, *, n_params=None):
    """Fully connected network from x (B, *event_shape) to params (B, n_params), by default 2 * latent_features."""
    event_shape = checks.counts("event_shape", event_shape, 1)
    n_params = 2 * latent_features if n_params is None else n_params
    return FusedSequential(nn.Flatten(), *_mlp(math.prod(event_shape), hidden, n_params, activation))


def mlp_decoder(latent_features, event_shape, hidden=(256, 256), activation=nn.SiLU):
    """Fully connected network from z (B, latent_features) to (B, *event_shape)."""
    event_shape = checks.counts("event_shape", event_shape, 1)
    return FusedSequential(*_mlp(latent_features, hidden, math.prod(event_shape), activation),
                           nn.Unflatten(1, event_shape))


def mlp_discriminator(features, hidden=(256, 256), activation=nn.SiLU):
    """Fully connected network from z (B, features) to logits (B, 1)."""
    return FusedSequential(*_mlp(features, hidden, 1, activation))


def conv_encoder(image_shape, latent_features, channels=(32, 64), activation=nn.SiLU, *, n_params=None):
    """Convolutions, each halving height and width, and a linear layer: x (B, C, H, W) to (B, n_params), by default
    2 * latent_features.

    Raises:
        ValueError: height or width is not divisible by 2**len(channels).
    """
    n_params = 2 * latent_features if n_params is None else n_params
    width, height_out, width_out = _scaled(image_shape, channels)
    layers = []
    for size in channels:
        layers += [nn.Conv2d(width, size, 4, stride=2, padding=1), activation()]
        width = size
    return FusedSequential(*layers, nn.Flatten(), nn.Linear(width * height_out * width_out, n_params))


def conv_decoder(latent_features, image_shape, channels=(64, 32), activation=nn.SiLU):
    """The mirror image of conv_encoder: z (B, latent_features) to (B, C, H, W)."""
    _, height, width = _scaled(image_shape, channels)
    layers = [nn.Linear(latent_features, channels[0] * height * width), nn.Unflatten(1, (channels[0], height, width))]
    sizes = (*channels, image_shape[0])
    for size, following in zip(sizes, sizes[1:], strict=False):
        layers += [activation(), nn.ConvTranspose2d(size, following, 4, stride=2, padding=1)]
    return FusedSequential(*layers)


def conv_feature_encoder(image_shape, out_channels, channels=(32, 64), activation=nn.SiLU):
    """Convolutions, each halving height and width, to a map of latents (B, out_channels, h, w).

    Raises:
        ValueError: height or width is not divisible by 2**len(channels).
    """
    width, _, _ = _scaled(image_shape, channels)
    layers = []
    for size in channels:
        layers += [nn.Conv2d(width, size, 4, stride=2, padding=1), activation()]
        width = size
    return FusedSequential(*layers, nn.Conv2d(width, out_channels, 1))


def conv_feature_decoder(in_channels, image_shape, channels=(64, 32), activation=nn.SiLU):
    """The mirror image of conv_feature_encoder: (B, in_channels, h, w) to (B, C, H, W)."""
    _scaled(image_shape, channels)
    layers = [nn.Conv2d(in_channels, channels[0], 3, padding=1)]
    sizes = (*channels, image_shape[0])
    for size, following in zip(sizes, sizes[1:], strict=False):
        layers += [activation(), nn.ConvTranspose2d(size, following, 4, stride=2, padding=1)]
    return FusedSequential(*layers)


class Rescale(nn.Module):
    """Levels 0..n_bins-1 to -1..1: in front of encoders whose data are integers."""

    def __init__(self, n_bins):
        super().__init__()
        self.n_bins = n_bins

    def forward(self, x):
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return x * (2.0 / (self.n_bins - 1)) - 1.0

    def extra_repr(self):
        return f"n_bins={self.n_bins}"


class LogCounts(nn.Module):
    """log(1 + x): in front of encoders whose data are counts."""

    def forward(self, x):
        return torch.log1p(x if x.is_floating_point() else x.to(torch.get_default_dtype()))


def _mlp(features, hidden, out_features, activation):
    layers = []
    for size in checks.counts("hidden", hidden, 1):
        layers += [nn.Linear(features, size), activation()]
        features = size
    return [*layers, nn.Linear(features, out_features)]


def image_sizes(image_shape):
    """(C, H, W), checked to be one."""
    sizes = checks.counts("image_shape", image_shape, 1)
    if len(sizes) != 3:
        raise ValueError(f"image_shape: expected (C, H, W), got {sizes}")
    return sizes


def _scaled(image_shape, channels):
    """(C, height, width) with the sides halved once for each of ``channels``."""
    for channel in channels:
        checks.count("channels", channel, 1)
    factor = 2 ** len(channels)
    size, height, width = image_sizes(image_shape)
    if height % factor or width % factor:
        raise ValueError(f"image_shape: expected height and width divisible by {factor}, got {tuple(image_shape)}")
    return size, height // factor, width // factor
