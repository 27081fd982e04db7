"""Large arrays as one .npy file each, written once and mapped into the memory that all processes of a machine share."""

import contextlib
import errno
import hashlib
import os

import numpy as np
from numpy.lib import format as npy

from fastflow.data.files import DataFileError, lock

__all__ = ["mapped", "stamp"]


def stamp(files):
    """16 hex digits that change with the name, size or time of change of any of the files."""
    told = [(f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def mapped(path, shape, parts):
    """The uint8 array of this shape in the .npy file ``path``, which is written if it is not there; what is written to
    the array afterwards is this process's own, and does not reach the file.

    The file appears under its name whole or not at all; of several processes one writes it and the others wait.

    Args:
        path: where the file is or is to be; its folder is made.
        shape: of the array.
        parts: a function without arguments, an iterable of uint8 arrays that make up the array along its first
            dimension; called only if there is no file.

    Raises:
        DataFileError: the file can't be written, or is not what this function writes.
    """
    if not path.is_file():
        with _unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.with_suffix(".lock").open("w")
        with file:
            with _unwritable(path):
                locked = lock(file)
            if not path.is_file():
                with _unwritable(path):
                    for left in path.parent.glob(f"{path.stem}.tmp-*") if locked else ():  # by one that was killed
                        left.unlink(missing_ok=True)
                _write(path, shape, parts)
    try:
        array = _load(path)
    except (ValueError, OSError, EOFError) as error:
        raise DataFileError(path, f"can't be read ({error}); delete it, and it is made anew") from error
    if array.shape != tuple(shape) or array.dtype != np.uint8 or not array.flags.c_contiguous:
        raise DataFileError(path, f"holds {array.dtype} {array.shape}, expected uint8 {tuple(shape)}; delete it, and "
                                  "it is made anew")
    return array


def _load(path):
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return np.load(path, mmap_mode="r", allow_pickle=False)  # the machine has no memory for a copy of all of it


def _write(path, shape, parts):
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        with _unwritable(path):
            file = temporary.open("wb")
            npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
        with file:
            for part in parts():
                with _unwritable(path):  # writing, unlike a mapping, says it when the disk is full
                    file.write(np.ascontiguousarray(part).data)
            with _unwritable(path):
                file.flush()
                os.fsync(file.fileno())
        with _unwritable(path):
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _unwritable(path):
    try:
        yield
    except OSError as error:
        raise DataFileError(path, f"can't be written ({error.strerror or error}); data.cache says where such files "
                                  "are to be") from error
