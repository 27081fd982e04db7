"""Whether a transform can do anything with a context, and which of several are handed it."""

import inspect

import torch
from torch import nn

__all__ = ["has_room", "shared", "takes_context"]

OWN = ("fastflow.flows.", "fastflow.nn.")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

_kinds = {}  # {(class, before): what _may_take says}; a dict, which torch.compile can trace once it is filled


def takes_context(transform, before=0):
    """What the transform's attribute ``takes_context`` says; without one, whether any of its parts takes a context, or
    it is of a class of the user's that looks as if. ``before`` inputs of its forward come ahead of the first, such as
    the time of a velocity field."""
    says = getattr(transform, "takes_context", None)
    if says is not None:
        return says
    if not isinstance(transform, nn.Module):
        return True
    if isinstance(transform, torch.jit.ScriptModule):
        return len(transform.forward.schema.arguments) > 2 + before
    kind = type(transform)
    if (kind, before) not in _kinds:
        _kinds[kind, before] = _may_take(kind, before)
    mine = _kinds[kind, before]
    if mine is not None:
        return mine
    network = transform.__dict__.get("conditioner")  # a function is no child
    return (callable(network) and has_room(network)) or any(map(takes_context, transform.children()))


def shared(transforms, context):
    """What each of the transforms is handed of a context, a list: None for those that take none, beside others that do.
    Where none does, all are handed it, for them to refuse."""
    takes = [context is None or takes_context(transform) for transform in transforms]
    return [context if own or not any(takes) else None for own in takes]


def _may_take(kind, before):
    """Whether modules of this class take a context, by their forward; None where their parts decide."""
    # Ours say so; torch's have other inputs, or wrap what has these; a list of modules. FSDP2 makes of any class one of
    # torch's, with the forward that was.
    own = all(getattr(of, "__module__", "").startswith(("torch.", *OWN)) for of in (kind, kind.forward))
    if own or kind.forward is nn.Module.forward:
        return False if issubclass(kind, nn.Sequential) else None
    return has_room(kind.forward, 1 + before)


def has_room(function, before=0):
    """Whether a call of the function can have a second argument behind ``before`` others and the first, or does not
    tell."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[before:]
    except ValueError:  # one of torch's own, written in C++
        return True
    return len(parameters) > 1 or any(parameter.kind not in POSITIONAL for parameter in parameters)
