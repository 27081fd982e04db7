"""Runs on disk: where one goes, and the trained model of one that is there."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from fastflow.engine import checkpoint
from fastflow.engine.errors import CheckpointError, RunError
from fastflow.engine.models import build_model, load_weights
from fastflow.engine.settings import Settings, from_dict

__all__ = ["TrainedModel", "checkpoint_to_resume", "default_directory", "load_trained"]


@dataclass(frozen=True)
class TrainedModel:
    """A model as its run left it: averaged weights where the run kept an average."""

    model: torch.nn.Module
    settings: Settings
    step: int
    path: Path


def default_directory(title, resume):
    """runs/TITLE, or with a number behind it: the last one that exists if ``resume``, else the first that doesn't."""
    names = itertools.chain([title], (f"{title}-{i}" for i in itertools.count(2)))
    last = Path("runs") / title
    for path in (Path("runs") / name for name in names):
        if not path.exists():
            return last if resume else path
        last = path


def checkpoint_to_resume(out, resume, warn):
    """The checkpoint that a run in ``out`` goes on from, or None for a fresh one; ``warn`` hears of bad checkpoints.

    Raises:
        RunError: ``out`` is not a directory, or holds a run that ``resume`` was not given for.
        CheckpointError: every checkpoint there is bad.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is not a directory")
    if resume:
        checkpoint.put_back(out / "checkpoints")
        return checkpoint.newest(out / "checkpoints", warn)
    if checkpoint.find(out / "checkpoints"):
        raise RunError(f"--out: {out} already holds a run; continue it with --resume auto or choose another directory")
    return None


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
    return TrainedModel(model.to(device), settings, loaded.step, loaded.path)
