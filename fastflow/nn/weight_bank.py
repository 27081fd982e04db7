"""All 1x1 weights of a model factorised together, once per call."""

import contextlib
import threading

import torch
from torch import nn

from fastflow.nn.factors import factorize
from fastflow.nn.invertible_conv import InvertibleConv1x1

__all__ = ["BESIDES", "Bank", "WeightBank", "convolutions"]

BESIDES = ("data_shape", "initialize", "noise_shape", "unpack")  # what a transform may have besides its two directions


class Bank:
    """What one call hands to its layers: the factors of the direction that it runs, the other one if a layer asks.

    Attributes:
        live: whether the call still runs.
    """

    def __init__(self, layers, inverse, root):
        self.layers, self.root, self.live = layers, root, True
        self.thread = None if torch.compiler.is_compiling() else threading.get_ident()
        self.index = {id(layer): i for i, layer in enumerate(layers)}
        self.by_direction = {inverse: factorize(layers, inverse, root)}

    def serves(self):
        """Whether it is of this thread: another one may differ in grad mode or autocast."""
        return torch.compiler.is_compiling() or self.thread in (None, threading.get_ident())

    def factors(self, layer, inverse):
        if inverse not in self.by_direction:
            self.by_direction[inverse] = factorize(self.layers, inverse, self.root)
        return self.by_direction[inverse][self.index[id(layer)]]


def convolutions(model):
    """Every InvertibleConv1x1 of ``model``, once each, in order."""
    return [module for module in model.modules() if isinstance(module, InvertibleConv1x1)]


class WeightBank(nn.Module):
    """A model whose invertible 1x1 convolutions are factorised together, each size class once per call.

    Called like the model that it wraps, ``bank(x, context)`` and ``bank.inverse(z, context)``, with the same results.
    Any other method of the model runs so inside ``with bank.factorized(inverse=...):``; ``initialize``, ``unpack``,
    ``noise_shape`` and ``data_shape`` are the model's own, where it has them. Results live for one call: nothing is
    kept that a change of the weights (an optimiser's step, load_state_dict, functional_call) could make stale. A layer
    that runs against the direction of the call costs a second factorisation. flows.Glow does all this by itself.

    Args:
        model: a Transform, a Flow, or any module that holds InvertibleConv1x1 layers.

    Raises:
        TypeError: on a call, if a 1x1 weight is sharded (a DTensor of FSDP2); the message names the parameter.
    """

    def __init__(self, model):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        self.model = model

    def forward(self, x, context=None):
        with self.factorized():
            return self.model(x) if context is None else self.model(x, context)

    def inverse(self, z, context=None):
        with self.factorized(inverse=True):
            return self.model.inverse(z) if context is None else self.model.inverse(z, context)

    def __getattr__(self, name):
        if name in BESIDES:
            return getattr(self.model, name)
        return super().__getattr__(name)

    @contextlib.contextmanager
    def factorized(self, inverse=False):
        """A context in which every InvertibleConv1x1 of the model uses one common factorisation."""
        layers = convolutions(self.model)
        bank = Bank(layers, inverse, self.model)
        previous = [layer._bank for layer in layers]
        for layer in layers:
            layer._bank = bank
        try:
            yield
        finally:
            bank.live = False
            for layer, held in zip(layers, previous, strict=True):  # of a call in another thread, it may be over by now
                layer._bank = held if held is not None and held.live else None
