"""Multi-scale architecture: space to depth, and latents that leave early."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks, functional
from fastflow.flows import memory
from fastflow.flows.transform import check_transform, initialize, noise_shape
from fastflow.functional import ScaleMap

__all__ = ["Split", "Squeeze", "ZeroConv"]


def _space_to_depth(x):
    """:class:`Squeeze`'s map of x (B, C, H, W) in any memory format to one in channels-last, in one copy."""
    batch, channels, height, width = x.shape
    blocks = x.permute(0, 2, 3, 1).unflatten(2, (width // 2, 2)).unflatten(1, (height // 2, 2))
    z = blocks.permute(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)
    return z.permute(0, 3, 1, 2)


class Squeeze(nn.Module):
    """Space to depth: (B, C, H, W) to (B, 4C, H/2, W/2); output channel 4c + 2i + j holds pixel (i, j) of each block.

    Args:
        channels_last: whether z is in channels-last whatever x is in.

    Raises:
        ValueError: x is not 4-D or its height or width is odd.
    """

    moves_elements = True

    def __init__(self, *, channels_last=False):
        super().__init__()
        self.channels_last = bool(channels_last)

    def forward(self, x, context=None):
        checks.tensor("x", x)
        if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"x: expected shape (B, C, H, W) with even H and W, got {tuple(x.shape)}")
        if self.channels_last:
            return _space_to_depth(x), x.new_zeros(x.shape[0])
        # For an empty batch torch's pixel_unshuffle leaves the shape as it was.
        z = F.pixel_unshuffle(x, 2) if x.shape[0] else x.reshape(0, *self.noise_shape(x.shape[1:]))
        return z, x.new_zeros(x.shape[0])

    def noise_shape(self, event_shape):
        channels, height, width = event_shape
        return 4 * channels, height // 2, width // 2

    def inverse(self, z, context=None):
        checks.tensor("z", z)
        if z.dim() != 4 or z.shape[1] % 4:
            raise ValueError(f"z: expected shape (B, 4C, H, W), got {tuple(z.shape)}")
        _, channels, height, width = z.shape
        x = F.pixel_shuffle(z, 2) if z.shape[0] else z.reshape(0, channels // 4, 2 * height, 2 * width)
        return x, z.new_zeros(z.shape[0])


class ZeroConv(nn.Conv2d):
    """A 3x3 convolution that starts at zero."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Split(nn.Module):
    """Half of the channels leave as latents, the rest goes on: x = (x1, x2), z = (z2, rest(x1)) packed as (B, D).

    x1 is the first C // 2 channels. With a ``prior``, a network that maps x1 to mu and r packed along dim 1 (mu first),
    the latents are z2 = (x2 - mu(x1)) / sigma(x1) with log sigma = 5 tanh(r / 5): a Gaussian prior learned for x2 is
    this transform to N(0, I). Without one z2 = x2.

    Args:
        event_shape: (C, *S), the shape of one x.
        rest: transform of x1; None leaves x1 as it is.
        prior: network from (B, C // 2, *S) to (B, 2 (C - C // 2), *S), or None.

    Raises:
        ValueError: fewer than two channels; on a call, an x of another shape.
    """

    SCALE = ScaleMap("tanh", clamp=5.0)
    saves_memory = True

    def __init__(self, event_shape, rest=None, *, prior=None):
        super().__init__()
        self.event_shape = tuple(event_shape)
        channels = self.event_shape[0]
        if channels < 2:
            raise ValueError(f"event_shape: expected at least 2 channels to split, got {self.event_shape}")
        if rest is not None:
            check_transform("rest", rest)
        self.sizes = (channels // 2, channels - channels // 2)
        self.latent_shape = (self.sizes[1], *self.event_shape[1:])
        kept = (self.sizes[0], *self.event_shape[1:])
        self.rest_shape = kept if rest is None else noise_shape(rest, kept)
        self.rest = rest
        self.prior = prior

    def split(self, x, logdet=None):
        """(x1, z2, logdet) of x (B, C, *S), z2 (B, C - C // 2, *S); a running ``logdet`` (B,) is added."""
        checks.tensor("x", x)
        checks.shape("x", x, (x.shape[0], *self.event_shape))
        x1, x2 = torch.split(x, self.sizes, 1)
        if self.prior is None:
            return x1, x2, x.new_zeros(x.shape[0]) if logdet is None else logdet
        z2, logdet = functional.affine_coupling(x2, self.prior(x1), scale=self.SCALE, order="shift_scale", inverse=True,
                                                logdet=logdet)
        return x1, z2, logdet

    def merge(self, x1, z2, logdet=None):
        """(x, logdet), the inverse of split."""
        if self.prior is None:
            return torch.cat([x1, z2], 1), x1.new_zeros(x1.shape[0]) if logdet is None else logdet
        return functional.affine_coupling(z2, self.prior(x1), scale=self.SCALE, order="shift_scale", logdet=logdet,
                                          passive=x1)

    def recompute(self, x1, z2, *, needs=True, dtype=None):
        """The x that split made x1 and z2 of, and on the way split's graph, with one run of the prior; ``needs`` and
        ``dtype`` as in nn.AffineCoupling.recompute."""
        dtype = z2.dtype if dtype is None else dtype
        with torch.enable_grad():
            params = self.prior(x1.detach().requires_grad_(needs))
            with torch.no_grad():
                x = functional.affine_coupling(z2, params, scale=self.SCALE, order="shift_scale", passive=x1)[0]
            x = x.to(dtype)
            functional.affine_coupling(x[:, self.sizes[0]:].detach().requires_grad_(needs), params, scale=self.SCALE,
                                       order="shift_scale", inverse=True)
        return x

    def forward(self, x, context=None):
        z1, z2, logdet = memory.kept(self.split, x)
        if self.rest is not None:
            z1, more = self.rest(z1, context)
            logdet = logdet + more
        return torch.cat([z2.flatten(1), z1.flatten(1)], 1), logdet

    def inverse(self, z, context=None):
        z2, z1 = self._unpack(z)
        total = None
        if self.rest is not None:
            z1, total = self.rest.inverse(z1, context)
        return self.merge(z1, z2, total)

    def noise_shape(self, event_shape):
        return (math.prod(self.event_shape),)

    def initialize(self, x, context=None):
        z1, z2, _ = self.split(x)
        if self.rest is not None:
            z1 = initialize(self.rest, z1, context)
        return torch.cat([z2.flatten(1), z1.flatten(1)], 1)

    def unpack(self, z):
        """The latents that z (B, D) packs, in the order in which they leave: z2 (B, C - C // 2, *S), those of rest."""
        z2, z1 = self._unpack(z)
        return [z2, *self.rest.unpack(z1)] if hasattr(self.rest, "unpack") else [z2, z1]

    def _unpack(self, z):
        checks.tensor("z", z)
        checks.shape("z", z, (z.shape[0], math.prod(self.event_shape)))
        size = math.prod(self.latent_shape)
        return z[:, :size].reshape(-1, *self.latent_shape), z[:, size:].reshape(-1, *self.rest_shape)
