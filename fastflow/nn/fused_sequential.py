"""A sequence of layers that runs as few kernels as fit it."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import backends, functional
from fastflow.functional.wide_mlp import run_wide_mlp
from fastflow.nn.hooks import is_hooked

__all__ = ["FusedSequential"]

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}
MANY_TAPS = 16


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential``, its parameters under the same names, that computes the same in fewer passes where there are
    kernels, which is on a CPU:

    - Linear layers with ReLU, or with SiLU, between them by functional.wide_mlp, as one layer.
    - Each Conv2d and ConvTranspose2d, with the ReLU or SiLU in front of it, by functional.activated_conv: layers
      without dilation, groups, output padding or padding other than zeros, with equal strides and paddings in both
      dimensions and, as inputs of a ConvTranspose2d or outputs of a Conv2d, channels in multiples of 16, unless PyTorch
      is faster (5x5 with stride 1 between 16 channels and more). Between two convolutions maps are channels-last; what
      leaves the sequence is as contiguous as a convolution's answer.

    Layers that are hooked, parametrised or of a subclass are called as they are.
    """

    def forward(self, input):
        layers, at = list(self._modules.values()), 0
        while at < len(layers):
            fused = FUSED.get(type(layers[at]))
            taken, output = (0, None) if fused is None else fused(layers, at, input)
            at, input = (at + taken, output) if taken else (at + 1, layers[at](input))
        return input


def _linears(layers, at, x):
    """(how many layers, their answer to x) of the Linear layers from ``at`` on, two at least, else (0, None)."""
    if x.dim() != 2 or torch.compiler.is_compiling():  # compilers fuse these themselves
        return 0, None
    weights, biases, activation = chain(layers, at, x.shape[1], x.dtype)
    if len(weights) < 2:
        return 0, None
    backend, _ = backends.prefers("wide_mlp", x, *weights, *biases)
    if backend == "reference":
        return 0, None
    return 2 * len(weights) - 1, run_wide_mlp(backend, x, weights, biases, activation)


def chain(layers, at, features, dtype):
    """(weights, biases, activation) of the Linear layers from ``at`` on with one activation between them that take
    ``features`` in ``dtype``; empty where there is none."""
    weights, biases, kind = [], [], None
    while at < len(layers) and type(layers[at]) is nn.Linear and not is_hooked(layers[at]):
        parameters = layers[at]._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is None or bias is None or weight.shape[1] != features or weight.dtype != dtype:
            break
        weights.append(weight)
        biases.append(bias)
        features = weight.shape[0]
        at += 2
        activation = type(layers[at - 1]) if at <= len(layers) else None
        if activation not in ACTIVATIONS or kind not in (None, activation) or is_hooked(layers[at - 1]):
            break
        kind = activation
    return weights, biases, ACTIVATIONS.get(kind)


def whole_mlp(network, shape_in, shape_out, dtype):
    """(weights, biases, activation) of a FusedSequential that is a chain of Linear layers, two at least, from elements
    of shape_in (flattened by it where they are more than a vector) to shape_out (likewise; None: any vector); else
    None."""
    if type(network) is not FusedSequential or is_hooked(network):
        return None
    layers = list(network._modules.values())
    if not layers or is_hooked(layers[0]) or is_hooked(layers[-1]):
        return None
    at, end = 0, len(layers)
    if type(layers[0]) is nn.Flatten and layers[0].start_dim == 1 and layers[0].end_dim == -1:
        at = 1
    if type(layers[-1]) is nn.Unflatten and layers[-1].dim == 1 and layers[-1].unflattened_size == shape_out:
        end -= 1
    vector_out = shape_out is None or len(shape_out) == 1
    if (at == 0 and len(shape_in) > 1) or (end == len(layers) and not vector_out):
        return None
    weights, biases, activation = chain(layers, at, math.prod(shape_in), dtype)
    if (len(weights) < 2 or at + 2 * len(weights) - 1 != end
            or shape_out is not None and weights[-1].shape[0] != math.prod(shape_out)):
        return None
    return weights, biases, activation


def stacked(stages, x):
    """[the answer of every stage] to x (B, features), where each is an nn.Sequential of a Linear layer and ReLU or
    SiLU, by functional.wide_mlp; None where they are fewer than two or something else, or no kernel serves."""
    if (len(stages) < 2 or x.dim() != 2 or torch.compiler.is_compiling()
            or nn.modules.module._has_any_global_hook()):
        return None
    layers = []
    for stage in stages:
        if type(stage) is not nn.Sequential or len(stage._modules) != 2 or is_hooked(stage):
            return None
        layers += stage._modules.values()
    weights, biases, activation = chain(layers, 0, x.shape[1], x.dtype)
    last = layers[-1]
    if len(weights) < len(stages) or ACTIVATIONS.get(type(last)) != activation or is_hooked(last):
        return None
    backend, _ = backends.prefers("wide_mlp", x, *weights, *biases)
    if backend == "reference":
        return None
    out, values = run_wide_mlp(backend, x, weights, biases, activation, hidden=True)
    return [*values, getattr(F, activation)(out)]


def _convolution(layers, at, x):
    """The same of a convolution at ``at``, or behind an activation there."""
    layer, activation, taken = layers[at], "none", 1
    if type(layer) in ACTIVATIONS:
        if at + 1 == len(layers) or is_hooked(layer) or getattr(layer, "inplace", False):
            return 0, None
        layer, activation, taken = layers[at + 1], ACTIVATIONS[type(layer)], 2
    if (not _is_simple(layer) or not _fits(layer, x) or not _pays(layer)
            or not backends.serves("activated_conv", x, layer.weight, layer.bias)):
        return 0, None
    return taken, functional.activated_conv(
        x, layer.weight, layer.bias, stride=layer.stride[0], padding=layer.padding[0],
        transposed=type(layer) is nn.ConvTranspose2d, activation=activation,
        channels_last=_meets_convolution(layers[at + taken:]))


def _is_simple(layer):
    """Whether functional.activated_conv can say what a call of this layer computes."""
    return (type(layer) in (nn.Conv2d, nn.ConvTranspose2d) and not is_hooked(layer) and layer.groups == 1
            and layer.dilation == (1, 1) and layer.padding_mode == "zeros" and not any(layer.output_padding)
            and isinstance(layer.padding, tuple) and len(set(layer.padding)) == len(set(layer.stride)) == 1)


def _fits(layer, x):
    """Whether it is a batch of maps that the layer takes; what is not is left to the layer, and so is the message."""
    return (x.dim() == 4 and x.shape[1] == layer.in_channels and x.dtype == layer.weight.dtype
            and (type(layer) is nn.ConvTranspose2d or all(size + 2 * padding >= taps for size, padding, taps in zip(
                x.shape[2:], layer.padding, layer.kernel_size, strict=True))))


def _pays(layer):
    """Whether functional.activated_conv is not slower than the layer. Kernels of 16 taps and more between wide maps in
    float32 are, unless they run in Winograd's form (csrc/cpu/activated_conv_kernel.h) or are spread over a finer map.
    """
    taps, stride = layer.kernel_size, layer.stride[0]
    if (layer.weight.dtype != torch.float32 or math.prod(taps) < MANY_TAPS
            or min(layer.in_channels, layer.out_channels) < 16):
        return True
    in_winograd_form = taps[0] == taps[1] and taps[0] / stride in (2, 3)
    return in_winograd_form or type(layer) is nn.ConvTranspose2d and stride > 1


def _meets_convolution(following):
    """Whether the next layer, behind an activation at most, is a convolution."""
    if following and type(following[0]) in ACTIVATIONS:
        following = following[1:]
    return len(following) > 0 and isinstance(following[0], (nn.Conv2d, nn.ConvTranspose2d))


FUSED = {nn.Linear: _linears, nn.Conv2d: _convolution, nn.ConvTranspose2d: _convolution, nn.ReLU: _convolution,
         nn.SiLU: _convolution}
