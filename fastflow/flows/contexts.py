"""Whether a transform can do anything with a context."""

import inspect

from torch import nn

__all__ = ["takes_context"]

OWN = ("fastflow.flows.", "fastflow.nn.")
BUILT_FOR = ("context_features", "context_channels", "class_embed")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def takes_context(transform):
    """Whether any part of the transform was built for a context, or may have been: False where all are layers of
    fastflow's without one and modules of a single input."""
    return not isinstance(transform, nn.Module) or any(_may_take(module) for module in transform.modules())


def _may_take(module):
    kind = type(module)
    if kind.__module__.startswith(OWN):
        return (kind.__name__ == "_Foreign" or bool(getattr(module, "conditional", False))
                or any(getattr(module, name, None) is not None for name in BUILT_FOR))
    if kind.forward is nn.Module.forward:  # a list of modules
        return False
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return len(parameters) > 1 or any(parameter.kind not in POSITIONAL for parameter in parameters)
