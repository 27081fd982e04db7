"""Multi-scale architecture: space to depth, wavelets, checkerboards, and latents that leave early."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import backends, checks, functional
from fastflow.flows import memory
from fastflow.flows.contexts import takes_context
from fastflow.flows.logdets import zero_logdet
from fastflow.flows.transform import check_transform, initialize, noise_shape
from fastflow.functional import ScaleMap
from fastflow.nn import ContextShift
from fastflow.nn.precision import taken
from fastflow.reference.layout import channels_last

__all__ = ["CheckerboardSqueeze", "ContextPrior", "Flatten", "HaarSqueeze", "Split", "Squeeze", "ZeroConv"]


def _space_to_depth(x):
    """:class:`Squeeze`'s map of x (B, C, H, W) in any memory format to one in channels-last."""
    plain = not torch.compiler.is_compiling() and backends.needs_reference((x,)) is None
    if plain and x.device.type == "cpu" and x.numel():
        # Not as one copy with six dimensions, in whose order a CPU copies two values at a time.
        if x.requires_grad and torch.is_grad_enabled():
            return channels_last(F.pixel_unshuffle(x, 2))
        pixels = x.permute(0, 2, 3, 1)
        z = torch.stack([pixels[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1).flatten(3)
    else:
        batch, channels, height, width = x.shape
        blocks = x.permute(0, 2, 3, 1).unflatten(2, (width // 2, 2)).unflatten(1, (height // 2, 2))
        z = blocks.permute(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)
    return z.permute(0, 3, 1, 2)


def _even_image(x):
    checks.tensor("x", x)
    if x.dim() != 4 or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x: expected shape (B, C, H, W) with even H and W, got {tuple(x.shape)}")


def _four_bands(z):
    checks.tensor("z", z)
    if z.dim() != 4 or z.shape[1] % 4:
        raise ValueError(f"z: expected shape (B, 4C, H, W), got {tuple(z.shape)}")


class _Halving(nn.Module):
    """What all maps of (B, C, H, W) to (B, 4C, H/2, W/2) have in common."""

    def __init__(self, *, channels_last=False):
        super().__init__()
        self.channels_last = bool(channels_last)

    def noise_shape(self, event_shape):
        channels, height, width = event_shape
        return 4 * channels, height // 2, width // 2

    def data_shape(self, event_shape):
        channels, height, width = event_shape
        return channels // 4, 2 * height, 2 * width


class Squeeze(_Halving):
    """Space to depth: (B, C, H, W) to (B, 4C, H/2, W/2); output channel 4c + 2i + j holds pixel (i, j) of each block.

    Args:
        channels_last: whether z is in channels-last whatever x is in.

    Raises:
        ValueError: x is not 4-D or its height or width is odd.
    """

    moves_elements = True

    def forward(self, x, context=None):
        _even_image(x)
        if self.channels_last:
            return _space_to_depth(x), zero_logdet(x)
        # Where there are no elements torch's pixel_unshuffle leaves the shape as it was.
        z = F.pixel_unshuffle(x, 2) if x.numel() else x.reshape(len(x), *self.noise_shape(x.shape[1:]))
        return z, zero_logdet(x)

    def inverse(self, z, context=None):
        _four_bands(z)
        _, channels, height, width = z.shape
        x = F.pixel_shuffle(z, 2) if z.numel() else z.reshape(len(z), channels // 4, 2 * height, 2 * width)
        return x, zero_logdet(z)


class HaarSqueeze(_Halving):
    """One level of the orthonormal Haar wavelet transform: (B, C, H, W) to (B, 4C, H/2, W/2), log-determinant 0.

    Of each 2x2 block of channel c with rows (p, q) and (r, s), output channel c is the average (p + q + r + s)/2, and
    C + 3c, C + 3c + 1, C + 3c + 2 are the details (p - q + r - s)/2, (p + q - r - s)/2, (p - q - r + s)/2: averages of
    all channels first, so that a Split keeps the coarse image together. The inverse is the transpose.

    Args:
        channels_last: whether z is in channels-last whatever x is in.

    Raises:
        ValueError: x is not 4-D or its height or width is odd.

    References:
        Ardizzone et al., "Guided image generation with conditional invertible neural networks", 2019, arXiv:1907.02392.
    """

    moves_elements = True  # as far as a memory-saving pass goes: linear without parameters, nothing is saved

    def forward(self, x, context=None):
        _even_image(x)
        bands = _haar([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)])
        z = torch.cat([bands[0], torch.stack(bands[1:], 2).flatten(1, 2)], 1)
        z = channels_last(z) if self.channels_last else z
        return z, zero_logdet(x)

    def inverse(self, z, context=None):
        _four_bands(z)
        channels = z.shape[1] // 4
        details = z[:, channels:].unflatten(1, (channels, 3)).unbind(2)
        pixels = torch.stack(_haar([z[:, :channels], *details]), 2)  # the matrix is its own inverse
        return Squeeze().inverse(pixels.flatten(1, 2))[0], zero_logdet(z)


def _haar(blocks):
    """The symmetric orthogonal 4x4 matrix of signs over 2, applied to a list of four."""
    p, q, r, s = blocks
    top, bottom, top_difference, bottom_difference = p + q, r + s, p - q, r - s
    return [0.5 * (top + bottom), 0.5 * (top_difference + bottom_difference), 0.5 * (top - bottom),
            0.5 * (top_difference - bottom_difference)]


class CheckerboardSqueeze(nn.Module):
    """Colours of a checkerboard to channels: (B, C, H, W) to (B, 2C, H, W/2), the pixels with i + j even in the first C
    channels, the others in the rest, each row in order. A coupling on the halves is then a checkerboard coupling whose
    conditioner sees no zeros in between.

    Raises:
        ValueError: x is not 4-D or its width is odd.

    References:
        Ho et al., "Flow++", 2019, arXiv:1902.00275.
    """

    moves_elements = True

    def forward(self, x, context=None):
        checks.tensor("x", x)
        if x.dim() != 4 or x.shape[3] % 2:
            raise ValueError(f"x: expected shape (B, C, H, W) with even W, got {tuple(x.shape)}")
        pairs = x.unflatten(3, (x.shape[3] // 2, 2))
        even = self._even(x.shape[2], x.device)
        return torch.cat([torch.where(even, pairs[..., 0], pairs[..., 1]),
                          torch.where(even, pairs[..., 1], pairs[..., 0])], 1), zero_logdet(x)

    def inverse(self, z, context=None):
        checks.tensor("z", z)
        if z.dim() != 4 or z.shape[1] % 2:
            raise ValueError(f"z: expected shape (B, 2C, H, W), got {tuple(z.shape)}")
        first, second = z.chunk(2, 1)
        even = self._even(z.shape[2], z.device)
        pairs = torch.stack([torch.where(even, first, second), torch.where(even, second, first)], 4)
        return pairs.flatten(3), zero_logdet(z)

    def noise_shape(self, event_shape):
        channels, height, width = event_shape
        return 2 * channels, height, width // 2

    def data_shape(self, event_shape):
        channels, height, width = event_shape
        return channels // 2, height, 2 * width

    @staticmethod
    def _even(height, device):
        """(height, 1): rows whose first pixel belongs to the first colour."""
        return (torch.arange(height, device=device) % 2 == 0)[:, None]


class Flatten(nn.Module):
    """x (B, *event_shape) to z (B, D), the elements in order.

    Args:
        event_shape: the shape of one x.
    """

    moves_elements = True

    def __init__(self, event_shape):
        super().__init__()
        self.event_shape = tuple(event_shape)

    def forward(self, x, context=None):
        checks.tensor("x", x)
        checks.events("x", x, self.event_shape)
        return x.reshape(x.shape[0], math.prod(self.event_shape)), zero_logdet(x)

    def inverse(self, z, context=None):
        checks.tensor("z", z)
        checks.events("z", z, (math.prod(self.event_shape),))
        return z.reshape(z.shape[0], *self.event_shape), zero_logdet(z)

    def noise_shape(self, event_shape):
        return (math.prod(self.event_shape),)

    def data_shape(self, event_shape):
        return self.event_shape


class ZeroConv(nn.Conv2d):
    """A 3x3 convolution that starts at zero; ``context`` are the keyword arguments of an nn.ContextShift, which adds
    what the context says, nothing at first. None for a convolution of x alone."""

    def __init__(self, in_channels, out_channels, **context):
        super().__init__(in_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.shift = _zero_shift(out_channels, context)

    def forward(self, x, context=None):
        h = super().forward(taken(x, self.weight))
        return h if self.shift is None else h + self.shift(x, context)


def _zero_shift(channels, context):
    if not context:
        return None
    shift = ContextShift(channels, **context)
    nn.init.zeros_(shift.layer.weight)
    return shift


class ContextPrior(nn.Module):
    """z = (x - mu(context)) / sigma(context) of images x (B, C, H, W), the identity at first: with N(0, I) behind it a
    Gaussian prior of x that the context makes; log sigma as of :class:`Split`.

    Args:
        channels: C.
        context: keyword arguments of an nn.ContextShift, which gives mu and r packed along dim 1.
    """

    def __init__(self, channels, **context):
        super().__init__()
        self.shift = _zero_shift(2 * channels, context)

    def forward(self, x, context=None):
        """(z, logdet (B,))."""
        return functional.affine_coupling(x, self._params(x, context), scale=Split.SCALE, order="shift_scale",
                                          inverse=True)

    def inverse(self, z, context=None):
        """(x, logdet (B,))."""
        return functional.affine_coupling(z, self._params(z, context), scale=Split.SCALE, order="shift_scale")

    def _params(self, x, context):
        return self.shift(x, context).expand(-1, -1, *x.shape[2:]).contiguous()


class Split(nn.Module):
    """Half of the channels leave as latents, the rest goes on: x = (x1, x2), z = (z2, rest(x1)) packed as (B, D).

    x1 is the first C // 2 channels. With a ``prior``, a network that maps x1 to mu and r packed along dim 1 (mu first),
    the latents are z2 = (x2 - mu(x1)) / sigma(x1) with log sigma = 5 tanh(r / 5): a Gaussian prior learned for x2 is
    this transform to N(0, I). Without one z2 = x2.

    Args:
        event_shape: (C, *S), the shape of one x.
        rest: transform of x1; None leaves x1 as it is.
        prior: network from (B, C // 2, *S) to (B, 2 (C - C // 2), *S), or None.
        conditional: whether the prior is called with the context as second argument.
        scale: ScaleMap that makes sigma of r, or its name; "exp" is a log sigma without bounds.

    Raises:
        ValueError: fewer than two channels; on a call, an x of another shape.
    """

    SCALE = ScaleMap("tanh", clamp=5.0)
    saves_memory = True

    def __init__(self, event_shape, rest=None, *, prior=None, conditional=False, scale=None):
        super().__init__()
        self.event_shape = tuple(event_shape)
        channels = self.event_shape[0]
        if channels < 2:
            raise ValueError(f"event_shape: expected at least 2 channels to split, got {self.event_shape}")
        if rest is not None:
            check_transform("rest", rest)
        self.sizes = (channels // 2, channels - channels // 2)
        self.latent_shape = (self.sizes[1], *self.event_shape[1:])
        kept = (self.sizes[0], *self.event_shape[1:])
        self.rest_shape = kept if rest is None else noise_shape(rest, kept)
        self.rest = rest
        self.prior, self.conditional = prior, bool(conditional)
        self.scale = self.SCALE if scale is None else ScaleMap.of(scale)

    @property
    def takes_context(self):
        return self.conditional or (self.rest is not None and takes_context(self.rest))

    def split(self, x, logdet=None, context=None):
        """(x1, z2, logdet) of x (B, C, *S), z2 (B, C - C // 2, *S); a running ``logdet`` (B,) is added."""
        checks.tensor("x", x)
        checks.events("x", x, self.event_shape)
        x1, x2 = torch.split(x, self.sizes, 1)
        if self.prior is None:
            return x1, x2, zero_logdet(x) if logdet is None else logdet
        z2, logdet = functional.affine_coupling(x2, self._params(x1, context), scale=self.scale, order="shift_scale",
                                                inverse=True, logdet=logdet)
        return x1, z2, logdet

    def merge(self, x1, z2, logdet=None, context=None):
        """(x, logdet), the inverse of split."""
        if self.prior is None:
            return torch.cat([x1, z2], 1), zero_logdet(x1) if logdet is None else logdet
        return functional.affine_coupling(z2, self._params(x1, context), scale=self.scale, order="shift_scale",
                                          logdet=logdet, passive=x1)

    def recompute(self, x1, z2, context=None, *, needs=True, dtype=None):
        """The x that split made x1 and z2 of, and on the way split's graph, with one run of the prior; ``needs`` and
        ``dtype`` as in nn.AffineCoupling.recompute."""
        dtype = z2.dtype if dtype is None else dtype
        with torch.enable_grad():
            params = self._params(x1.detach().requires_grad_(needs), context)
            with torch.no_grad():
                x = functional.affine_coupling(z2, params, scale=self.scale, order="shift_scale", passive=x1)[0]
            x = x.to(dtype)
            functional.affine_coupling(x[:, self.sizes[0]:].detach().requires_grad_(needs), params, scale=self.scale,
                                       order="shift_scale", inverse=True)
        return x

    def forward(self, x, context=None):
        z1, z2, logdet = memory.kept(lambda x, *own: self.split(x, None, *own), x,
                                     *([context] if self.conditional and context is not None else []))
        if self.rest is not None:
            z1, more = self.rest(z1, self._of_rest(context))
            logdet = logdet + more
        return torch.cat([z2.flatten(1), z1.flatten(1)], 1), logdet

    def inverse(self, z, context=None):
        z2, z1 = self._unpack(z)
        total = None
        if self.rest is not None:
            z1, total = self.rest.inverse(z1, self._of_rest(context))
        return self.merge(z1, z2, total, context)

    def noise_shape(self, event_shape):
        return (math.prod(self.event_shape),)

    def data_shape(self, event_shape):
        return self.event_shape

    def initialize(self, x, context=None):
        z1, z2, _ = self.split(x, None, context)
        if self.rest is not None:
            z1 = initialize(self.rest, z1, self._of_rest(context))
        return torch.cat([z2.flatten(1), z1.flatten(1)], 1)

    def unpack(self, z):
        """The latents that z (B, D) packs, in the order in which they leave: z2 (B, C - C // 2, *S), those of rest."""
        z2, z1 = self._unpack(z)
        return [z2, *self.rest.unpack(z1)] if hasattr(self.rest, "unpack") else [z2, z1]

    def _params(self, x1, context):
        return self.prior(x1, context) if self.conditional else self.prior(x1)

    def _of_rest(self, context):
        """What the rest is handed of a context: None beside a prior that takes one, where it takes none."""
        return context if not self.conditional or takes_context(self.rest) else None

    def _unpack(self, z):
        checks.tensor("z", z)
        checks.events("z", z, (math.prod(self.event_shape),))
        size = math.prod(self.latent_shape)
        return z[:, :size].reshape(-1, *self.latent_shape), z[:, size:].reshape(-1, *self.rest_shape)
