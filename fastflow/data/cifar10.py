"""CIFAR-10 (Krizhevsky 2009) from the python or the binary version, as its .tar.gz or extracted.

The python version is pickled. It is read by an unpickler that knows five names, none of which runs code: arrays and
their types become inert records that are checked field by field.
"""

import io
import pickle
import tarfile
import zlib

import numpy as np

from fastflow.data.files import DataFileError, check_md5, naming

__all__ = ["ARCHIVES", "BATCHES", "is_there", "read"]

SHAPE = (3, 32, 32)
PIXELS = 3072
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST = "test_batch"
FOLDERS = {"": "cifar-10-batches-py", ".bin": "cifar-10-batches-bin"}
# MD5 of https://www.cs.toronto.edu/~kriz/cifar.html; those of the batches follow from the archive's.
ARCHIVES = {"": "c58f30108f718f92721af3b95e74349a", ".bin": "c32a1d4ab5d03f1284b67883e8d87530"}
BATCHES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
MAX_BATCH_BYTES = 1 << 26  # twice the size of a batch


def is_there(path):
    """Whether the path looks like CIFAR-10: an archive of that name, or a folder with the batches."""
    return path.name.startswith("cifar-10") and path.name.endswith((".tar.gz", ".tgz")) or _folder(path) is not None


def read(path, verify=True):
    """(train, test, train labels, test labels): uint8 (N, 3, 32, 32) twice, int64 (N,) twice.

    Args:
        path: the .tar.gz, the folder that it extracts to, or the folder above that one.
        verify: compare MD5 with what the source publishes (of the archive, or of extracted python batches), and the
            number of images of binary batches.

    Raises:
        DataFileError: a file is missing, truncated, corrupt or not CIFAR-10.
    """
    if path.is_dir():
        found = _folder(path)
        if found is None:
            raise DataFileError(path, f"lacks {TRAIN[0]} and {TRAIN[0]}.bin, which CIFAR-10 would have")
        folder, suffix = found
        batches = (_extracted(folder / f"{name}{suffix}", name, suffix, verify) for name in (*TRAIN, TEST))
    else:
        batches = _archived(path, verify)
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images[:-1]), images[-1], np.concatenate(labels[:-1]), labels[-1]


def _folder(path):
    """(folder with the batches, suffix of their names) at or below the path, or None."""
    for suffix, name in FOLDERS.items():
        for folder in (path, path / name):
            if (folder / f"{TRAIN[0]}{suffix}").is_file():
                return folder, suffix
    return None


def _extracted(path, name, suffix, verify):
    if not path.is_file():
        raise DataFileError(path, "is missing")
    if path.stat().st_size > MAX_BATCH_BYTES:
        raise DataFileError(path, f"has {path.stat().st_size} bytes, too many for a batch of CIFAR-10")
    if verify and not suffix:
        check_md5(path, BATCHES[name])
    return _batch(path, path.read_bytes(), suffix, verify)


def _archived(path, verify):
    """The batches in order, read inside the archive: nothing is extracted."""
    found = {}
    with naming(path, tarfile.TarError, OSError, EOFError, zlib.error), tarfile.open(path, "r:gz") as archive:
        for member in archive:
            for suffix, folder in FOLDERS.items():
                name = member.name.removeprefix("./").removeprefix(f"{folder}/").removesuffix(suffix)
                if member.name.removeprefix("./") == f"{folder}/{name}{suffix}" and name in (*TRAIN, TEST):
                    if not member.isreg() or member.size > MAX_BATCH_BYTES:
                        raise DataFileError(path, f"{member.name} is not a batch of CIFAR-10")
                    found[suffix, name] = archive.extractfile(member).read()
    suffix = ".bin" if (".bin", TRAIN[0]) in found else ""
    if verify:
        check_md5(path, ARCHIVES[suffix])
    for name in (*TRAIN, TEST):
        if (suffix, name) not in found:
            raise DataFileError(path, f"lacks {FOLDERS[suffix]}/{name}{suffix}")
        yield _batch(f"{path}/{FOLDERS[suffix]}/{name}{suffix}", found[suffix, name], suffix, verify)


def _batch(path, data, suffix, verify):
    """(images (N, 3, 32, 32) uint8, labels (N,) int64) from the bytes of a batch."""
    pixels, labels = (_binary(path, data, verify) if suffix else _pickled(path, data))
    if np.any((labels < 0) | (labels > 9)):
        raise DataFileError(path, "holds labels outside 0 to 9")
    return pixels.reshape(-1, *SHAPE), labels.astype(np.int64)


def _binary(path, data, verify):
    """Rows of one byte for the label and 3072 for the pixels."""
    if not data or len(data) % (PIXELS + 1):
        raise DataFileError(path, f"has {len(data)} bytes, expected a multiple of {PIXELS + 1}; it is truncated")
    rows = np.frombuffer(data, np.uint8).reshape(-1, PIXELS + 1)
    if verify and len(rows) != 10000:
        raise DataFileError(path, f"holds {len(rows)} images, expected 10000 (verify=False reads it all the same)")
    return rows[:, 1:].copy(), rows[:, 0]


def _pickled(path, data):
    """The array and the labels of a pickled batch."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        pixels, labels = batch["data"], batch["labels"]
        labels = np.asarray(labels)
        pixels = pixels.array() if isinstance(pixels, _Array) else None
    except Exception as error:  # a damaged pickle raises anything
        reason = error if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {error}"
        raise DataFileError(path, f"is not a batch of CIFAR-10, truncated or corrupt ({reason})") from error
    if labels.dtype.kind not in "iu":
        raise DataFileError(path, f"has labels of type {labels.dtype}, expected integers")
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != PIXELS or labels.shape != pixels.shape[:1]:
        raise DataFileError(path, f"does not hold rows of {PIXELS} pixels with a label each")
    return pixels, labels


class _DType:
    """Stands for numpy.dtype; only unsigned bytes are accepted."""

    def __init__(self, name="", *_):
        if name != "u1":
            raise pickle.UnpicklingError(f"expected an array of bytes, got {name!r}")

    def __setstate__(self, state):
        pass


class _Array:
    """Stands for an array of bytes: keeps what was pickled and builds it after checking."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def array(self):
        _, shape, dtype, fortran, data = self.state
        if not isinstance(dtype, _DType):
            raise pickle.UnpicklingError("expected an array of bytes")
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("expected the bytes of an array")
        return np.frombuffer(bytearray(data), np.uint8).reshape(shape, order="F" if fortran else "C")


def _from_buffer(data, dtype, shape, order):
    """Stands for the function by which numpy writes arrays into pickles of protocol 5."""
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"expected an array in C or F order, got {order!r}")
    found = _Array()
    found.state = 1, shape, dtype, order == "F", data
    return found


def _encode(text, encoding):
    """Stands for codecs.encode, by which Python 3 writes bytes into old pickles."""
    return text.encode("latin1" if encoding == "latin1" else "ascii")


class _Unpickler(pickle.Unpickler):
    ADMITTED = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType,
                ("numpy.core.multiarray", "_reconstruct"): _Array, ("_codecs", "encode"): _encode,
                ("numpy.core.numeric", "_frombuffer"): _from_buffer}

    def find_class(self, module, name):
        try:
            return self.ADMITTED[module.replace("numpy._core", "numpy.core"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of CIFAR-10; nothing of it was run") from None

    def persistent_load(self, _):
        raise pickle.UnpicklingError("persistent objects are not part of CIFAR-10")
