"""accelerate and restore: a model's layers exchanged for fused ones in place, and back."""

import contextlib
import importlib
import importlib.metadata
import sys

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastflow.adapters import swap as swaps
from fastflow.adapters import verify
from fastflow.adapters.report import Report

__all__ = ["HOSTS", "accelerate", "restore"]

# The libraries whose layers are known, by the name that they are imported under, and the file here that adapts each. It
# is imported when its library was. Importing it fills swaps.SWAPS; it may define EXAMPLES, {class: function(model,
# *example)} that runs a model whose forward does not.
HOSTS = {"nflows": "nflows", "normflows": "normflows", "FrEIA": "freia", "zuko": "zuko", "torchflows": "torchflows",
         "pyro": "pyro", "pythae": "pythae", "diffusers": "diffusers"}


def accelerate(model, *, verify=True, example=None, fix=False):
    """Exchange the layers of ``model`` that are known for fused ones, in place.

    A swapped layer stays the same object: its ``__class__`` becomes a subclass of its own under fastflow.adapters.
    Parameters, buffers, hooks, state-dict keys, train or eval mode, device and dtype are untouched; the model can be
    wrapped (DDP, torch.compile), copied, pickled, trained and saved before and after. Only layers of exactly a known
    class are swapped, and of them those whose options have a fused form; of a library in a version that its adapter
    does not fit, none.

    Args:
        model: a torch.nn.Module with layers of nflows, normflows, FrEIA, zuko, torchflows, Pyro, pythae or
            diffusers at any depth.
        verify: hold every swapped layer against its original at its first call: outputs, inverse and gradients, on
            copies, leaving random generators and buffers as they were. A layer that differs becomes its original again
            and a RuntimeWarning says so. Calls under torch.compile and torch.func, or with a number in data or result
            that is not finite, don't count as the first.
        example: input, or a tuple of inputs, to verify with at once: the model runs on it (a density's log_prob; else
            its forward) and is put back in the state it was in, but for lazy layers, which the run initialises. Layers
            that the run does not reach keep waiting.
        fix: where the host is known to be wrong, compute what is right; else the host's value wherever it and the data
            are finite. Of layers swapped before, the last call's counts.

    Returns:
        Report: ``swapped`` and ``skipped`` (name: why). It is kept up to date as layers are verified.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    adapters = _adapters()
    report = Report()
    for name, module in model.named_modules():
        before = swaps.swap_of(module)
        known = before or swaps.SWAPS.get(type(module))
        if known is None:
            reason = _unknown(type(module), adapters, _inside(name, report.swapped))
            if reason is not None:
                report.skipped[name] = reason
            continue
        constants = swaps.fitted(module, known, fix)
        if isinstance(constants, str):
            if before is not None:
                swaps.undo(module)
            report.skipped[name] = f"{swaps.title(known.host)}: {constants}"
            continue
        if before is None or verify:
            swaps.put(module, known, constants, report if verify else None, name)
        else:
            module.__dict__.update(constants or {})
        report.swapped[name] = swaps.title(known.host)
    if example is not None:
        _run(model, example if isinstance(example, tuple) else (example,), adapters)
    return report


def restore(model):
    """Undo :func:`accelerate`: every swapped layer of ``model`` becomes what it was. Returns their names.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    names = []
    for name, module in model.named_modules():
        if swaps.swap_of(module) is not None:
            swaps.undo(module)
            names.append(name)
    return names


def _adapters():
    """{host: adapter} of the libraries that the program has imported; of one that the adapter does not fit, why."""
    return {host: _adapter(host, f"fastflow.adapters.{file}") for host, file in HOSTS.items() if host in sys.modules}


def _adapter(host, name):
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        for kind in [kind for kind in swaps.SWAPS if swaps.host_of(kind) == host]:
            del swaps.SWAPS[kind]
        return f"the adapter does not fit {host} {_version(host)}: {error}"


def _version(host):
    packages = importlib.metadata.packages_distributions().get(host)
    return importlib.metadata.version(packages[0]) if packages else getattr(sys.modules[host], "__version__", "unknown")


def _unknown(kind, adapters, inside):
    """Why a layer of no known class stays as it is; None where it is no layer of a host, or ``inside`` a swapped one
    whose fused form answers for it."""
    for base in kind.__mro__:
        if base in swaps.SWAPS:
            return f"{kind.__name__} is a subclass of {swaps.title(base)}"
    adapter = adapters.get(swaps.host_of(kind))
    if isinstance(adapter, str):
        return f"{swaps.title(kind)}: {adapter}"
    return None if adapter is None or inside else f"{swaps.title(kind)} has no fused form"


def _inside(name, swapped):
    """Whether a layer is part of a swapped one."""
    parts = name.split(".")
    return "" in swapped or any(".".join(parts[:n]) in swapped for n in range(1, len(parts)))


def _run(model, example, adapters):
    """Run the model on the example and leave it as it was."""
    run = next((adapter.EXAMPLES[kind] for kind in type(model).__mro__ for adapter in adapters.values()
                if kind in getattr(adapter, "EXAMPLES", {})), None)
    with _unchanged(model), torch.no_grad():
        model(*example) if run is None else run(model, *example)


@contextlib.contextmanager
def _unchanged(model):
    """Values of parameters and buffers, the attributes of all modules, what lists, dicts and plain objects among these
    hold, and the random generators are put back. Modules without values yet, whose first call makes others of them,
    are left out."""
    modules = [m for m in model.modules() if not any(map(is_lazy, _tensors(m)))]
    attributes = [dict(m.__dict__) for m in modules]
    containers = [c for kept in attributes for c in map(_container, kept.values()) if c is not None]
    contents = [list(c) if isinstance(c, list) else dict(c) for c in containers]
    values = [(t, t.data, _apart(t.detach()).clone()) for m in modules for t in _tensors(m)]
    devices = {t.device for t, _, _ in values if t.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            for m, kept in zip(modules, attributes, strict=True):
                m.__dict__.clear()
                left = swaps.swap_of(m) is None  # put back by verification
                m.__dict__.update((key, v) for key, v in kept.items() if not (left and swaps.is_ours(key)))
            for container, kept in zip(containers, contents, strict=True):
                _refill(container, kept)
            with torch.no_grad():
                for t, data, value in values:
                    t.data = data
                    _apart(t).copy_(value)


def _container(value):
    """The list or dict that holds what can be written into a list, a dict or a plain object; None of another value."""
    if isinstance(value, (list, dict)):
        return value
    return vars(value) if verify.is_plain(value) else None


def _refill(container, kept):
    """Put the same objects as before into a list or dict, unless they are there, as in one that can't be written to."""
    if isinstance(container, list):
        if len(container) != len(kept) or any(a is not b for a, b in zip(container, kept, strict=True)):
            container[:] = kept
    elif list(container) != list(kept) or any(container[key] is not value for key, value in kept.items()):
        container.clear()
        container.update(kept)


def _tensors(module):
    """The module's own parameters and buffers."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _apart(t):
    """The elements of a tensor that was expanded that have memory of their own: only those can be written to."""
    if t.layout is not torch.strided or 0 not in t.stride():
        return t
    return t[tuple(slice(None if stride else 1) for stride in t.stride())]
