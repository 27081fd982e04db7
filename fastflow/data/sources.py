"""Data by name or by path, in whatever format they lie there."""

import importlib
from pathlib import Path

from fastflow.data import bundled, cifar10, folders, huggingface, imagenet, tables
from fastflow.data.files import split
from fastflow.data.images import ImageData

__all__ = ["DATASETS", "FORMATS", "OPTIONS", "TABLES", "load"]

DATASETS = {"digits": ((1, 8, 8), 17), "photos": ((3, 32, 32), 256)}  # name: image shape, levels
TABLES = {"breast-cancer": (30,), "patches": (63,)}  # name: shape of a row
PARTS = ("train", "test", "train_labels", "test_labels")  # as readers return them, the labels if there are any
OVERLAPPING = {"photos", "patches"}  # whose training examples share pixels
# format: image shape and levels, or None where the data decide
FORMATS = {"cifar10": ((3, 32, 32), 256), "imagenet32": ((3, 32, 32), 256), "imagenet64": ((3, 64, 64), 256),
           "folder": None, "table": None, "huggingface": None}
OPTIONS = {"cifar10": {"verify"}, "imagenet32": {"cache"}, "imagenet64": {"cache"}, "folder": {"size", "test_fraction"},
           "table": {"test_fraction"}, "huggingface": {"size", "test_fraction"}}  # all have validation_fraction


def load(name, *, format=None, validation_fraction=0.0, **options):
    """The dataset of that name or at that path, the same examples in the same order at every call.

    ============ ========================================================================== ===================
    format       what lies at the path                                                      options
    ============ ========================================================================== ===================
    cifar10      the python or binary version, .tar.gz or extracted                         verify
    imagenet32   the npz files of downsampled ImageNet                                      cache
    imagenet64   the same, 64x64                                                            cache
    folder       pictures, in train and test or in one folder                               size, test_fraction
    table        .npy, .npz, .csv or .parquet, or a folder with train.* and test.*          test_fraction
    huggingface  what ``save_to_disk`` wrote: pictures or numbers                           size, test_fraction
    ============ ========================================================================== ===================

    Nothing is downloaded and nothing in a file is run.

    Args:
        name: a key of ``DATASETS``, which maps it to (image shape, levels), or of ``TABLES``, or a path; a
            pathlib.Path is never taken for a name.
        format: a key of ``FORMATS``; None finds it out.
        validation_fraction: share of the training part that becomes a validation part, where the data bring none; which
            examples is fixed. Data with train, val (valid, validation) and test bring one.
        verify: compare with the checksums that CIFAR-10's source publishes (default True).
        cache: folder for the .npy files that ImageNet's images are kept in (default the path itself); processes share
            their memory until one writes to its images, which leaves the files as they are. A ``validation_fraction``
            takes a copy of them.
        size: scale pictures to size x size.
        test_fraction: share of the test part where the data bring no split (default 0.1); which examples is fixed.

    Returns:
        An :class:`ImageData`, or of a table a :class:`TableData`.

    Raises:
        ValueError: there is no such dataset or format, or an option that the format does not have.
        DataFileError: a file is missing, truncated, corrupt or something else; the message starts with its path.
        ImportError: a library that is needed is not installed; the message says how to install it.
        FileNotFoundError: there is nothing at the path, or the library lacks a picture.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if format is None and name in (*DATASETS, *TABLES):
        _check_options(name, options, set())
        if validation_fraction and name in OVERLAPPING:
            raise ValueError(f"validation_fraction: expected 0, because the training crops of {name} overlap and a "
                             f"part of them is not held out, got {validation_fraction}")
        if name in TABLES:
            return _made(name, bundled.read(name), None, validation_fraction)
        found = dict(zip(PARTS, importlib.import_module(f"fastflow.data.{name}").read(), strict=False))
        return _made(name, found, DATASETS[name][1], validation_fraction)
    path = Path(name)
    if not path.exists():
        if format is None and isinstance(name, str) and len(path.parts) == 1 and not path.suffix:
            raise ValueError(f"name: expected one of {', '.join((*DATASETS, *TABLES))} or a path, got {str(name)!r}")
        raise FileNotFoundError(2, "there are no data", str(path))
    format = detect(path) if format is None else format
    _check_options(format, options, OPTIONS[format])
    return _made(str(name), _read(format, path, options), 256, validation_fraction)


def _made(name, found, n_bins, validation_fraction):
    """The ImageData or TableData of a reader's {part or part_labels: array, "columns": names}."""
    import torch  # here, so that the names of the datasets cost no import of torch

    if validation_fraction and "validation" not in found:
        rest, held_out = split(len(found["train"]), validation_fraction, name, "validation_fraction")
        for suffix in ("", "_labels"):
            if found.get(f"train{suffix}") is not None:
                found[f"validation{suffix}"] = found[f"train{suffix}"][held_out]
                found[f"train{suffix}"] = found[f"train{suffix}"][rest]
    columns = found.pop("columns", None)
    parts = {part: None if array is None else torch.from_numpy(array) for part, array in found.items()}
    return ImageData(name, n_bins=n_bins, **parts) if columns is None else \
        tables.TableData(name, columns=columns, **parts)


def detect(path):
    """The format, a key of ``FORMATS``, of what lies at the path.

    Raises:
        ValueError: it is none of them, or ambiguous.
    """
    if cifar10.is_there(path):
        return "cifar10"
    if tables.is_there(path):
        return "table"
    if path.is_dir():
        if huggingface.is_there(path):
            return "huggingface"
        if imagenet.is_there(path):
            raise ValueError(f"format: {path} holds ImageNet's files; say which, imagenet32 or imagenet64")
        return "folder"
    raise ValueError(f"format: can't tell that of {path}; give one of {', '.join(FORMATS)}")


def _read(format, path, options):
    if format == "cifar10":
        return dict(zip(PARTS, cifar10.read(path, **options), strict=True))
    if format.startswith("imagenet"):
        return dict(zip(PARTS, imagenet.read(path, int(format.removeprefix("imagenet")), **options), strict=True))
    return {"folder": folders, "table": tables, "huggingface": huggingface}[format].read(path, **options)


def _check_options(format, options, known):
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"{unknown[0]}: {format} has no such option; it has {', '.join(sorted(known)) or 'none'}")
