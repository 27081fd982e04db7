"""How a fused class takes the place of a class of a host library."""

import functools
import importlib
import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastflow.adapters import verify
from fastflow.nn.hooks import is_hooked

__all__ = ["PREFIX", "SWAPS", "Swap", "fitted", "host_of", "is_ours", "joins", "plain", "put", "revived", "settle",
           "swap", "swap_of", "title", "undo"]

PREFIX = "_fastflow_"  # of what a swapped layer holds beside what its host class put there, see is_ours
SWAPS = {}  # {host class: Swap}, filled by the adapters as they are imported
_RECORDS = weakref.WeakKeyDictionary()  # {swapped layer: (report, name)} while it waits for verification
_SETTLING = threading.Lock()


@dataclass(frozen=True, eq=False)
class Swap:
    """One host class and what stands in for it.

    Attributes:
        host: the host's class.
        fused: the subclass that computes the same with fused operations.
        checked: the subclass of ``fused`` that a layer has until its first call, which verifies it.
        fit: fit(module, fix) gives the reason (a str) why this layer can't be swapped, else constants to keep on it, a
            dict whose keys are is_ours, or None. "__module__" among them is what the layer gives for its class's,
            where the host stores the module under that name.
        opposite: opposite(method, args, kwargs, result) is the call (method, args, kwargs) that undoes a call, None
            where there is none.
        observe: observe(module, result, args) gives the tensors by which the result of a call is judged; args are the
            values of its arguments, those by keyword at the end.
    """

    host: type
    fused: type
    checked: type
    fit: Callable
    opposite: Callable
    observe: Callable

    def within(self, cls, kind):
        """``cls`` with ``kind`` in the place of the host's class, the fused or the checked one: torch puts a class of
        its own above a layer's where it parametrizes or shards it, Pyro one beside the layer's bases."""
        if cls in (self.host, self.fused, self.checked):
            return kind
        present = self.fused if issubclass(cls, self.fused) else self.host
        bases = [self.within(base, kind) if issubclass(base, present) else base for base in cls.__bases__]
        bases = tuple(base for index, base in enumerate(bases)
                      if not any(issubclass(later, base) for later in bases[index + 1:]))  # no order would do
        return type(cls)(cls.__name__, bases, {key: value for key, value in vars(cls).items()
                                               if key not in ("__dict__", "__weakref__")})


def swap(host, *, methods=("forward", "inverse"), fit=None, opposite=None, observe=None, verifying=None):
    """Class decorator: the class is a subclass of ``host`` that computes what it does with fused operations.

    Args:
        host: the exact class to stand in for.
        methods: those whose first call is verified.
        fit, opposite, observe: see :class:`Swap`. By default every layer fits, "forward" and "inverse" undo each other
            given the first output in place of the first argument, and a result is judged by all its tensors.
        verifying: verifying(fused, name) makes the method that verifies its call and hands :func:`settle` the outcome;
            by default the whole layer is held against its original.
    """
    def register(fused):
        for name in methods:
            if getattr(host, name, None) not in (None, getattr(fused, name)):
                setattr(fused, name, _of_its_own(fused, host, name))
        body = {name: (verifying or _verifying)(fused, name) for name in methods}
        body |= {"__module__": fused.__module__, "__qualname__": f"{fused.__qualname__}.Checked",
                 "__doc__": f"{fused.__name__} until its first call, which verifies it."}
        fused.Checked = type(fused.__name__, (fused,), body)  # where pickle finds it
        fused._load_from_state_dict = _loading(fused)
        SWAPS[host] = fused._fastflow_swap = Swap(host, fused, fused.Checked, fit or (lambda module, fix: None),
                                                  opposite or _exchange, observe or _everything)
        return fused
    return register


def swap_of(module):
    """The Swap that ``module`` is under, or None."""
    return getattr(type(module), "_fastflow_swap", None)


def host_of(kind):
    """The name that the library of a class is imported under."""
    return kind.__module__.partition(".")[0]


def title(kind):
    """What a report calls a host's class."""
    return f"{host_of(kind)} {kind.__name__}"


def fitted(module, known, fix):
    """What known.fit says of a module. One that can't be swapped keeps nothing of what was found out, one that went to
    the meta device later keeps it."""
    if _on_meta(module):
        return "it is on the meta device" if swap_of(module) is None else None
    found = known.fit(module, fix)
    if isinstance(found, str) and swap_of(module) is None:
        _forget(module)
    return found


def is_ours(key):
    """Whether an attribute of that name is one that a swapped layer holds beside what its host class put there."""
    return key.startswith(PREFIX) or key == "__module__"


def _forget(module):
    for key in filter(is_ours, list(module.__dict__)):
        del module.__dict__[key]


def _on_meta(module):
    """Whether some tensor of the module has no values, so that nothing can be found out of them."""
    return any(t.is_meta for t in itertools.chain(module.parameters(), module.buffers()))


def joins(module):
    """Whether a call of a swapped layer is its fused class's and nothing more, so that a container may run it together
    with others. One that waits is called by itself, which verifies it, unless what calls save is recorded: activation
    checkpointing repeats the call, which has to save the same again."""
    known = swap_of(module)
    return plain(module, known.fused) or (plain(module, known.checked) and verify.recorded())


def plain(module, kind):
    """Whether a call of ``module`` is that of its class ``kind`` and nothing more."""
    return type(module) is kind and not is_hooked(module)


def put(module, known, constants, report=None, name=None):
    """Make ``module``, of class known.host, the fused one; with a report, one that its first call verifies."""
    module.__dict__.update(constants or {})
    module.__class__ = known.within(type(module), known.fused if report is None else known.checked)
    if report is not None:
        _RECORDS[module] = (report, name)


def undo(module):
    """Make a swapped module what it was."""
    known = swap_of(module)
    module.__class__ = known.within(type(module), known.host)
    _RECORDS.pop(module, None)
    _forget(module)


def revived(adapter, host, checked):
    """An empty layer under ``host``'s Swap, which the module named ``adapter`` registers: what pickle calls for a layer
    whose own class it can't take, as where the host has cloudpickle copy the module of whatever class it finds."""
    importlib.import_module(adapter)
    known = SWAPS[host]
    return object.__new__(known.checked if checked else known.fused)


def _loading(fused):
    """The method by which a layer takes its tensors from a state dict: what ``fit`` finds out of them is found anew."""
    inherited = fused._load_from_state_dict

    def method(self, *args, **kwargs):
        inherited(self, *args, **kwargs)
        fitted(self, swap_of(self), False)
    return method


def _of_its_own(fused, host, name):
    """The method of that name for layers of the class. One that was put back may still call it, by an attribute or a
    wrapper that holds the bound method, and goes to the host's."""
    inherited = getattr(fused, name)

    @functools.wraps(inherited)
    def method(self, *args, **kwargs):
        return (inherited if isinstance(self, fused) else getattr(host, name))(self, *args, **kwargs)
    return method


def _verifying(fused, name):
    def method(self, *args, **kwargs):
        if isinstance(self, fused.Checked) and not torch.compiler.is_compiling():
            settle(self, verify.difference(self, fused._fastflow_swap, name, args, kwargs))
        return getattr(fused, name)(self, *args, **kwargs)

    method.__name__ = name
    return method


def settle(module, reason):
    """Make a layer that waits the fused one, if there is no ``reason`` against it, or its original; with
    verify.NO_TEST it keeps waiting."""
    if reason is verify.NO_TEST:
        return
    with _SETTLING:
        known = swap_of(module)
        if known is None or not isinstance(module, known.checked):
            return  # another thread's call was first
        report, name = _RECORDS.pop(module, (None, None))
        if reason is None:
            module.__class__ = known.within(type(module), known.fused)
            if report is not None:
                report.verified.add(name)
            return
        undo(module)
        if report is not None:
            report.put_back(name, f"{title(known.host)}: {reason}")
    verify.warn(known.host, reason)


def _exchange(method, args, kwargs, result):
    other = {"forward": "inverse", "inverse": "forward"}.get(method)
    return None if other is None or not args else (other, (result[0], *args[1:]), kwargs)


def _everything(module, result, args):
    return verify.tensors(result)
