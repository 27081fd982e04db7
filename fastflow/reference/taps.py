"""The nine taps of a 3x3 convolution as columns of a matrix: the formulas behind kernels/taps.py.

A pixel is a row; column ``tap * C + channel`` (or ``channel * 9 + tap``, channel_major) belongs to the pixel that lies
sign * (tap // 3 - 1, tap % 3 - 1) away, zero beyond the border.
"""

import torch
import torch.nn.functional as F

__all__ = ["gather_taps", "rectified_sum", "sum_taps"]


def _shifted(images, tap, sign):
    """images (B, H, W, C) where each pixel has what lies ``tap`` away."""
    y, x = sign * (tap // 3 - 1), sign * (tap % 3 - 1)
    height, width = images.shape[1:3]
    return F.pad(images, (0, 0, 1, 1, 1, 1))[:, 1 + y:1 + y + height, 1 + x:1 + x + width]


def gather_taps(x, sign, channel_major, columns):
    """(B*H*W, columns) of x (B, C, H, W), zeros from column 9 C on."""
    images = x.permute(0, 2, 3, 1)
    found = torch.stack([_shifted(images, tap, sign) for tap in range(9)], -1 if channel_major else -2)
    found = found.reshape(images.shape[:3].numel(), 9 * x.shape[1])
    return F.pad(found, (0, columns - found.shape[1]))


def sum_taps(z, bias, batch, channels, height, width, sign, channel_major):
    """(B, C, H, W) in channels_last: bias plus the sum over a pixel's nine taps of its column in z."""
    columns = z[:, :9 * channels].reshape(batch, height, width, *((channels, 9) if channel_major else (9, channels)))
    parts = columns.unbind(-1 if channel_major else -2)
    total = sum(_shifted(part, tap, sign) for tap, part in enumerate(parts))
    total = total if bias is None else (total + bias).to(z.dtype)
    return total.contiguous().permute(0, 3, 1, 2)


def rectified_sum(grad, h):
    """(grad where h is not <= 0, its sums over the rows in float32, or float64 for float64)."""
    masked = torch.where(h <= 0, torch.zeros((), dtype=grad.dtype, device=grad.device), grad)
    return masked, masked.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
