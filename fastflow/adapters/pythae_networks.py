"""pythae's own fully connected networks: bias and ReLU within the matrix products, two layers one node of autograd."""

import math

import torch
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import default_architectures as networks
from torch import nn

from fastflow import backends
from fastflow.adapters import verify
from fastflow.adapters.layers import fusable, plain
from fastflow.adapters.swap import revived, swap, swap_of
from fastflow.functional.wide_mlp import run_wide_mlp
from fastflow.nn.fused_sequential import chain

FEWEST = 16  # rows below which PyTorch's products of a vector or a few are faster


def _fit(module, fix):
    return None if backends.own_products() else "PyTorch's matrix products are as fast on this machine"


def _network(host):
    return swap(host, methods=("forward",), fit=_fit, opposite=lambda *call: None)


def _two_layers(x, first, activation, second, hidden=False):
    """functional.wide_mlp of x (B, features) through both Linear layers and the ReLU between; None where they are
    something else, hang under hooks or no kernel serves."""
    if (x.dim() != 2 or len(x) < FEWEST and not verify.running() or not fusable(x) or torch.compiler.is_compiling()
            or nn.modules.module._has_any_global_hook()):
        return None
    weights, biases, kind = chain([first, activation, second], 0, x.shape[1], x.dtype)
    if len(weights) != 2 or kind != "relu":
        return None
    backend, _ = backends.prefers("wide_mlp", x, *weights, *biases)
    return None if backend == "reference" else run_wide_mlp(backend, x, weights, biases, kind, hidden)


def _stages(network, kinds):
    """The layers of every stage, if these are Sequentials of a Linear layer and one of the ``kinds``; else None."""
    stages = list(network.layers)
    if (type(network.layers) is not nn.ModuleList or network.depth != len(stages) or len(stages) != len(kinds)
            or not all(plain(stage, nn.Sequential) and len(stage) == 2 and plain(stage[1], kind)
                       for stage, kind in zip(stages, kinds, strict=True))):
        return None
    return [(stage[0], stage[1]) for stage in stages]


class _Fused:
    """The host's forward pass where the call asks for layers on the way, or where no kernel computes it."""

    def forward(self, x, output_layer_levels=None):
        output = self._fastflow_output(x) if output_layer_levels is None else None
        return super().forward(x, output_layer_levels) if output is None else output

    def __reduce_ex__(self, protocol):
        known = swap_of(self)
        return revived, (__name__, known.host, type(self) is known.checked), self.__dict__


class _Encoder(_Fused):
    def _fastflow_hidden(self, x, hidden=False):
        """The embedding, with ``hidden`` the pair of it and (the hidden layer,); or None."""
        stages = _stages(self, (nn.ReLU,))
        return stages and _two_layers(x.reshape(-1, math.prod(self.input_dim)), *stages[0], self.embedding, hidden)


@_network(networks.Encoder_AE_MLP)
class Encoder_AE_MLP(_Encoder, networks.Encoder_AE_MLP):
    """Hidden layer and embedding."""

    def _fastflow_output(self, x):
        found = self._fastflow_hidden(x)
        return None if found is None else ModelOutput(embedding=found)


@_network(networks.Encoder_VAE_MLP)
class Encoder_VAE_MLP(_Encoder, networks.Encoder_VAE_MLP):
    """Hidden layer and embedding, and the layer beside it."""

    def _fastflow_output(self, x):
        found = self._fastflow_hidden(x, True)
        if found is None:
            return None
        embedding, (hidden,) = found
        return ModelOutput(embedding=embedding, log_covariance=self.log_var(hidden))


@_network(networks.Decoder_AE_MLP)
class Decoder_AE_MLP(_Fused, networks.Decoder_AE_MLP):
    """Both layers."""

    def forward(self, z, output_layer_levels=None):  # its argument has another name
        return super().forward(z, output_layer_levels)

    def _fastflow_output(self, z):
        stages = _stages(self, (nn.ReLU, nn.Sigmoid))
        found = stages and _two_layers(z, *stages[0], stages[1][0])
        return found if found is None else ModelOutput(
            reconstruction=found.sigmoid().reshape((z.shape[0], *self.input_dim)))
