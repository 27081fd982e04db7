"""Integer images under continuous densities: uniform dequantisation and bits per dimension."""

import math

import torch

from fastflow import checks
from fastflow.draws import drawn

__all__ = ["bits_per_dim", "check_image_model", "dequantize"]


def dequantize(x, n_bins=256, *, generator=None, dtype=torch.float32):
    """x/n_bins - 0.5 + U/n_bins with U uniform in [0, 1): integer values 0..n_bins-1 spread over [-0.5, 0.5).

    Args:
        x: integer-valued tensor of any shape and dtype.
        n_bins: number of values that an element can take.
        generator: torch.Generator of the noise, None for torch's own.
        dtype: torch.float32 or torch.float64, of the result.
    """
    checks.tensor("x", x, floating=False)
    checks.count("n_bins", n_bins, 1)
    if generator is None:  # passing one, torch.compile takes no symbolic sizes
        noise = torch.rand(x.shape, dtype=dtype, device=x.device)
    else:
        noise = drawn(torch.rand, x.shape, x, generator, dtype)
    # Rounding must not carry the last bin to 0.5, which lies outside.
    below = 0.5 - (2.0**-25 if dtype == torch.float32 else 2.0**-54)
    return noise.add_(x).div_(n_bins).sub_(0.5).clamp_(max=below)


def bits_per_dim(log_prob, n_dims, n_bins=256):
    """Bits per dimension of integer images from the log-density of their dequantised values.

    -(log_prob - D log n_bins) / (D log 2): each bin is 1/n_bins wide in the units of the density.

    Args:
        log_prob: (B,) nats.
        n_dims: D, elements per image.
        n_bins: as in dequantize.
    """
    return (n_dims * math.log(n_bins) - log_prob) / (n_dims * math.log(2.0))


def check_image_model(image_shape, divisor, **sizes):
    """``image_shape`` as a tuple (C, H, W) with H and W divisible by ``divisor``, and ``sizes`` positive ints; an error
    that names the argument else."""
    for name, value in sizes.items():
        checks.count(name, value, 1)
    image_shape = checks.counts("image_shape", image_shape, 1)
    if len(image_shape) != 3:
        raise ValueError(f"image_shape: expected (C, H, W), got {image_shape}")
    if image_shape[1] % divisor or image_shape[2] % divisor:
        raise ValueError(f"image_shape: expected height and width divisible by {divisor}, got {image_shape}")
    return image_shape
