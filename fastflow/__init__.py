"""Fused kernels, exact flows and ELBOs for PyTorch.

Public names are imported on first use: importing fastflow loads neither Triton nor the compiled extension.
"""

import importlib

__version__ = "0.1.0"

_SUBMODULES = ("adapters", "backends", "data", "diagnostics", "engine", "estimators", "flops", "flows", "functional",
               "launches", "nn", "reference", "vae")
_NAMES = {"ScaleMap": "reference", "accelerate": "adapters", "affine_coupling": "functional",
          "gaussian_sample_kl": "functional", "mlp_flow": "functional", "plu_weight": "functional",
          "restore": "adapters", "slogdet": "functional", "slogdet_inverse": "functional", "use_backend": "backends"}

__all__ = [*_SUBMODULES, *_NAMES]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"fastflow.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"fastflow.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'fastflow' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
