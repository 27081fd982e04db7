"""Fully connected networks of a host that go into one kernel, alone or with what they condition."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import backends, functional
from fastflow.adapters.layers import autocasts, fusable, overridden, plain, worthwhile
from fastflow.autograd import mlp
from fastflow.flows.fused import ACTIVATIONS, MAX_FEATURES, MAX_HIDDEN

__all__ = ["NETWORKS", "AffineAutoregressive", "Autoregressive", "covered", "evaluate", "fit_affine",
           "fits_one_kernel", "masks_of", "residual_weights", "weights_of"]

# {class of a host's network: function(network, context) that gives (weights, biases, activation, residual, masks) as
# autograd.mlp.run takes them, or None}. The adapters add theirs.
NETWORKS = {}
FUNCTIONS = {F.relu: "relu", torch.relu: "relu", F.silu: "silu", torch.tanh: "tanh", F.tanh: "tanh"}


def fits_one_kernel(x, context=None):
    """Whether functional.mlp_flow has a kernel for data like x (B, D) under the context (B, K)."""
    return (x.dim() == 2 and x.shape[1] <= MAX_FEATURES and (context is None or context.dim() == 2)
            and not autocasts(x) and not nn.modules.module._has_any_global_hook()
            and backends.serves("mlp_flow", x, context))


def weights_of(network, linear=nn.Linear, widest=MAX_HIDDEN):
    """(weights, biases, activation) of a Sequential of Linear layers with one kind of activation between that the
    kernels know, and nothing hanging on any of them; else None. ``linear``: the class of the Linear layers."""
    layers = tuple(network._modules.values())
    if len(layers) % 2 == 0 or not plain(network, type(network)):
        return None
    weights, biases, activation = [], [], None
    for index, layer in enumerate(layers):
        if index % 2 == 0:
            if not plain(layer, linear):
                return None
            weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
            if weight is None or bias is None or weight.dim() != 2 or (index < len(layers) - 1 and len(bias) > widest):
                return None
            weights.append(weight)
            biases.append(bias)
            continue
        kind = _activation(layer)
        if kind is None or activation not in (None, kind):
            return None
        activation = kind
    return tuple(weights), tuple(biases), activation or "relu"


def masks_of(layers):
    """The masks that layers multiply their weights by."""
    return tuple(layer._buffers["mask"] for layer in layers)


def residual_weights(network, block, linear):
    """autograd.mlp.run's arguments for a residual network as nflows' and normflows' are built, of blocks and Linear
    layers of exactly these classes, without batch norm and without dropout that does anything; else None."""
    own, activation = network._modules, None
    layers = [own["initial_layer"]]
    for part in own["blocks"]._modules.values():
        dropout = part._modules.get("dropout")
        if not plain(part, block) or part.use_batch_norm or not plain(dropout, nn.Dropout):
            return None
        if dropout.p and dropout.training:
            return None
        kind = _activation(part.activation)
        if kind is None or activation not in (None, kind) or getattr(part.activation, "inplace", False):
            return None  # in place it works on what the block adds at its end, too
        activation = kind
        layers += part._modules["linear_layers"]._modules.values()
    layers.append(own["final_layer"])
    if not all(plain(layer, linear) for layer in layers):
        return None
    weights, biases = (tuple(layer._parameters.get(name) for layer in layers) for name in ("weight", "bias"))
    if any(t is None for t in (*weights, *biases)):
        return None
    return weights, biases, activation or "relu", True, () if linear is nn.Linear else masks_of(layers)


def covered(network, x, context=None):
    """autograd.mlp.run's arguments if a kernel computes network(x), or network(x, context), else None."""
    describe = NETWORKS.get(type(network))
    if (describe is None or x.dim() != 2 or not plain(network, type(network)) or not backends.serves("mlp", x)
            or nn.modules.module._has_any_global_hook()):
        return None
    found = describe(network, context)
    return found if found is not None and fusable(x, *found[0], *found[1]) else None


def evaluate(network, x, *context):
    """network(x), or network(x, context) of a network that takes one, be it None, as one kernel where there is one."""
    found = covered(network, x, *context)
    return network(x, *context) if found is None else mlp.run(x, *found)


class Autoregressive:
    """The two passes of nflows' autoregressive transforms and of what descends from them, through one network: another
    one's rounding would show in what forward makes of an inverse."""

    def forward(self, inputs, context=None):
        return self._elementwise_forward(inputs, evaluate(self.autoregressive_net, inputs, context))

    def inverse(self, inputs, context=None):
        outputs, logabsdet = torch.zeros_like(inputs), None
        for _ in range(inputs.shape[1:].numel()):
            params = evaluate(self.autoregressive_net, outputs, context)
            outputs, logabsdet = self._elementwise_inverse(inputs, params)
        return outputs, logabsdet


def fit_affine(module, fix):
    """Why :class:`AffineAutoregressive` does not do what the module does, or None."""
    return overridden(module, "_unconstrained_scale_and_shift")


class AffineAutoregressive(Autoregressive):
    """The element-wise step of nflows and what descends from it; DIALECT is that of functional.affine_coupling, FIT
    says why a module whose attributes changed since it was swapped has another."""

    FIT = staticmethod(fit_affine)

    def _elementwise_forward(self, inputs, autoregressive_params):
        if not self._fastflow_fits(inputs, autoregressive_params):
            return super()._elementwise_forward(inputs, autoregressive_params)
        return functional.affine_coupling(inputs, autoregressive_params, **self.DIALECT)

    def _elementwise_inverse(self, inputs, autoregressive_params):
        if not self._fastflow_fits(inputs, autoregressive_params):
            return super()._elementwise_inverse(inputs, autoregressive_params)
        return functional.affine_coupling(inputs, autoregressive_params, inverse=True, **self.DIALECT)

    def _fastflow_fits(self, inputs, params):
        return worthwhile(inputs) and fusable(inputs, params) and self.FIT(self, False) is None


def _sequential(network, context):
    found = weights_of(network, widest=float("inf"))
    return None if found is None or context is not None else (*found, False, ())


NETWORKS[nn.Sequential] = _sequential


def _activation(layer):
    if not isinstance(layer, nn.Module):
        return FUNCTIONS.get(layer)
    kind = type(layer)
    if not plain(layer, kind):
        return None
    if kind is nn.LeakyReLU and layer.negative_slope == 0.0:
        return "relu"
    return ACTIVATIONS.get(kind)
