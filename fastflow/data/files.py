"""What all readers share: the error that names a file, published checksums, lists of files, a fixed split."""

import contextlib
import hashlib

import numpy as np

__all__ = ["DataFileError", "check_md5", "naming", "optional", "split"]


class DataFileError(ValueError):
    """A file of data is truncated, corrupt or not what its name promises; the message starts with its path."""

    def __init__(self, path, reason):
        super().__init__(f"{path}: {' '.join(str(reason).split())}")
        self.path = path


@contextlib.contextmanager
def naming(path, *kinds):
    """Turns errors of these kinds inside into a :class:`DataFileError` of ``path``."""
    try:
        yield
    except DataFileError:
        raise
    except kinds as error:
        raise DataFileError(path, f"can't be read: {error or type(error).__name__}") from error


def check_md5(path, published):
    """DataFileError unless the file has the MD5 that its source publishes: a guard against damage, not attackers."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5") if hasattr(hashlib, "file_digest") else hashlib.md5(file.read())
    if found.hexdigest() != published:
        raise DataFileError(path, f"has MD5 {found.hexdigest()}, published is {published}; the file is damaged or "
                                  "changed (verify=False reads it all the same)")


def optional(module, extra, purpose):
    """The optional library, imported; ImportError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        message = f"{purpose} needs {name}, which is not installed: pip install 'fastflow[{extra}]'"
        raise ModuleNotFoundError(message, name=name) from error


def split(n, test_fraction, path):
    """(train, test): row numbers of a fixed split of n rows, in ascending order.

    The rows are drawn by numpy's RandomState with seed 0, whose stream numpy keeps the same in all versions.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction: expected a number between 0 and 1, got {test_fraction!r}")
    n_test = round(n * test_fraction)
    if not 0 < n_test < n:
        raise DataFileError(path, f"holds {n} examples, too few for a test part of {test_fraction:g}")
    order = np.random.RandomState(0).permutation(n)
    return np.sort(order[n_test:]), np.sort(order[:n_test])
