"""Drop into existing models: :func:`accelerate` exchanges the layers of other libraries for fused ones in place.

A library takes one file here and one entry in core.HOSTS: the name that programs import it under, and the file's. The
file is imported only where the library was. In it every layer that has a fused form is a subclass of the library's own
class, under the decorator :func:`swap.swap`, with the forms of ``forward``, ``inverse`` or other methods that use
fastflow's operations; ``super()`` is the library's, for calls that have none (lower precision, data of other shapes).
``fit`` says which layers can't be swapped and why. What a layer remembers of its buffers goes through
layers.remembered, and whether a small call gains is layers.worthwhile's to say. EXAMPLES tells how a density runs.
"""

from fastflow.adapters.core import accelerate, restore
from fastflow.adapters.report import Report

__all__ = ["Report", "accelerate", "restore"]
