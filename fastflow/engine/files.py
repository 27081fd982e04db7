"""Files written whole or not at all, JSON, and logs read though a kill may have cut them short."""

import contextlib
import csv
import io
import json
import math
import os

__all__ = ["read_log", "to_json", "whole", "write_rows", "write_text"]


@contextlib.contextmanager
def whole(path):
    """A path beside ``path`` to write to, which takes its place at the end, or goes where that fails; an OSError then
    names ``path``."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # it is in place, or was never there
            temporary.unlink()


def write_text(path, text):
    """Writes a file in UTF-8, whatever the locale, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_rows(path, rows, columns):
    """Writes a tensor (N, D) as .csv under the names of its columns, as exact as float32 is; returns the path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([f"{value:.9g}" for value in row] for row in rows.tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
    return path


def to_json(value, indent=None):
    """The value as JSON, in which a number that is not finite is null: the format has no word for it."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path):
    """[dict] of a .jsonl file's lines, without those that are not whole; none for a missing file. A null, which stands
    for a number that was not finite, is NaN."""
    lines = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines
            if isinstance(line, dict) and isinstance(line.get("step"), int)]
