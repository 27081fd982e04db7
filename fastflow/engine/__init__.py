"""Training: the train step, the trainer around it, checkpoints and recipes.

TrainStep and the checkpoints need only torch and safetensors; the trainer needs the extra ``train`` and the data that
recipes name the extra ``data``: ``pip install 'fastflow[data,train]'``. Everything is imported when it is first used.
"""

import importlib

_HOMES = {
    "TrainStep": "train_step",
    "Trainer": "trainer",
    "Settings": "settings",
    "load_settings": "settings",
    "build_model": "models",
    "CheckpointError": "errors",
    "DriftError": "errors",
    "NonFiniteError": "errors",
    "RunError": "errors",
    "SettingsError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return __all__
