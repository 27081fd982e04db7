"""Drop into existing models: :func:`accelerate` exchanges the layers of other libraries for fused ones in place.

One file per library, imported when the library is. It subclasses the library's classes under :func:`swap.swap`.
"""

from fastflow.adapters.core import accelerate, restore
from fastflow.adapters.report import Report

__all__ = ["Report", "accelerate", "restore"]
