"""Convolutional networks with a bounded Lipschitz constant in the 2-norm."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow.flows.lipschitz import LipSwish, spectral_bound
from fastflow.nn import ContextShift

__all__ = ["LipschitzConvNet", "SpectralConv2d", "conv_spectral_bound"]


def conv_spectral_bound(weight, height, width):
    """An upper bound of the 2-norm of a zero-padded convolution as a map of images of that size, 0-d, differentiable.

    On a torus that is half a kernel larger than the image the convolution is circular, and block-diagonal in the
    Fourier basis: its norm is the largest singular value of the (O, I) matrices of all frequencies, bounded by power
    iteration on their Gram matrices (:func:`spectral_bound`). The zero-padded one is a part of it, with zeros put in
    and rows left out, and its norm no larger.

    Args:
        weight: (O, I, k, k) with k odd, of a convolution with padding k // 2.
        height, width: of the images.

    References:
        Sedghi, Gupta and Long, "The singular values of convolutional layers", 2019, arXiv:1805.10408.
        Delattre et al., "Efficient bound of Lipschitz constant for convolutional layers by Gram iteration", 2023,
        arXiv:2305.16173.
    """
    if tuple(weight.shape[2:]) == (1, 1):
        return spectral_bound(weight[:, :, 0, 0])
    # A large kernel is aliased on a smaller torus: the image's far end would reach round to its beginning.
    size = tuple(max(n + k // 2, k) for n, k in zip((height, width), weight.shape[2:], strict=True))
    frequencies = torch.fft.rfft2(weight, s=size)  # the other half are complex conjugates
    return spectral_bound(frequencies.flatten(2).permute(2, 0, 1))


class SpectralConv2d(nn.Conv2d):
    """A convolution of stride 1 with zeros around, whose map of images (B, C, H, W) has induced 2-norm up to ``bound``:
    its weight is W min(1, bound / |W|), with |W| from above by :func:`conv_spectral_bound`.

    Args:
        in_channels, out_channels, kernel_size: of the convolution; an odd kernel size.
        image_size: (H, W) of the images.
        bound: positive.
    """

    def __init__(self, in_channels, out_channels, kernel_size, image_size, bound=1.0):
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected a positive odd int, got {kernel_size!r}")
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.image_size, self.bound = tuple(image_size), bound

    def bounded_weight(self):
        """The weight whose norm is up to ``bound``."""
        norm = conv_spectral_bound(self.weight, *self.image_size)
        return self.weight * (self.bound / torch.clamp(norm, min=self.bound))

    def forward(self, x):
        return F.conv2d(x, self.bounded_weight(), self.bias, padding=self.padding)


class LipschitzConvNet(nn.Module):
    """Convolutions of images (B, C, H, W) to such images with |g(x) - g(y)| <= bound |x - y| in the 2-norm.

    Each of the n convolutions has norm up to bound^(1/n); activations must have slopes within [-1, 1]. What the context
    adds before the first activation between convolutions has no bound, which the constant in x doesn't need.

    Args:
        image_shape: (C, H, W), of one x.
        hidden_channels: channels between convolutions.
        kernel_sizes: odd, one more than there are hidden channels.
        bound: the Lipschitz constant, also an attribute.
        activation: constructor of the activation module: :class:`LipSwish`, nn.ELU, nn.Tanh, ...
        activate_first: whether an activation comes before the first convolution too.
        context: keyword arguments of an nn.ContextShift; none for a network without a context.

    References:
        Chen et al., "Residual flows for invertible generative modeling", 2019, arXiv:1906.02735, appendix.
    """

    def __init__(self, image_shape, hidden_channels=(512, 512), kernel_sizes=(3, 1, 3), *, bound=0.98,
                 activation=LipSwish, activate_first=False, **context):
        super().__init__()
        for name, value in (("image_shape", image_shape), ("hidden_channels", hidden_channels)):
            if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in value):
                raise ValueError(f"{name}: expected positive ints, got {value!r}")
        if len(image_shape) != 3:
            raise ValueError(f"image_shape: expected (C, H, W), got {image_shape!r}")
        if not hidden_channels or len(kernel_sizes) != len(hidden_channels) + 1:
            raise ValueError(f"kernel_sizes: expected one more than hidden_channels {tuple(hidden_channels)}, which "
                             f"has at least one, got {tuple(kernel_sizes)}")
        if not bound > 0:
            raise ValueError(f"bound: expected a positive number, got {bound!r}")
        self.event_shape, self.bound = tuple(image_shape), bound
        sizes = (image_shape[0], *hidden_channels, image_shape[0])
        each = bound ** (1.0 / len(kernel_sizes))
        self.layers = nn.ModuleList(SpectralConv2d(a, b, kernel, image_shape[1:], each) for a, b, kernel
                                    in zip(sizes[:-1], sizes[1:], kernel_sizes, strict=True))
        self.activations = nn.ModuleList(activation() for _ in hidden_channels)
        self.first = activation() if activate_first else nn.Identity()
        self.context = ContextShift(sizes[1], **context)

    def forward(self, x, context=None):
        return self.bind(context)(x)

    def bind(self, context=None):
        """The network of one context as a function of x (B, C, H, W), with the weights' norms taken once."""
        operands = [(layer.bounded_weight(), layer.bias) for layer in self.layers]

        def function(x):
            shift = self.context(x, context)
            h = _conv(self.first(x), *operands[0])
            h = h if shift is None else h + shift
            for activation, (weight, bias) in zip(self.activations, operands[1:], strict=True):
                h = _conv(activation(h), weight, bias)
            return h

        return function


def _conv(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
