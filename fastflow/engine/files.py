"""Files written whole or not at all, and logs read though a kill may have cut them short."""

import json
import os

__all__ = ["read_log", "write_text"]


def write_text(path, text):
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def read_log(path):
    """[dict] of a .jsonl file's lines, without those that are not whole; none for a missing file."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]
