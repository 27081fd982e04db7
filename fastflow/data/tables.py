"""Tables of numbers from .npy, .npz, .csv and .parquet files."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastflow.data.arrays import read_npy, read_npz
from fastflow.data.files import DataFileError, naming, optional, split

if TYPE_CHECKING:
    import torch

__all__ = ["SUFFIXES", "TableData", "from_arrow", "is_there", "read"]

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
TEST_NAMES = ("test", "val", "valid", "validation")


@dataclass(frozen=True)
class TableData:
    """Rows of real numbers with a fixed split.

    Attributes:
        name: where they come from.
        train, test: (N, D) float32, all finite, as they stand in the file: neither scaled nor centred.
        columns: D names.
    """

    name: str
    train: "torch.Tensor"
    test: "torch.Tensor"
    columns: tuple

    @property
    def event_shape(self):
        """(D,)"""
        return tuple(self.train.shape[1:])

    def standardized(self):
        """The same table with each column at mean 0 and standard deviation 1 over ``train``; a constant one at 0.

        Densities change by the product of the standard deviations.
        """
        deviation, mean = self.train.double().std(0, correction=0), self.train.double().mean(0)
        deviation = deviation.where(deviation > 0, 1.0)
        parts = (((part - mean) / deviation).to(part.dtype) for part in (self.train, self.test))
        return TableData(self.name, *parts, self.columns)

    def fingerprint(self):
        """SHA-256 over both parts: two tables with the same fingerprint hold the same rows in the same order."""
        digest = hashlib.sha256(f"{tuple(self.train.shape)}{tuple(self.test.shape)}".encode())
        for part in (self.train, self.test):
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()


def is_there(path):
    """Whether the path is a table, or a folder with a train table in it."""
    return path.suffix.lower() in SUFFIXES or bool(_parts(path))


def _parts(path):
    """(train, test) files of a folder, or ()."""
    train = [f for f in (path / f"train{s}" for s in SUFFIXES) if f.is_file()]
    test = [f for f in (path / f"{n}{s}" for n in TEST_NAMES for s in SUFFIXES) if f.is_file()]
    return (train[0], test[0]) if train and test else ()


def read(path, test_fraction=0.1):
    """(train, test, names of the columns): float32 (N, D) twice.

    Args:
        path: a file; or a folder with train.* and test.* (or val.*, valid.*, validation.*). A .npz with arrays
            ``train`` and ``test`` (or val, ...) brings its split too.
        test_fraction: share of the test part where the data have no split.

    Raises:
        DataFileError: a file is missing, truncated or corrupt, or holds something else than finite numbers.
    """
    files = _parts(path) if path.is_dir() else (path,)
    if not files:
        raise DataFileError(path, f"holds no train and test table ({', '.join(SUFFIXES)})")
    tables = [part for file in files for part in _file(file)]
    if len(tables) == 1:
        (rows, columns), = tables
        return *(rows[index] for index in split(len(rows), test_fraction, path)), columns
    (train, columns), (test, others) = tables
    if others != columns:
        raise DataFileError(files[-1], f"has columns {', '.join(others)}, the training part {', '.join(columns)}")
    return train, test, columns


def _file(path):
    """The (rows, columns) of the file: of one table, or of train and test."""
    kind = path.suffix.lower()
    if kind == ".npy":
        found = [_plain(path, read_npy(path))]
    elif kind == ".npz":
        arrays = read_npz(path)
        held_out = next((n for n in TEST_NAMES if n in arrays), None)
        if "train" in arrays and held_out:
            found = [_plain(path, arrays["train"]), _plain(path, arrays[held_out])]
        elif len(arrays) == 1:
            found = [_plain(path, next(iter(arrays.values())))]
        else:
            raise DataFileError(path, f"expected one array, or train and test, got {', '.join(arrays) or 'none'}")
    elif kind == ".csv":
        found = [_csv(path)]
    elif kind == ".parquet":
        found = [_parquet(path)]
    else:
        raise DataFileError(path, f"expected one of {', '.join(SUFFIXES)}")
    return found


def _plain(path, array):
    if array.ndim != 2:
        raise DataFileError(path, f"expected a table (N, D), got shape {array.shape}")
    return _checked(path, array, tuple(f"x{i}" for i in range(array.shape[1])))


def _checked(path, array, columns):
    if not array.size:
        raise DataFileError(path, "is empty")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(array, np.float32)
    bad = np.argwhere(~np.isfinite(rows))
    if len(bad):
        row, column = bad[0]
        raise DataFileError(path, f"row {row}, column {columns[column]}: {array[row, column]} is missing, not finite "
                                  f"or too large for float32 ({len(bad)} such values)")
    return rows, columns


def _csv(path):
    """Commas between numbers; a first line that isn't numbers names the columns."""
    with naming(path, OSError, ValueError, UnicodeDecodeError):
        with path.open(encoding="utf-8-sig", newline=None) as file:
            first = [field.strip().strip('"') for field in file.readline().split(",")]
            named = not all(map(_is_number, first))
            if not named:
                file.seek(0)
            if named and not file.read(1):
                raise DataFileError(path, "holds no rows")
        with path.open(encoding="utf-8-sig", newline=None) as file:
            array = np.loadtxt(file, np.float64, comments=None, delimiter=",", quotechar='"', skiprows=int(named),
                               ndmin=2)
    if array.shape[1] != len(first):
        raise DataFileError(path, f"has {len(first)} columns in its first line and {array.shape[1]} below")
    return _checked(path, array, tuple(first) if named else tuple(f"x{i}" for i in range(len(first))))


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path):
    parquet = optional("pyarrow.parquet", "tables", "reading Parquet")
    arrow = optional("pyarrow", "tables", "reading Parquet")
    with naming(path, arrow.ArrowException, OSError):
        table = parquet.ParquetFile(path, page_checksum_verification=True).read()
    return from_arrow(path, table)


def from_arrow(path, table):
    """(rows, columns) of an Arrow table whose columns are numbers, or lists of equally many numbers."""
    types = optional("pyarrow.types", "tables", "reading Arrow")
    parts, names = [], []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.null_count:
            raise DataFileError(path, f"column {name}: {column.null_count} values are missing")
        kind = column.type
        if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
            parts.append(column.to_numpy().astype(np.float64)[:, None])
            names.append(name)
            continue
        if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
            raise DataFileError(path, f"column {name}: expected numbers, got {kind}")
        with naming(path, ValueError, TypeError):
            rows = np.array(column.to_pylist(), np.float64)
        parts.append(rows.reshape(len(rows), -1))
        names += [f"{name}.{i}" for i in range(parts[-1].shape[1])]
    if not parts:
        raise DataFileError(path, "has no columns")
    return _checked(path, np.concatenate(parts, 1), tuple(names))
