"""Downsampled ImageNet (Chrabaszcz et al. 2017, arXiv:1707.08819) from its npz files.

The training part is train_data_batch_1.npz to _10.npz, or train_data.npz in one piece; the test part is val_data.npz.
Each holds ``data`` (N, 3*S*S) uint8, the planes of red, green and blue, and ``labels`` from 1 to 1000. The images are
read once, into .npy files that every later run and all processes of a machine map into memory.
"""

from pathlib import Path

import numpy as np

from fastflow.data import cache as caching
from fastflow.data.arrays import read_npz
from fastflow.data.files import DataFileError

__all__ = ["is_there", "read"]

FOLDERS = ("", "Imagenet{}_train", "Imagenet{}_val", "Imagenet{}_train_npz", "Imagenet{}_val_npz")


def is_there(path):
    """Whether the folder holds a training file of these names."""
    return any(path.glob("train_data*.npz"))


def read(path, size, cache=None):
    """(train, test, train labels, test labels): uint8 (N, 3, size, size) twice, int64 (N,) from 0 to 999 twice.

    A file that changes makes new .npy files; the old ones are left to be deleted.

    Args:
        path: the folder with the files, or the one above ``Imagenet{size}_train`` and ``Imagenet{size}_val``.
        size: 32 or 64 (or 8 or 16, which the authors offer too).
        cache: the folder for the .npy files; None for ``path`` itself.

    Raises:
        DataFileError: a file is missing, truncated, corrupt or of another size, or a .npy file can't be written.
    """
    folders = [path / name.format(size) for name in FOLDERS]
    whole = [f / "train_data.npz" for f in folders if (f / "train_data.npz").is_file()]
    files = whole[:1] or sorted({b for f in folders for b in f.glob("train_data_batch_*.npz")}, key=_number)
    if not files:
        raise DataFileError(path, "lacks train_data_batch_1.npz, the training part of downsampled ImageNet")
    if not whole and [_number(f) for f in files] != list(range(1, len(files) + 1)):
        raise DataFileError(path, f"lacks a part: found {', '.join(f.name for f in files)}")
    held_out = next((f / "val_data.npz" for f in folders if (f / "val_data.npz").is_file()), None)
    if held_out is None:
        raise DataFileError(path / "val_data.npz", "is missing")
    place = path if cache is None else Path(cache)
    train, train_labels = _part(files, size, place, "train")
    test, test_labels = _part([held_out], size, place, "val")
    return train, test, train_labels, test_labels


def _part(files, size, place, name):
    """(images, labels) of the files one after the other, the images mapped."""
    labels = [_labels(f) for f in files]
    images = caching.mapped(place / f"fastflow-imagenet{size}-{name}-{caching.stamp(files)}.npy",
                            (sum(map(len, labels)), 3, size, size),
                            lambda: (_images(f, size, len(own)) for f, own in zip(files, labels, strict=True)))
    return images, np.concatenate(labels)


def _number(path):
    digits = path.stem.rpartition("_")[2]
    if not digits.isdecimal():
        raise DataFileError(path, "is not numbered")
    return int(digits)


def _labels(path):
    labels = read_npz(path, ("labels",))["labels"]
    if labels.ndim != 1 or np.any((labels < 1) | (labels > 1000)):
        raise DataFileError(path, "labels: expected one from 1 to 1000 for each image")
    return labels.astype(np.int64) - 1


def _images(path, size, n):
    pixels = read_npz(path, ("data",))["data"]
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3 * size * size:
        raise DataFileError(path, f"data: expected uint8 (N, {3 * size * size}), got {pixels.dtype} {pixels.shape}")
    if len(pixels) != n:
        raise DataFileError(path, f"holds {len(pixels)} images and {n} labels")
    return pixels.reshape(-1, 3, size, size)
