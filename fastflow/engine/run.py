"""Runs on disk: where one goes, and the trained model of one that is there."""

import contextlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from fastflow.engine import checkpoint
from fastflow.engine.errors import CheckpointError, RunError
from fastflow.engine.models import build_model, load_weights
from fastflow.engine.settings import Settings, from_dict

__all__ = ["TrainedModel", "check_directory", "checkpoint_to_resume", "default_directory", "load_trained"]


@dataclass(frozen=True)
class TrainedModel:
    """A model as its run left it: averaged weights where the run kept an average. ``data`` is the fingerprint of what
    it was trained on, None where the run kept none."""

    model: torch.nn.Module
    settings: Settings
    step: int
    path: Path
    data: str | None

    def doubt(self, examples, unit):
        """What is to be said of held-out figures of these examples, "" if the run had the same, split alike."""
        if self.data in (None, examples.fingerprint()):
            return ""
        return (f"{examples.name} holds other {unit} than in training, which may have seen some of those that are held "
                "out now")


@contextlib.contextmanager
def default_directory(title, resume):
    """runs/TITLE, or with a number behind it: the last one that exists if ``resume``, else the first that doesn't. One
    process alone makes it, so that another run begun at the same time takes the next; nothing of it is left if the run
    inside writes nothing."""
    names = itertools.chain([title], (f"{title}-{i}" for i in itertools.count(2)))
    paths = (Path("runs") / name for name in names)
    path = next(paths)
    if resume:
        for following in paths:
            if not following.exists():
                break
            path = following
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:  # all must find the same
        while path.exists():
            path = next(paths)
    else:
        while not _made(path):
            path = next(paths)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # they are not empty
            path.rmdir()
            path.parent.rmdir()


def _made(path):
    """Whether it was this process that made the directory."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def check_directory(out, resume):
    """A run may go to ``out``.

    Raises:
        RunError: it is not a directory, or holds a run that ``resume`` was not given for.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is not a directory")
    if not resume and checkpoint.find(out / "checkpoints"):
        raise RunError(f"--out: {out} already holds a run; continue it with --resume auto or choose another directory")


def checkpoint_to_resume(out, resume, warn):
    """The checkpoint that a run in ``out`` goes on from, or None for a fresh one; ``warn`` hears of bad checkpoints. No
    other run may be writing there.

    Raises:
        RunError: as of :func:`check_directory`.
        CheckpointError: every checkpoint there is bad.
    """
    check_directory(out, resume)
    if not resume:
        return None
    checkpoint.put_back(Path(out) / "checkpoints")
    return checkpoint.newest(Path(out) / "checkpoints", warn)


def load_trained(directory, device, step=None):
    """The :class:`TrainedModel` of the newest checkpoint of a run, or of that of ``step``.

    Raises:
        RunError: there is no run, or not that step.
        CheckpointError: the checkpoint is bad.
    """
    found = dict(checkpoint.find(Path(directory) / "checkpoints"))
    if not found:
        inside = ", ".join(sorted(str(path.parent) for path in Path(directory).glob("*/checkpoints")))
        raise RunError(f"{directory}: holds no checkpoints{inside and f'; there are runs inside: {inside}'}")
    if step is not None and step not in found:
        raise RunError(f"--step: {directory} has no checkpoint of step {step}, only of {', '.join(map(str, found))}")
    chosen = max(found) if step is None else step
    try:
        loaded = checkpoint.load(found[chosen])
    except CheckpointError as error:
        others = ", ".join(str(other) for other in found if other != chosen)
        raise CheckpointError(f"{error}{others and f'; there are others, of steps {others}'}") from error
    if not isinstance(loaded.state.get("settings"), dict):
        raise CheckpointError(f"{loaded.path}: has no settings")
    settings = from_dict(loaded.state["settings"])
    model = build_model(settings)
    load_weights(model, loaded, "ema" if settings.train.ema_decay else "model")
    return TrainedModel(model.to(device), settings, loaded.step, loaded.path, loaded.state.get("data"))
