"""Images as sequences of patches."""

import math

import torch
from torch import nn

from fastflow import checks

__all__ = ["Patchify", "patch_grid"]


def patch_grid(image_shape, patch_size):
    """(C, rows, columns) of the patches of an image (C, H, W); ValueError where they do not fit."""
    image_shape = checks.counts("image_shape", image_shape, 1)
    if len(image_shape) != 3:
        raise ValueError(f"image_shape: expected (C, H, W), got {image_shape}")
    patch_size = checks.count("patch_size", patch_size, 1)
    channels, height, width = image_shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"image_shape: expected height and width divisible by patch_size = {patch_size}, "
                         f"got {image_shape}")
    return channels, height // patch_size, width // patch_size


class Patchify(nn.Module):
    """Images (B, C, H, W) to tokens (B, T, D), one per patch of P x P pixels, row by row: T = HW / P^2, D = C P^2.

    Args:
        image_shape: (C, H, W), H and W divisible by ``patch_size``.
        patch_size: P.
        channels_last: whether a token's elements are ordered (P, P, C), else (C, P, P).
        scale: positive number that multiplies the values on the way; the log-determinant is C*H*W log(scale).
    """

    def __init__(self, image_shape, patch_size, *, channels_last=False, scale=1.0):
        super().__init__()
        channels, self.rows, self.columns = patch_grid(image_shape, patch_size)
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale!r}")
        self.image_shape, self.patch_size = (channels, self.rows * patch_size, self.columns * patch_size), patch_size
        self.channels_last, self.scale = bool(channels_last), float(scale)
        self.token_shape = self.rows * self.columns, channels * patch_size**2

    def forward(self, x, context=None):
        """(tokens (B, T, D), logdet (B,)) of x (B, C, H, W)."""
        checks.tensor("x", x)
        checks.events("x", x, self.image_shape)
        blocks = x.unflatten(3, (self.columns, self.patch_size)).unflatten(2, (self.rows, self.patch_size))
        z = blocks.permute(*((0, 2, 4, 3, 5, 1) if self.channels_last else (0, 2, 4, 1, 3, 5)))
        z = z.reshape(x.shape[0], *self.token_shape)
        return z if self.scale == 1.0 else z * self.scale, self._logdet(z, 1.0)

    def inverse(self, z, context=None):
        """(images (B, C, H, W), logdet (B,)) of z (B, T, D)."""
        checks.tensor("z", z)
        checks.events("z", z, self.token_shape)
        size, channels = self.patch_size, self.image_shape[0]
        patch = (size, size, channels) if self.channels_last else (channels, size, size)
        blocks = z.reshape(z.shape[0], self.rows, self.columns, *patch)
        x = blocks.permute(*((0, 5, 1, 3, 2, 4) if self.channels_last else (0, 3, 1, 4, 2, 5)))
        x = x.reshape(z.shape[0], *self.image_shape)
        return x if self.scale == 1.0 else x / self.scale, self._logdet(z, -1.0)

    def noise_shape(self, event_shape):
        return self.token_shape

    def data_shape(self, event_shape):
        return self.image_shape

    def extra_repr(self):
        return f"{self.image_shape}, patch_size={self.patch_size}, scale={self.scale}"

    def _logdet(self, like, sign):
        value = sign * math.prod(self.image_shape) * math.log(self.scale)
        return like.new_full((like.shape[0],), value, dtype=torch.promote_types(like.dtype, torch.float32))
