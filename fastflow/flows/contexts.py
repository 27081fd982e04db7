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
    if not isinstance(transform, nn.Module):
        return True
    if type(transform).__module__ == "fastflow.flows.surjections":
        return False  # their own networks are conditioned on what passes through
    return _may_take(transform) or any(map(takes_context, transform.children()))


def _may_take(module):
    kind = type(module)
    if kind.__module__.startswith(OWN):
        return (kind.__name__ == "_Foreign" or bool(getattr(module, "conditional", False))
                or any(getattr(module, name, None) is not None for name in BUILT_FOR))
    if kind.forward is nn.Module.forward:  # a list of modules
        return False
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return len(parameters) > 1 or any(parameter.kind not in POSITIONAL for parameter in parameters)
