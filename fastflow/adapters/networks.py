"""Fully connected networks of a host that go into one kernel with what they condition."""

import torch
from torch import nn

from fastflow import backends
from fastflow.adapters.layers import plain
from fastflow.flows.fused import ACTIVATIONS, MAX_FEATURES, MAX_HIDDEN

__all__ = ["fits_one_kernel", "weights_of"]


def fits_one_kernel(x, context=None):
    """Whether functional.mlp_flow has a kernel for data like x (B, D) under the context (B, K)."""
    return (x.dim() == 2 and x.shape[1] <= MAX_FEATURES and (context is None or context.dim() == 2)
            and not torch.is_autocast_enabled(x.device.type) and not nn.modules.module._has_any_global_hook()
            and backends.serves("mlp_flow", x, context))


def weights_of(network, linear=nn.Linear):
    """(weights, biases, activation) of a Sequential of Linear layers with one kind of activation between that the
    kernel knows, and nothing hanging on any of them; else None. ``linear``: the class of the Linear layers."""
    layers = tuple(network._modules.values())
    if len(layers) % 2 == 0 or not plain(network, type(network)):
        return None
    weights, biases, activation = [], [], None
    for index, layer in enumerate(layers):
        if index % 2 == 0:
            if not plain(layer, linear):
                return None
            weight, bias = layer.weight, layer.bias
            if bias is None or weight.dim() != 2 or (index < len(layers) - 1 and len(bias) > MAX_HIDDEN):
                return None
            weights.append(weight)
            biases.append(bias)
            continue
        kind = _activation(layer)
        if kind is None or activation not in (None, kind):
            return None
        activation = kind
    return tuple(weights), tuple(biases), activation or "relu"


def _activation(layer):
    kind = type(layer)
    if not plain(layer, kind):
        return None
    if kind is nn.LeakyReLU and layer.negative_slope == 0.0:
        return "relu"
    return ACTIVATIONS.get(kind)
