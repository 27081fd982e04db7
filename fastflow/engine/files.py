"""Files written whole or not at all, and logs read though a kill may have cut them short."""

import csv
import io
import json
import os

__all__ = ["read_log", "write_rows", "write_text"]


def write_text(path, text):
    """Writes a file whole or not at all, in UTF-8 whatever the locale is."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, "utf-8")
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


def read_log(path):
    """[dict] of a .jsonl file's lines, without those that are not whole; none for a missing file."""
    lines = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
