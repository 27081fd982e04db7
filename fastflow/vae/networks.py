"""Encoders and decoders to start from."""

import math

from torch import nn

__all__ = ["conv_decoder", "conv_encoder", "mlp_decoder", "mlp_encoder"]


def mlp_encoder(event_shape, latent_features, hidden=(256, 256), activation=nn.SiLU):
    """Fully connected network from x (B, *event_shape) to params (B, 2 * latent_features)."""
    return nn.Sequential(nn.Flatten(), *_mlp(math.prod(event_shape), hidden, 2 * latent_features, activation))


def mlp_decoder(latent_features, event_shape, hidden=(256, 256), activation=nn.SiLU):
    """Fully connected network from z (B, latent_features) to (B, *event_shape)."""
    return nn.Sequential(*_mlp(latent_features, hidden, math.prod(event_shape), activation),
                         nn.Unflatten(1, tuple(event_shape)))


def conv_encoder(image_shape, latent_features, channels=(32, 64), activation=nn.SiLU):
    """Convolutions, each halving height and width, and a linear layer: x (B, C, H, W) to (B, 2 * latent_features).

    Raises:
        ValueError: height or width is not divisible by 2**len(channels).
    """
    width, height_out, width_out = _scaled(image_shape, channels)
    layers = []
    for size in channels:
        layers += [nn.Conv2d(width, size, 4, stride=2, padding=1), activation()]
        width = size
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height_out * width_out, 2 * latent_features))


def conv_decoder(latent_features, image_shape, channels=(64, 32), activation=nn.SiLU):
    """The mirror image of conv_encoder: z (B, latent_features) to (B, C, H, W)."""
    _, height, width = _scaled(image_shape, channels)
    layers = [nn.Linear(latent_features, channels[0] * height * width), nn.Unflatten(1, (channels[0], height, width))]
    sizes = (*channels, image_shape[0])
    for size, following in zip(sizes, sizes[1:], strict=False):
        layers += [activation(), nn.ConvTranspose2d(size, following, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def _mlp(features, hidden, out_features, activation):
    layers = []
    for size in hidden:
        layers += [nn.Linear(features, size), activation()]
        features = size
    return [*layers, nn.Linear(features, out_features)]


def _scaled(image_shape, channels):
    """(C, height, width) with the sides halved once for each of ``channels``."""
    factor = 2 ** len(channels)
    size, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(f"image_shape: expected height and width divisible by {factor}, got {tuple(image_shape)}")
    return size, height // factor, width // factor
