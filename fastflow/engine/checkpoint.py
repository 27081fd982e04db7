"""Checkpoints: tensors in safetensors, the rest in JSON, a manifest of SHA-256 over both. Nothing is ever unpickled.

    DIR/step-000100/model.safetensors, ...   state.json   manifest.json

A checkpoint is written under a temporary name, flushed to the disk and renamed, so a name that a reader accepts is
complete. Reading checks every byte against the manifest before it is parsed. Tensors that are dense in another order
than the row-major one, such as channels-last weights, are stored row-major and come back in their own order.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from fastflow.engine.errors import CheckpointError

__all__ = ["Checkpoint", "clean", "find", "load", "newest", "path_of", "put_back", "save", "step_of"]

FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{1,12})")
FILE_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}\.(safetensors|json)")
TEMPORARY = re.compile(r"\.(step-\d{1,12})\.(tmp|old)-[0-9a-z]+")
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_JSON_BYTES = 1 << 24
ORDERS = "memory_order"  # in state.json: {file stem: {tensor: its dimensions from the largest stride to the smallest}}


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


def path_of(directory, step):
    """Where the checkpoint of that step goes in ``directory``."""
    return Path(directory) / f"step-{step:06d}"


def put_back(directory):
    """Gives a checkpoint that an interrupted writer was about to replace its name again. Several processes may do it at
    once, but no writer may be at work."""
    directory = Path(directory)
    for path in list(directory.iterdir()) if directory.is_dir() else ():
        match = TEMPORARY.fullmatch(path.name)
        if match and match[2] == "old" and not (directory / match[1]).exists():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                path.rename(directory / match[1])


def clean(directory):
    """Removes what interrupted writers left behind, after :func:`put_back`."""
    put_back(directory)
    directory = Path(directory)
    for path in directory.iterdir() if directory.is_dir() else ():
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def save(directory, step, tensors, state, keep=0, spare=None):
    """Writes one checkpoint and returns its path; an older one of the same step gives way only to the complete new one.

    Args:
        directory: where ``step-NNNNNN`` goes.
        step: how many training steps it holds.
        tensors: {file stem: {name: tensor}}; copied to the CPU; a stem is a letter, then a-z, 0-9, _.
        state: what JSON can hold, without the keys "format", "step" and "memory_order".
        keep: afterwards delete the older checkpoints but the keep - 1 newest of them; 0 keeps all. What states a later
            step stays: this one was written after a bad checkpoint of that step was passed over.
        spare: the step of one to keep in any case.

    Raises:
        ValueError: a stem or a key of ``state`` that can't be.
        CheckpointError: the disk refused; what was there before is intact.
    """
    from safetensors.torch import save as to_bytes

    directory = Path(directory)
    final = path_of(directory, step)
    temporary, replaced = (directory / f".{final.name}.{kind}-{uuid.uuid4().hex}" for kind in ("tmp", "old"))
    if taken := {"format", "step", ORDERS} & state.keys():
        raise ValueError(f"state: the keys {', '.join(sorted(taken))} are the checkpoint's own")
    for stem in tensors:
        if not FILE_NAME.fullmatch(f"{stem}.safetensors"):
            raise ValueError(f"tensors: {stem!r} can't name a file of a checkpoint")
    try:
        temporary.mkdir(parents=True)
        orders = {stem: {name: order for name, t in named.items() if (order := _memory_order(t)) is not None}
                  for stem, named in tensors.items()}
        files = {STATE: _write(temporary / STATE, json.dumps({"format": FORMAT, "step": step, ORDERS: orders, **state},
                                                             indent=1).encode())}
        for stem, named in tensors.items():  # one file's bytes at a time
            files[f"{stem}.safetensors"] = _write(temporary / f"{stem}.safetensors", to_bytes(
                {name: t.detach().to("cpu", copy=True).contiguous() for name, t in named.items()}))
        _write(temporary / MANIFEST, json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode())
        _sync(temporary)
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
    older = [pair for pair in find(directory) if pair[0] < step]
    for old, path in older[:len(older) - keep + 1] if keep and len(older) >= keep else ():
        if old != spare:
            _remove(path)
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
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST or not isinstance(entry, dict) \
                or type(entry.get("bytes")) is not int or not isinstance(entry.get("sha256"), str):
            raise CheckpointError(f"{path / MANIFEST}: has an entry that can't be: {name!r}")
    try:
        foreign = sorted(set(os.listdir(path)) - files.keys() - {MANIFEST})
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if foreign:
        raise CheckpointError(f"{path / foreign[0]}: is not in the manifest")
    tensors, state = {}, None
    for name, entry in files.items():
        data = _verified(path / name, entry["bytes"], entry["sha256"])
        if name == STATE:
            state = _parse(path / name, data)
        elif name.endswith(".safetensors"):
            try:
                # Sorted: safetensors' order is another in every process, and processes place shards together.
                tensors[name.removesuffix(".safetensors")] = dict(sorted(from_bytes(data).items()))
            except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
                raise CheckpointError(f"{path / name}: not a safetensors file ({error})") from error
    _expect(path / STATE, state, step)
    _reorder(path / STATE, tensors, state.pop(ORDERS, {}))
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


def _memory_order(tensor):
    """The dimensions from the largest stride to the smallest if that makes a dense tensor, and not the row-major one;
    otherwise None."""
    if tensor.layout is not torch.strided or tensor.is_contiguous() or 0 in tensor.stride():
        return None
    order = sorted(range(tensor.ndim), key=lambda d: (-tensor.stride(d), d))
    return order if tensor.permute(order).is_contiguous() else None


def _reorder(path, tensors, orders):
    """Gives tensors, in place of the dicts' entries, the memory order that they were saved from."""
    try:
        for stem, named in orders.items():
            for name, order in named.items():
                tensor = tensors[stem][name]
                tensors[stem][name] = torch.empty_permuted(tensor.shape, order, dtype=tensor.dtype).copy_(tensor)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: has a {ORDERS} that can't be ({error})") from error


def _remove(path):
    """Deletes a checkpoint that is never seen half deleted."""
    gone = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        path.rename(gone)
    except OSError:
        return  # one too many is no harm
    shutil.rmtree(gone, ignore_errors=True)


def _write(path, data):
    """Writes a new file through to the disk; its entry in the manifest."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verified(path, n_bytes, sha256):
    """The bytes of a file that has just these."""
    data = _read(path, n_bytes)
    if len(data) != n_bytes:
        raise CheckpointError(f"{path}: truncated, {len(data)} bytes of {n_bytes}")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path}: corrupt, its SHA-256 is not the manifest's")
    return data


def _read(path, limit):
    """The bytes of a regular file of at most ``limit``; symbolic links are refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path}: not a regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > limit:
            raise CheckpointError(f"{path}: {status.st_size} bytes, expected at most {limit}")
        try:
            return file.read()
        except (OSError, MemoryError) as error:
            raise CheckpointError(f"{path}: can't be read ({getattr(error, 'strerror', None) or 'out of memory'})") \
                from error


def _parse(path, data):
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _unique(pairs):
    """A JSON object; a key that comes twice would mean one thing to us and another to the next reader."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value


def _expect(path, value, step):
    if type(value.get("format")) is not int or value["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {value.get('format')!r}, this version reads {FORMAT}")
    if type(value.get("step")) is not int or value["step"] != step:
        raise CheckpointError(f"{path}: of step {value.get('step')!r} in a directory named for step {step}")
