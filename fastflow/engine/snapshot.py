"""All that the next step of a run depends on, into a checkpoint and back."""

import torch

from fastflow.engine import checkpoint
from fastflow.engine import settings as settings_module
from fastflow.engine import state as state_module
from fastflow.engine.distributed import gathered, is_sharded
from fastflow.engine.errors import CheckpointError, SettingsError
from fastflow.engine.models import build_model

__all__ = ["check_continuation", "restore", "save", "whole_model"]


def weights(model, keep=True):
    """{name: whole tensor on the CPU} of the model's state, {} if not ``keep``; all processes gather it together."""
    return gathered(model.state_dict(), keep)


def whole_model(trainer):
    """The model in the first process, of a sharded one a copy that is whole, None in the others; all call it
    together."""
    first = trainer.processes.rank == 0
    if not is_sharded(trainer.model):
        return trainer.model if first else None
    state, model = weights(trainer.model, first), build_model(trainer.settings)
    if not first:
        return None
    model.load_state_dict(state)
    return model.to(trainer.device)


def save(trainer, directory):
    """Writes a checkpoint of this moment into ``directory`` and returns its path; all processes call it together.

    Raises:
        CheckpointError: it could not be written, in every process.
    """
    (tensors, state), failure, train = snapshot(trainer), None, trainer.settings.train
    if trainer.processes.rank == 0:
        try:
            checkpoint.save(directory, trainer.step, tensors, state, train.keep_checkpoints,
                            trainer.watch.best_step if train.patience else None)
        except CheckpointError as error:
            failure = error
    path = checkpoint.path_of(directory, trainer.step)
    if trainer.processes.most(failure is not None):
        raise failure or CheckpointError(f"{path}: process 0 could not write it")
    return path


def snapshot(trainer):
    """(tensors, state) for :func:`fastflow.engine.checkpoint.save` in the first process; all call it together."""
    first = trainer.processes.rank == 0
    optimizer, plain = state_module.optimizer_state(trainer.optimizer, first)
    training = {f"optimizer.{name}": t for name, t in optimizer.items()}
    for group, generators in (("random", state_module.random_state(trainer.device)),
                              ("host_random", state_module.host_random_state())):
        training |= {f"{group}.{name}": torch.stack(trainer.processes.gather(t)) for name, t in generators.items()}
    tensors = {"model": weights(trainer.model, first), "training": training}
    ema = trainer.train_step.ema
    if ema is not None:
        tensors["ema"] = tensors["model"] | gathered(ema.state_dict(), first)
    return tensors, {"settings": trainer.settings.model_dump(), "optimizer": plain, "data": trainer.data.fingerprint(),
                     "title": trainer.title, "torch": torch.__version__, "skipped": trainer.skipped,
                     "processes": trainer.processes.count, "watch": trainer.watch.state_dict()}


def check_continuation(trainer, loaded):
    """The settings that a checkpoint was saved with, if the trainer's settings and data may go on from it.

    Raises:
        SettingsError: the settings differ in what a continuation may not change.
        CheckpointError: it is of other data.
    """
    old, new = settings_module.from_dict(loaded.state.get("settings")), trainer.settings
    changed = settings_module.differences(old, new)
    if changed:
        raise SettingsError(f"{', '.join(changed)}: may not change on resume; leave it as in the run, or train anew in "
                            f"another directory (--out)")
    if new.train.steps < loaded.step:
        raise SettingsError(f"train.steps: {new.train.steps} is less than the {loaded.step} steps done")
    if loaded.state.get("data") != trainer.data.fingerprint():
        raise CheckpointError(f"{loaded.path}: was trained on other {trainer.unit} than {trainer.data.name} holds")
    return old


def restore(trainer, loaded):
    """Puts optimizer, average, generators and counts back; the model's weights and the train step are in place.

    Returns:
        How many processes saved it. If they are not as many as now, generators stay as they are.

    Raises:
        CheckpointError: it does not fit.
    """
    training, ema = _grouped(loaded.tensors.get("training", {})), trainer.train_step.ema
    try:
        trainer.skipped, count = int(loaded.state["skipped"]), int(loaded.state["processes"])
        state_module.restore_optimizer(trainer.optimizer, training.get("optimizer", {}), loaded.state["optimizer"])
        if ema is not None:
            if "ema" not in loaded.tensors:
                raise CheckpointError(f"{loaded.path}: has no ema.safetensors")
            averages = {name: loaded.tensors["ema"][name] for name in ema.parameters}
            ema.load_state_dict(averages, loaded.step - trainer.skipped)
        if "watch" in loaded.state:
            trainer.watch.load_state_dict(loaded.state["watch"])
        if count == trainer.processes.count:
            state_module.restore_random(_row(training["random"], trainer.processes.rank), trainer.device)
            state_module.restore_host_random(_row(training["host_random"], trainer.processes.rank))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{loaded.path}: does not fit this run ({error})") from error
    return count


def _grouped(tensors):
    """{"a.b": t} as {"a": {"b": t}}."""
    groups = {}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups.setdefault(group, {})[rest] = tensor
    return groups


def _row(generators, rank):
    """One process's {name: state} of all processes' {name: (processes, ...)}."""
    # torch.set_rng_state reads from the beginning of the storage: a row must be a tensor of its own.
    return {name: states[rank].clone() for name, states in generators.items()}
