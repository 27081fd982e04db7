"""Whether a transform can do anything with a context."""

import inspect

from torch import nn

__all__ = ["takes_context"]

OWN = ("fastflow.flows.", "fastflow.nn.")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def takes_context(transform):
    """What the transform's attribute ``takes_context`` says; without one, whether any of its parts takes a context, or
    it is of a class of the user's that looks as if."""
    says = getattr(transform, "takes_context", None)
    if says is not None:
        return says
    if not isinstance(transform, nn.Module):
        return True
    return _may_take(type(transform)) or any(map(takes_context, transform.children()))


def _may_take(kind):
    if kind.__module__.startswith(OWN) or kind.forward is nn.Module.forward:  # ours say so; a list of modules
        return False
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return len(parameters) > 1 or any(parameter.kind not in POSITIONAL for parameter in parameters)
