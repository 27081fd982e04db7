"""Arrays from .npy and .npz files, never by pickle, and never larger than their file says."""

import math
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

from fastflow.data.files import DataFileError, naming

__all__ = ["read_npy", "read_npz"]

ERRORS = (ValueError, OSError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, NotImplementedError,
          RuntimeError, KeyError)
PIECE = 1 << 24  # bytes


def read_npy(path):
    """The array of a .npy file.

    Raises:
        DataFileError: it is truncated, longer than its header says, or holds Python objects.
    """
    with naming(path, *ERRORS), path.open("rb") as file:
        return _read(path, file, path.stat().st_size)


def read_npz(path, names=None):
    """{name: array} of a .npz file, of ``names`` or of all; the checksum of each is verified.

    Raises:
        DataFileError: it is truncated or corrupt, lacks a name, or holds Python objects.
    """
    found = {}
    with naming(path, *ERRORS), zipfile.ZipFile(path) as archive:
        there = {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}
        for name in there if names is None else names:
            if name not in there:
                raise DataFileError(path, f"has no array {name!r}, only {', '.join(sorted(there)) or 'none'}")
            with archive.open(there[name]) as file:
                found[name] = _read(path, file, there[name].file_size)
                file.read(1)  # zipfile compares the checksum at the end
    return found


def _read(path, file, size):
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataFileError(path, f"is in version {version} of the npy format, expected (1, 0) or (2, 0)")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in "biuf":
        raise DataFileError(path, f"holds {dtype}, expected numbers")
    promised = math.prod(shape) * dtype.itemsize  # before anything of that size is allocated
    if size - file.tell() != promised:
        raise DataFileError(path, f"has {size - file.tell()} bytes of data where its header promises {promised}; "
                                  "it is truncated or corrupt")
    data, done = np.empty(promised, np.uint8), 0
    while done < promised:  # in pieces, because zipfile's readinto makes a copy of what it reads
        n = file.readinto(data[done:done + PIECE])
        if not n:
            raise DataFileError(path, f"is truncated: {done} bytes of data of {promised}")
        done += n
    array = data.view(dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
