"""Files written whole or not at all."""

import csv
import io
import os

__all__ = ["write_rows", "write_text"]


def write_text(path, text):
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def write_rows(path, rows, columns):
    """Writes a tensor (N, D) as .csv under the names of its columns, as exact as float32 is; returns the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" for value in row] for row in rows.tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    return path
