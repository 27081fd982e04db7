"""Data by name or by path, in whatever format they lie there."""

import importlib
from pathlib import Path

from fastflow.data import cifar10, folders, huggingface, imagenet, tables
from fastflow.data.images import ImageData

__all__ = ["DATASETS", "FORMATS", "load"]

DATASETS = {"digits": ((1, 8, 8), 17), "photos": ((3, 32, 32), 256)}  # name: image shape, levels
# format: image shape and levels, or None where the data decide
FORMATS = {"cifar10": ((3, 32, 32), 256), "imagenet32": ((3, 32, 32), 256), "imagenet64": ((3, 64, 64), 256),
           "folder": None, "table": None, "huggingface": None}
OPTIONS = {"cifar10": {"verify"}, "imagenet32": set(), "imagenet64": set(), "folder": {"size", "test_fraction"},
           "table": {"test_fraction"}, "huggingface": {"size", "test_fraction"}}


def load(name, *, format=None, **options):
    """The dataset of that name or at that path, the same examples in the same order at every call.

    ============ ========================================================================== ===================
    format       what lies at the path                                                      options
    ============ ========================================================================== ===================
    cifar10      the python or binary version, .tar.gz or extracted                         verify
    imagenet32   the npz files of downsampled ImageNet                                      (none)
    imagenet64   the same, 64x64                                                            (none)
    folder       pictures, in train and test or in one folder                               size, test_fraction
    table        .npy, .npz, .csv or .parquet, or a folder with train.* and test.*          test_fraction
    huggingface  what ``save_to_disk`` wrote: pictures or numbers                           size, test_fraction
    ============ ========================================================================== ===================

    Nothing is downloaded and nothing in a file is run.

    Args:
        name: a key of ``DATASETS``, which maps it to (image shape, levels), or a path.
        format: a key of ``FORMATS``; None finds it out.
        verify: compare with the checksums that CIFAR-10's source publishes (default True).
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
    import torch  # here, so that the names of the datasets cost no import of torch

    if format is not None and format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if format is None and name in DATASETS:
        _check_options(name, options, set())
        train, test = importlib.import_module(f"fastflow.data.{name}").read()
        return ImageData(name, torch.from_numpy(train), torch.from_numpy(test), DATASETS[name][1])
    path = Path(name)
    if not path.exists():
        if format is None and len(path.parts) == 1 and not path.suffix:
            raise ValueError(f"name: expected one of {', '.join(DATASETS)} or a path, got {str(name)!r}")
        raise FileNotFoundError(2, "there are no data", str(path))
    format = detect(path) if format is None else format
    _check_options(format, options, OPTIONS[format])
    found = _read(format, path, options)
    train, test = map(torch.from_numpy, found[:2])
    if len(found) == 3:
        return tables.TableData(str(name), train, test, found[2])
    labels = (None if part is None else torch.from_numpy(part) for part in found[2:])
    return ImageData(str(name), train, test, 256, *labels)


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
        return cifar10.read(path, **options)
    if format.startswith("imagenet"):
        return imagenet.read(path, int(format.removeprefix("imagenet")))
    return {"folder": folders, "table": tables, "huggingface": huggingface}[format].read(path, **options)


def _check_options(format, options, known):
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"{unknown[0]}: {format} has no such option; it has {', '.join(sorted(known)) or 'none'}")
