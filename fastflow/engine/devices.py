"""Where a run computes."""

import os

import torch

from fastflow.engine.errors import SettingsError

__all__ = ["choose_device", "set_threads"]


def choose_device(name):
    """The torch.device that the setting "auto", "cpu" or "cuda" means here."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("train.device: cuda was asked for, and torch sees no GPU")
    if name != "cpu" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ:  # torchrun: a GPU for each process
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device()) if name != "cpu" and torch.cuda.is_available() \
        else torch.device("cpu")


def set_threads(settings):
    """Gives this process the CPU threads that the settings ask for, if they do."""
    if settings.train.threads:
        torch.set_num_threads(settings.train.threads)
