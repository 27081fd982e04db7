"""Tables of numbers from .npy, .npz, .csv and .parquet files."""

import csv
import functools
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastflow.data.arrays import read_npy, read_npz
from fastflow.data.files import TEST_NAMES, DataFileError, named_parts, naming, optional, split

if TYPE_CHECKING:
    import torch

__all__ = ["SUFFIXES", "TableData", "from_arrow", "is_there", "read"]

SUFFIXES = (".npy", ".npz", ".csv", ".parquet")
MISSING = ("", "na", "n/a", "null", "none", "-", "?")  # what a table may have in place of a number


@dataclass(frozen=True)
class TableData:
    """Rows of real numbers with a fixed split.

    Attributes:
        name: where they come from.
        train, test: (N, D) float32, all finite, as they stand in the file: neither scaled nor centred.
        columns: D names.
        validation: (N, D) float32, or None: rows of neither part, to choose a model by.
    """

    name: str
    train: "torch.Tensor"
    test: "torch.Tensor"
    columns: tuple
    validation: "torch.Tensor | None" = None

    @property
    def event_shape(self):
        """(D,)"""
        return tuple(self.train.shape[1:])

    def moments(self):
        """(mean, standard deviation) of each column over ``train``, (D,) float64; nothing of the other parts enters."""
        rows = self.train.double()
        return rows.mean(0), rows.std(0, correction=0)

    def standardized(self):
        """The same table with each column at mean 0 and standard deviation 1 over ``train``; a constant one at 0.

        Densities change by the product of the standard deviations.
        """
        mean, deviation = self.moments()
        deviation = deviation.where(deviation > 0, 1.0)
        train, test, validation = (None if part is None else ((part - mean) / deviation).to(part.dtype)
                                   for part in (self.train, self.test, self.validation))
        return TableData(self.name, train, test, self.columns, validation)

    def fingerprint(self):
        """SHA-256 over all parts: two tables with the same fingerprint hold the same rows in the same order."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self):
        digest = hashlib.sha256(f"{tuple(self.train.shape)}{tuple(self.test.shape)}".encode())
        for part in (self.train, self.test, self.validation):
            if part is not None:
                digest.update(part.contiguous().numpy())
        return digest.hexdigest()


def is_there(path):
    """Whether the path is a table, or a folder with a train table in it."""
    return path.suffix.lower() in SUFFIXES or bool(_parts(path))


def _parts(path):
    """{part: file} of a folder, or {}."""
    files = {name: path / f"{name}{suffix}" for name in ("train", *TEST_NAMES) for suffix in reversed(SUFFIXES)
             if (path / f"{name}{suffix}").is_file()}
    return {part: files[name] for part, name in named_parts(files).items()}


def read(path, test_fraction=0.1):
    """{"train", "test" and maybe "validation": float32 (N, D), "columns": their names}.

    Args:
        path: a file; or a folder with train.* and test.* (or val.*, valid.*, validation.* in its place, or beside it as
            the validation part). A .npz with arrays of these names brings its split too.
        test_fraction: share of the test part where the data have no split.

    Raises:
        DataFileError: a file is missing, truncated or corrupt, or holds something else than finite numbers.
    """
    if path.is_dir():
        files = _parts(path)
        if not files:
            raise DataFileError(path, f"holds no train and test table ({', '.join(SUFFIXES)})")
        tables = {part: _file(file)[""] for part, file in files.items()}
    else:
        tables = _file(path)
        files = dict.fromkeys(tables, path)
    if "" in tables:
        rows, columns = tables[""]
        train, test = split(len(rows), test_fraction, path)
        return {"train": rows[train], "test": rows[test], "columns": columns}
    _, columns = tables["train"]
    for part, (_, others) in tables.items():
        if others != columns:
            raise DataFileError(files[part], f"has columns {', '.join(others)}, the training part {', '.join(columns)}")
    return {part: rows for part, (rows, _) in tables.items()} | {"columns": columns}


def _file(path):
    """{part: (rows, columns)} of a file that brings a split, else {"": (rows, columns)}."""
    kind = path.suffix.lower()
    if kind == ".npy":
        found = _plain(path, read_npy(path))
    elif kind == ".npz":
        arrays = read_npz(path)
        if named := named_parts(arrays):
            return {part: _plain(path, arrays[name]) for part, name in named.items()}
        if len(arrays) == 1:
            found = _plain(path, next(iter(arrays.values())))
        else:
            raise DataFileError(path, f"expected one array, or train and test, got {', '.join(arrays) or 'none'}")
    elif kind == ".csv":
        found = _csv(path)
    elif kind == ".parquet":
        found = _parquet(path)
    else:
        raise DataFileError(path, f"expected one of {', '.join(SUFFIXES)}")
    return {"": found}


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
    with naming(path, OSError, ValueError, UnicodeDecodeError, csv.Error):
        with path.open(encoding="utf-8-sig", newline=None) as file:
            first = [field.strip() for field in next(csv.reader([file.readline()], skipinitialspace=True)) or [""]]
            named = not all(map(_is_number, first))
            if not named:
                file.seek(0)
            if named and not file.read(1):
                raise DataFileError(path, "holds no rows")
            gap = next((field for field in first if field.lower() in MISSING), None)
            if gap is not None and (not gap or any(map(_is_number, first))):
                raise DataFileError(path, f"line 1: {gap!r} is neither a number nor the name of a column")
            if any("\0" in field for field in first):
                raise DataFileError(path, "line 1: holds a NUL byte")
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
