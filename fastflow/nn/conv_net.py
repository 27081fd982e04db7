"""Glow's conditioner for images."""

import torch.nn.functional as F
from torch import nn

from fastflow import backends, functional
from fastflow.nn.context import ContextShift
from fastflow.nn.hooks import is_hooked
from fastflow.nn.precision import taken

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Convolutions 3x3, 1x1 and 3x3 with ReLU between, and plain biases; the last one starts at zero, so that a
    coupling starts simple. It answers in the memory format of its input. Where functional.conv_net has its own way with
    them (hidden channels in multiples of 16 on a CPU, 128 or more on a GPU) the three run in it, unless one of them is
    hooked or replaced.

    Args:
        in_channels, out_channels: channels of input and output.
        hidden_channels: channels between.
        context: keyword arguments of a ContextShift, which adds what the context says to the first convolution's
            answer; none for a network without a context.

    Raises:
        ValueError: on a call, a context of another shape than the network was built for.
    """

    def __init__(self, in_channels, out_channels, hidden_channels, **context):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.conv3 = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)
        self.context = ContextShift(hidden_channels, **context)

    def forward(self, x, context=None):
        x = taken(x, self.conv1.weight)
        shift = self.context(x, context)
        if shift is None and self.is_as_made():
            operands = (x, *self.parameters_in_turn())
            if backends.serves("conv_net", *operands):
                return functional.conv_net(*operands)
        # In place, for a convolution does not keep its own output; but what hooks of backward give out must stay.
        h = self.conv1(x)
        h = F.relu(h if shift is None else h + shift, inplace=shift is not None or not is_hooked(self.conv1))
        return self.conv3(F.relu(self.conv2(h), inplace=not is_hooked(self.conv2)))

    def explain(self):
        """Where a call without a context runs, on the parameters' device: a backend, or PyTorch and why."""
        if not self.is_as_made():
            return "PyTorch (a layer is hooked or replaced)"
        operands = self.parameters_in_turn()
        backend, reason = backends.prefers("conv_net", operands[0].new_empty(1, operands[0].shape[1], 1, 1), *operands)
        return backend if backend != "reference" else f"PyTorch ({reason})"

    def is_as_made(self):
        """Whether the three convolutions are what functional.conv_net computes, none of them hooked."""
        own = self._modules  # past nn.Module.__getattr__, which a step of small images would feel
        return _as_made(own["conv1"], 1) and _as_made(own["conv2"], 0) and _as_made(own["conv3"], 1)

    def parameters_in_turn(self):
        """[w1, b1, w2, b2, w3, b3]."""
        own = self._modules
        return [p for layer in (own["conv1"], own["conv2"], own["conv3"]) for p in _parameters(layer)]


def _as_made(layer, padding):
    return (type(layer) is nn.Conv2d and not is_hooked(layer) and layer.padding == (padding, padding)
            and layer.padding_mode == "zeros" and layer.stride == layer.dilation == (1, 1) and layer.groups == 1
            and _parameters(layer)[1] is not None)


def _parameters(layer):
    """Weight and bias, which may be attributes that are no parameters."""
    own = layer._parameters
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (layer.weight, layer.bias)
