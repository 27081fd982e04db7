"""A sequence of layers whose convolutions take the activations in front of them into their kernels."""

from torch import nn

from fastflow import backends, functional
from fastflow.nn.conv_net import untouched

__all__ = ["ConvSequential"]

ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu"}


class ConvSequential(nn.Sequential):
    """An ``nn.Sequential``, its parameters under the same names, that computes the same but runs each Conv2d and
    ConvTranspose2d, with a ReLU or SiLU in front of it, by functional.activated_conv where that has a kernel.

    That is on a CPU, for layers without dilation, groups, output padding or padding other than zeros, with equal
    strides and paddings in both dimensions and, as inputs of a ConvTranspose2d or outputs of a Conv2d, channels in
    multiples of 16. Layers that are hooked, parametrised or of a subclass are called as they are. Between two such
    convolutions maps are channels-last; what leaves the sequence is as contiguous as a convolution's answer.
    """

    def forward(self, input):
        layers, at = list(self), 0
        while at < len(layers):
            layer, activation = layers[at], "none"
            if type(layer) in ACTIVATIONS and untouched(layer) and not getattr(layer, "inplace", False) \
                    and at + 1 < len(layers) and _is_simple(layers[at + 1]):
                layer, activation = layers[at + 1], ACTIVATIONS[type(layer)]
            if _is_simple(layer) and backends.serves("activated_conv", input, layer.weight, layer.bias) \
                    and _fits(layer, input):
                at += 1 if activation == "none" else 2
                input = functional.activated_conv(
                    input, layer.weight, layer.bias, stride=layer.stride[0], padding=layer.padding[0],
                    transposed=type(layer) is nn.ConvTranspose2d, activation=activation,
                    channels_last=_meets_convolution(layers[at:]))
            else:
                input = layers[at](input)
                at += 1
        return input


def _is_simple(layer):
    """Whether functional.activated_conv can say what a call of this layer computes."""
    return (type(layer) in (nn.Conv2d, nn.ConvTranspose2d) and untouched(layer) and layer.groups == 1
            and layer.dilation == (1, 1) and layer.padding_mode == "zeros" and not any(layer.output_padding)
            and isinstance(layer.padding, tuple) and len(set(layer.padding)) == len(set(layer.stride)) == 1)


def _fits(layer, x):
    """Whether it is a batch of maps that the layer takes; what is not is left to the layer, and so is the message."""
    return (x.dim() == 4 and x.shape[1] == layer.in_channels and x.dtype == layer.weight.dtype
            and (type(layer) is nn.ConvTranspose2d or all(size + 2 * padding >= taps for size, padding, taps in zip(
                x.shape[2:], layer.padding, layer.kernel_size, strict=True))))


def _meets_convolution(following):
    """Whether the next layer, behind an activation at most, is a convolution."""
    if following and type(following[0]) in ACTIVATIONS:
        following = following[1:]
    return bool(following) and isinstance(following[0], (nn.Conv2d, nn.ConvTranspose2d))
