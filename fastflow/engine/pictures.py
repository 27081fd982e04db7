"""Grids of images as PNG."""

import math

import numpy as np
import torch

from fastflow.engine.files import whole

__all__ = ["levels", "save_grid", "save_picture", "tiled"]

PADDING = 2
TARGET_PIXELS = 768  # images are magnified by a whole number so that the grid comes near this width


def levels(x, n_bins):
    """Integer levels, uint8, of images from a model of dequantised data: floor((x + 0.5)*n_bins) in 0 to n_bins - 1.
    NaN becomes 0."""
    return torch.nan_to_num((x.float() + 0.5) * n_bins, nan=0.0).floor_().clamp_(0, n_bins - 1).to(torch.uint8)


def save_grid(path, images, n_bins, n_columns=None):
    """Writes images (N, 1 or 3, H, W) of integer levels 0 to ``n_bins`` - 1 as one PNG, row by row; returns the path.

    n_columns: images per row, about the square root of N by default.
    """
    grid = tiled(images, n_bins, n_columns or math.ceil(math.sqrt(len(images))))
    save_picture(path, grid)
    return path


def tiled(images, n_bins, n_columns):
    """The same grid as an array (height, width, 3), or (height, width) for one channel, uint8."""
    n, channels, height, width = images.shape
    n_rows = math.ceil(n / n_columns)
    zoom = max(1, TARGET_PIXELS // (n_columns * (width + PADDING)))
    grey = (images.cpu().numpy().astype(np.uint16) * 255 // (n_bins - 1)).astype(np.uint8)
    large = grey.repeat(zoom, 2).repeat(zoom, 3)
    height, width, pad = height * zoom, width * zoom, PADDING * zoom
    grid = np.full((n_rows * (height + pad) + pad, n_columns * (width + pad) + pad, channels), 32, np.uint8)
    for i, image in enumerate(large):
        top, left = pad + i // n_columns * (height + pad), pad + i % n_columns * (width + pad)
        grid[top:top + height, left:left + width] = image.transpose(1, 2, 0)
    return grid[:, :, 0] if channels == 1 else grid


def save_picture(path, pixels):
    """Writes uint8 pixels as a PNG, whole or not at all; the folder is made if missing."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
