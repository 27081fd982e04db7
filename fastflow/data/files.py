"""What all readers share: the error that names a file, published checksums, locks, lists of files, a fixed split."""

import contextlib
import errno
import hashlib
import numbers

import numpy as np

try:
    import fcntl
except ModuleNotFoundError:  # only Unix has it
    fcntl = None

__all__ = ["TEST_NAMES", "VALIDATION_NAMES", "DataFileError", "check_md5", "lock", "named_parts", "naming", "optional",
           "split"]

VALIDATION_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", *VALIDATION_NAMES)  # without a test part, the validation part is the one held out


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


def lock(file, wait=True):
    """Locks an open file until it is closed or the process ends, however it does; returns whether it is locked, which
    not every file system can do.

    Raises:
        BlockingIOError: another one has locked it, and this one is not to wait.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS):
            raise
        return False
    return True


def optional(module, extra, purpose):
    """The optional library, imported; ImportError that says how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        message = f"{purpose} needs {name}, which is not installed: pip install 'fastflow[{extra}]'"
        raise ModuleNotFoundError(message, name=name) from error


def named_parts(there):
    """{"train", "test" and "validation" where there is one: its name} among the names that data bring, such as those of
    folders, or {} if they bring no split."""
    test = next((name for name in TEST_NAMES if name in there), None)
    validation = next((name for name in VALIDATION_NAMES if name in there and name != test), None)
    if "train" not in there or test is None:
        return {}
    return {"train": "train", "test": test} | ({} if validation is None else {"validation": validation})


def split(n, fraction, path, name="test_fraction"):
    """(rest, held out): row numbers of a fixed split of n rows, in ascending order.

    The rows are drawn by numpy's RandomState with seed 0, whose stream numpy keeps the same in all versions.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {type(fraction).__name__}")
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {fraction!r}")
    n_held_out = round(n * fraction)
    if not 0 < n_held_out < n:
        raise DataFileError(path, f"holds {n} examples, too few for {name}={fraction:g}")
    order = np.random.RandomState(0).permutation(n)
    return np.sort(order[n_held_out:]), np.sort(order[:n_held_out])
