"""Whether a transform can do anything with a context."""

import functools
import inspect

import torch
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
    if isinstance(transform, torch.jit.ScriptModule):
        return len(transform.forward.schema.arguments) > 2
    mine = _may_take(type(transform))
    if mine is not None:
        return mine
    network = vars(transform).get("conditioner")  # a function is no child
    return (callable(network) and _has_room(network)) or any(map(takes_context, transform.children()))


@functools.cache
def _may_take(kind):
    """Whether modules of this class take a context, by their forward; None where their parts decide."""
    # Ours say so; torch's have other inputs, or wrap what has these; a list of modules.
    if kind.__module__.startswith(("torch.", *OWN)) or kind.forward is nn.Module.forward:
        return False if issubclass(kind, nn.Sequential) else None
    return _has_room(kind.forward, 1)


def _has_room(function, before=0):
    """Whether a call of the function can have a second argument behind ``before`` bound ones and the first."""
    parameters = list(inspect.signature(function).parameters.values())[before:]
    return len(parameters) > 1 or any(parameter.kind not in POSITIONAL for parameter in parameters)
