"""The optimizer and the train step that settings describe, around a model whose weights are in place."""

import torch

from fastflow.engine import capture
from fastflow.engine.distributed import wrapped
from fastflow.engine.errors import SettingsError
from fastflow.engine.evaluate import is_vae
from fastflow.engine.layout import convolutions_to_channels_last
from fastflow.engine.memory import Memory
from fastflow.engine.precision import Conditioners
from fastflow.engine.train_step import TrainStep

__all__ = ["assemble", "check_model"]

EMA_WARMUP = 10  # early on the average forgets faster: decay min(ema_decay, (1 + n)/(EMA_WARMUP + n)) after n updates


def check_model(settings, model, device=None, n_processes=1):
    """Refuses options that this model, whose weights may be on the meta device, does not have, or not in that many
    processes on ``device``, None where that is open.

    Raises:
        SettingsError: by name.
    """
    train = settings.train
    for name in ("kl_warmup_steps", "kl_warmup_epochs", "bound_samples"):
        if getattr(train, name) and not is_vae(model):
            raise SettingsError(f"train.{name}: a model of kind {settings.model.kind!r} has no latents")
    if train.capture and n_processes > 1:
        raise SettingsError(f"train.capture: expected one process, got {n_processes}; use false")
    try:
        Memory(model, None, train.memory)
        if train.precision == "bfloat16":
            Conditioners(model, torch.bfloat16)
        if train.capture and device is not None:
            capture.recorder_for(device)
    except ValueError as error:
        raise SettingsError(f"train.{error}") from error


def assemble(model, settings, processes, device, n_bins, beta):
    """(optimizer, train_step), wrapped for as many processes as there are.

    Args:
        model: on ``device``; sharded in place under train.strategy "fsdp".
        settings: a :class:`~fastflow.engine.settings.Settings`.
        processes: the :class:`~fastflow.engine.distributed.Processes`.
        device, n_bins: of the data, levels of integer images.
        beta: of the train step, see :func:`~fastflow.engine.rate.kl_weight`.

    Raises:
        SettingsError: options that this model, device or number of processes doesn't have.
    """
    train, options = settings.train, settings.model
    sharded = processes.count > 1 and train.strategy == "fsdp"
    if sharded:
        model = wrapped(model, "fsdp", device)
    adam = torch.optim.AdamW if train.weight_decay else torch.optim.Adam
    optimizer = adam(model.parameters(), lr=train.learning_rate, betas=(0.9, train.beta2),
                     weight_decay=train.weight_decay, fused=not sharded)
    if processes.count > 1 and not sharded:
        convolutions_to_channels_last(model, optimizer, None)
        model = wrapped(model, "ddp", device)
    try:
        return optimizer, TrainStep(
            model, optimizer, memory=train.memory, capture=train.capture, clip_grad_norm=train.clip_grad_norm or None,
            conditioner_dtype=torch.bfloat16 if train.precision == "bfloat16" else None, accumulate=train.accumulate,
            ema_decay=train.ema_decay or None, ema_warmup=EMA_WARMUP if train.ema_decay else 0, n_bins=n_bins,
            n_samples=getattr(options, "n_samples", 1), beta=beta)
    except ValueError as error:
        raise SettingsError(f"train.{error}") from error
