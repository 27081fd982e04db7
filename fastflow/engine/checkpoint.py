"""Checkpoints: tensors in safetensors, the rest in JSON, a manifest of SHA-256 over both. Nothing is ever unpickled.

    DIR/step-000100/model.safetensors, ...   state.json   manifest.json

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a name that a reader accepts is
complete. Reading checks every byte against the manifest before it is parsed.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

from fastflow.engine.errors import CheckpointError

__all__ = ["Checkpoint", "clean", "find", "load", "newest", "save", "step_of"]

FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{1,12})")
FILE_NAME = re.compile(r"[a-z_]{1,40}\.(safetensors|json)")
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors`` is {file stem: {name: tensor}}, ``state`` what was given to :func:`save`."""

    path: Path
    step: int
    tensors: dict
    state: dict


def find(directory):
    """[(step, path)] of the checkpoints in ``directory``, oldest first; temporary and foreign names are ignored."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    named = ((step_of(path), path) for path in directory.iterdir())
    return sorted(pair for pair in named if pair[0] is not None)


def step_of(path):
    """The step that a checkpoint's name states, or None if it is not one's name."""
    match = STEP_NAME.fullmatch(Path(path).name)
    return int(match.group(1)) if match else None


def clean(directory):
    """Removes what interrupted writers left behind."""
    for path in Path(directory).glob(".step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def save(directory, step, tensors, state, keep=0):
    """Writes one checkpoint and returns its path; an older one of the same step gives way only to the complete new one.

    Args:
        directory: where ``step-NNNNNN`` goes.
        step: how many training steps it holds.
        tensors: {file stem: {name: tensor}}; tensors are copied to contiguous CPU memory.
        state: what JSON can hold.
        keep: afterwards delete all but this many of the newest checkpoints; 0 keeps all.

    Raises:
        CheckpointError: the disk refused; what was there before is intact.
    """
    from safetensors.torch import save as to_bytes

    directory = Path(directory)
    final = directory / f"step-{step:06d}"
    temporary = directory / f".{final.name}.tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        contents = {STATE: json.dumps({"format": FORMAT, "step": step, **state}, indent=1).encode()}
        for stem, named in tensors.items():
            copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in named.items()}
            contents[f"{stem}.safetensors"] = to_bytes(copies)
        files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                 for name, data in contents.items()}
        contents[MANIFEST] = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()
        for name, data in contents.items():
            _write(temporary / name, data)
        _sync(temporary)
        replaced = directory / f".{final.name}.tmp-{uuid.uuid4().hex}"
        if final.exists():
            final.rename(replaced)
        try:
            temporary.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        _sync(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{final}: could not be written ({error.strerror or error}); "
                              f"earlier checkpoints are intact") from error
    for _, path in find(directory)[:-keep] if keep else ():
        shutil.rmtree(path, ignore_errors=True)
    return final


def load(path):
    """The checkpoint at ``path``, every byte verified.

    Raises:
        CheckpointError: a file is missing, foreign, altered, truncated, of another step or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    path = Path(path)
    step = step_of(path)
    if step is None or path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path}: not a checkpoint directory")
    manifest = _parse(path / MANIFEST, _read(path / MANIFEST, MAX_JSON_BYTES))
    files = manifest.get("files")
    _expect(path / MANIFEST, manifest, step)
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{path / MANIFEST}: lists no {STATE}")
    tensors, state = {}, None
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            raise CheckpointError(f"{path / MANIFEST}: has an entry that can't be: {name!r}")
        data = _read(path / name, entry["bytes"])
        if len(data) != entry["bytes"]:
            raise CheckpointError(f"{path / name}: truncated, {len(data)} bytes of {entry['bytes']}")
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise CheckpointError(f"{path / name}: corrupt, its SHA-256 is not the manifest's")
        if name == STATE:
            state = _parse(path / name, data)
        elif name.endswith(".safetensors"):
            try:
                tensors[name.removesuffix(".safetensors")] = from_bytes(data)
            except (SafetensorError, ValueError, KeyError) as error:
                raise CheckpointError(f"{path / name}: not a safetensors file ({error})") from error
    _expect(path / STATE, state, step)
    return Checkpoint(path, step, tensors, state)


def newest(directory, warn):
    """The newest readable checkpoint in ``directory``, or None if there is none at all; ``warn(message)`` hears of each
    bad one that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    found = find(directory)
    for _, path in reversed(found):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"passing over a bad checkpoint: {error}")
    if found:
        raise CheckpointError(f"{directory}: none of its {len(found)} checkpoints can be read")
    return None


def _write(path, data):
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path, limit):
    """At most ``limit`` + 1 bytes of a regular file, symbolic links refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise CheckpointError(f"{path}: {status.st_size} bytes, expected at most {limit}")
        return file.read()


def _parse(path, data):
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _expect(path, value, step):
    if value.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {value.get('format')!r}, this version reads {FORMAT}")
    if value.get("step") != step:
        raise CheckpointError(f"{path}: of step {value.get('step')!r} in a directory named for step {step}")
