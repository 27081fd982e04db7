"""Datasets as the Hugging Face library's ``save_to_disk`` leaves them.

They are Arrow streams with JSON beside them, and are read with pyarrow alone: the same files, without a library that
could run a loading script.
"""

import json
from pathlib import Path

import numpy as np

from fastflow.data.files import DataFileError, named_parts, naming, optional, split
from fastflow.data.folders import decode
from fastflow.data.tables import from_arrow

__all__ = ["is_there", "read"]

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
LABELS = ("label", "labels", "fine_label")
MAX_JSON_BYTES = 1 << 24


def is_there(path):
    """Whether the folder is a saved Dataset or DatasetDict."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read(path, size=None, test_fraction=0.1):
    """What folders.read gives, of images, or what tables.read gives, of a table.

    A dataset with a column of pictures gives those, and its column ``label`` where it has one; else all its columns are
    numbers and make a table.

    Args:
        path: what ``save_to_disk`` wrote, of a Dataset or of a DatasetDict with splits train and test (or validation
            in its place, or beside it).
        size: as in folders.read.
        test_fraction: share of the test part of a plain Dataset.

    Raises:
        DataFileError: a file is missing, truncated or corrupt; the columns are neither pictures nor numbers.
    """
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits", [])
        named = named_parts(splits if isinstance(splits, list) else [])
        if not named:
            raise DataFileError(path / "dataset_dict.json", f"expected splits train and test, got {splits}")
        parts = {name: _content(path / folder, _table(path / folder), size) for name, folder in named.items()}
        train, about = parts["train"]
        for name, (rows, columns) in parts.items():
            if rows.shape[1:] != train.shape[1:]:
                raise DataFileError(path / named[name], f"has examples {rows.shape[1:]}, the training part "
                                                        f"{train.shape[1:]}")
            if train.ndim == 2 and columns != about:
                raise DataFileError(path / named[name], f"has columns {', '.join(columns)}, the training part "
                                                        f"{', '.join(about)}")
        found = {name: rows for name, (rows, _) in parts.items()}
        if train.ndim == 2:
            return found | {"columns": about}
        return found | {f"{name}_labels": labels for name, (_, labels) in parts.items()}
    rows, about = _content(path, _table(path), size)
    indices = dict(zip(("train", "test"), split(len(rows), test_fraction, path), strict=True))
    found = {name: rows[index] for name, index in indices.items()}
    if rows.ndim == 2:
        return found | {"columns": about}
    return found | {f"{name}_labels": None if about is None else about[index] for name, index in indices.items()}


def _json(path):
    with naming(path, OSError, ValueError, RecursionError):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise DataFileError(path, f"is larger than {MAX_JSON_BYTES} bytes")
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise DataFileError(path, "does not hold an object")
    return found


def _table(folder):
    """The Arrow table of one split, checked to be whole."""
    arrow = optional("pyarrow", "tables", "reading Hugging Face datasets")
    state = _json(folder / "state.json")  # dataset_info.json goes on telling of the data that these were chosen from
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        fine = bool(names) and all(isinstance(n, str) and n == Path(n).name and n.endswith(".arrow") for n in names)
    except (KeyError, TypeError):
        fine = False
    if not fine or state.get("_indices_data_files"):
        raise DataFileError(folder / "state.json", "does not list .arrow files beside it, and no indices")
    tables = [_stream(arrow, folder / name) for name in names]
    with naming(folder, arrow.ArrowException):
        return arrow.concat_tables(tables)


def _stream(arrow, path):
    with naming(path, arrow.ArrowException, OSError, EOFError), path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(END_OF_STREAM)))
        if file.read() != END_OF_STREAM:
            raise DataFileError(path, "is truncated: the end of the Arrow stream is missing")
        file.seek(0)
        table = arrow.ipc.open_stream(file).read_all()
        table.validate(full=True)
        return table


def _content(folder, table, size):
    """(pictures, labels) or (rows, columns)."""
    types = optional("pyarrow.types", "tables", "reading Hugging Face datasets")
    pictures = [f.name for f in table.schema
                if types.is_struct(f.type) and {"bytes", "path"} == {inner.name for inner in f.type}]
    if not pictures:
        return from_arrow(folder, table)
    if len(pictures) > 1:
        raise DataFileError(folder, f"has several columns of pictures: {', '.join(pictures)}")
    cells = table.column(pictures[0]).to_pylist()
    names = [f"{folder}, {pictures[0]} {i}" for i in range(len(cells))]
    for name, cell in zip(names, cells, strict=True):
        if not cell or not cell["bytes"]:
            raise DataFileError(name, "is not inside the dataset, only its path is; save it with the pictures")
    if not cells:
        raise DataFileError(folder, "is empty")
    label = next((n for n in LABELS if n in table.column_names and types.is_integer(table.schema.field(n).type)), None)
    if label is not None and table.column(label).null_count:
        raise DataFileError(folder, f"column {label}: {table.column(label).null_count} values are missing")
    labels = None if label is None else table.column(label).to_numpy().astype(np.int64)
    return decode([cell["bytes"] for cell in cells], size, names), labels
