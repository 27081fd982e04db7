"""Conditioners in a lower precision than the flow around them, or compiled one by one."""

import contextlib
import functools
import types

import torch

from fastflow.flows import Split, TarFlowBlock
from fastflow.nn.coupling import Coupling
from fastflow.vae import VAE, HierarchicalVAE, QuantizedVAE

__all__ = ["Conditioners", "conditioners"]


def conditioners(model):
    """The networks whose output only parametrises what is computed in full precision, once each, in order: of
    couplings, autoregressive blocks and splits; of a VAE encoder and decoder, of a hierarchical one also those of its
    levels."""
    found = []
    for module in model.modules():
        if isinstance(module, Coupling):
            found.append(module.conditioner)
        elif isinstance(module, TarFlowBlock):
            found.append(module.network)
        elif isinstance(module, Split):
            found.append(module.prior)
        elif isinstance(module, (VAE, QuantizedVAE)):
            found += [module.encoder, module.decoder]
        elif isinstance(module, HierarchicalVAE):
            parts = [part for level in module.levels for part in (level.prior, level.posterior, level.merge)]
            found += [module.bottom_up, *parts, module.decoder]
    return list({id(m): m for m in found if isinstance(m, torch.nn.Module)}.values())


class Conditioners:
    """A context in which the conditioners of a model run under autocast or compiled, and nothing else does.

    Parameters stay as they are, and so does the model outside the context: what a conditioner's ``forward`` is inside
    is an attribute of the instance for as long.

    Args:
        model: a Flow or a VAE.
        dtype: what autocast lowers to, or None.
        compiled: whether torch.compile makes a graph of each conditioner; those of one class and shape share it.

    Raises:
        ValueError: the model has no conditioner.
    """

    def __init__(self, model, dtype=None, compiled=False):
        self.modules = conditioners(model)
        if not self.modules:
            asked = "conditioner_dtype: expected None" if dtype is not None else "compile: expected a bool"
            raise ValueError(f"{asked} for {type(model).__name__}, in which no network is known to be a conditioner; "
                             "use torch.autocast or torch.compile around what may be lowered or compiled")
        self._how = dtype, compiled
        self._make()

    def _make(self):
        dtype, compiled = self._how
        self._run = torch.compile(own_copy(_forward), dynamic=False) if compiled else None
        # Made once for each of a module's own, for torch.compile guards on them.
        self._own = [module.__dict__.get("forward") for module in self.modules]
        self._forwards = [_changed(module, dtype, self._run) for module in self.modules]

    def __getstate__(self):  # a copy's functions are of its own modules
        return {"modules": self.modules, "_how": self._how}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._make()

    @contextlib.contextmanager
    def __call__(self):
        own = [module.__dict__.get("forward") for module in self.modules]
        for i, (now, before) in enumerate(zip(own, self._own, strict=True)):
            if now is not before:
                self._own[i], self._forwards[i] = now, _changed(self.modules[i], self._how[0], self._run)
        for module, forward in zip(self.modules, self._forwards, strict=True):
            module.forward = forward
        try:
            yield
        finally:
            for module, before in zip(self.modules, own, strict=True):
                if before is None:
                    del module.forward
                else:
                    module.forward = before


def _forward(module, x, *args, **kwargs):
    return type(module).forward(module, x, *args, **kwargs)


def own_copy(function):
    """The function with code of its own: Dynamo counts all graphs of one code towards its limit."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def _changed(module, dtype, run):
    # The module is an argument of the compiled function, which is not compiled anew for another one of its kind.
    forward = module.forward if run is None or "forward" in module.__dict__ else functools.partial(run, module)
    return forward if dtype is None else _under_autocast(forward, dtype)


def _under_autocast(forward, dtype):
    def lowered(x, *args, **kwargs):
        with torch.autocast(x.device.type, dtype=dtype):
            return forward(x, *args, **kwargs)
    return lowered
