"""The affine coupling layer: part of the input scales and shifts the rest."""

import torch
from torch import nn

from fastflow import checks, functional
from fastflow.functional import ScaleMap
from fastflow.nn.masks import checkerboard, partition

__all__ = ["AffineCoupling"]


class AffineCoupling(nn.Module):
    """z keeps the passive part of x and transforms the rest, z = x*s + t, with s and t computed from the passive part.

    Three ways to split x (B, C, *S):

    - "channel": along dim 1 into the first C // 2 channels and the rest (one more if C is odd). The first half is
      passive, with ``flip`` the second; channels keep their places. The conditioner sees the passive half and returns
      params of twice the channels of the other.
    - "checkerboard": a position is passive where the sum of its spatial indices (for (B, D) data the feature's index)
      is even, with ``flip`` where it is odd.
    - a mask, a tensor of zeros and ones that broadcasts against x.shape[1:] from the right, so (C, 1, 1) selects
      channels of an image: 1 is passive, with ``flip`` 0.

    In the last two, z = mask*x + (1 - mask)*(x*s + t); the conditioner sees mask*x and returns params (B, 2C, *S), of
    which those at passive places are ignored, also in the log-determinant.

    Args:
        conditioner: module, called with the passive part, and with the context as second argument if one is given;
            returns params as functional.affine_coupling takes them (for scale "additive" the shift alone).
        split, flip: see above.
        scale: a ScaleMap or its name.
        layout: "chunk" or "interleave", how the params are packed along dim 1.
        order: "scale_shift" or "shift_scale", what comes first in the params.
        shift_first: z = (x + t)*s.

    Raises:
        ValueError: an unknown option, a mask with other values than 0 and 1; on a call, what functional.affine_coupling
            raises.

    References:
        Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803.
    """

    def __init__(self, conditioner, *, split="channel", flip=False, scale="exp", layout="chunk", order="scale_shift",
                 shift_first=False):
        super().__init__()
        checks.choice("layout", layout, functional.LAYOUTS)
        checks.choice("order", order, ("scale_shift", "shift_scale"))
        self.conditioner = conditioner
        self.flip = bool(flip)
        self.scale = ScaleMap.of(scale)
        self.layout = layout
        self.order = order
        self.shift_first = bool(shift_first)
        self.mask_ones = 0
        mask = None
        if isinstance(split, torch.Tensor):
            mask, self.split = split.detach() != 0, "mask"
            if not torch.equal(mask.to(split.dtype), split.detach()):
                raise ValueError("split: expected a mask of zeros and ones, got other values")
            self.mask_ones = int(mask.sum())
        else:
            checks.choice("split", split, ("channel", "checkerboard"))
            self.split = split
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, context=None, *, logdet=None):
        """(z, logdet) of x (B, C, *S): data to noise. A running ``logdet`` (B,) is added to the result."""
        return self._run(x, context, False, logdet)

    def inverse(self, z, context=None, *, logdet=None):
        """(x, logdet) of z: noise to data."""
        return self._run(z, context, True, logdet)

    def extra_repr(self):
        return f"split={self.split!r}, flip={self.flip}, scale={self.scale}"

    def _run(self, x, context, inverse, logdet):
        checks.tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"x: expected shape (B, C, *S), got {tuple(x.shape)}")
        if self.split != "channel":
            return self._run_masked(x, context, inverse, logdet)
        half = x.shape[1] // 2
        first, second = torch.split(x, [half, x.shape[1] - half], 1)
        passive, active = (second, first) if self.flip else (first, second)
        params = self.conditioner(passive) if context is None else self.conditioner(passive, context)
        if not self.flip:
            return self._transform(active, params, inverse, logdet, passive)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._transform(x, params, inverse, logdet, half - x.shape[1])
        # With a gradient of x, the split's node joins those of both parts; that of the whole and that of the
        # conditioner's slice of it, widened with zeros, would be added.
        y, logdet = self._transform(active, params, inverse, logdet, None)
        return torch.cat([y, passive.to(y.dtype)], 1), logdet

    def _transform(self, x, params, inverse, logdet, passive):
        return functional.affine_coupling(x, params, scale=self.scale, layout=self.layout, order=self.order,
                                          shift_first=self.shift_first, inverse=inverse, logdet=logdet, passive=passive)

    def _run_masked(self, x, context, inverse, logdet):
        passive, count = self._passive(x)
        seen = torch.where(passive, x, torch.zeros_like(x))
        params = self.conditioner(seen) if context is None else self.conditioner(seen, context)
        additive = self.scale.kind == "additive"
        channels = x.shape[1] if additive else 2 * x.shape[1]
        checks.shape("conditioner output", params, (x.shape[0], channels, *x.shape[2:]))
        # The active elements are gathered, so that the log-determinant counts them alone whatever the scale map.
        if x.dim() > 2 and passive.shape[0] == 1:
            order, restore = partition(passive.expand(1, *x.shape[2:]))
            values = x.flatten(2).index_select(2, order)
            y, logdet = self._transform(values[..., count:], params.flatten(2).index_select(2, order[count:]), inverse,
                                        logdet, None)
            z = torch.cat([values[..., :count].to(y.dtype), y], 2).index_select(2, restore)
        else:
            order, restore = partition(passive.expand(x.shape[1:]))
            values, active = x.flatten(1).index_select(1, order), order[count:]
            if not additive:
                params = self._raw_and_shift(params)
            selected = params.flatten(1).index_select(1, active) if additive else tuple(
                p.flatten(1).index_select(1, active) for p in params)
            y, logdet = self._transform(values[:, count:], selected, inverse, logdet, values[:, :count])
            z = y.index_select(1, restore)
        return z.view(x.shape).contiguous(memory_format=torch._prims_common.suggest_memory_format(x)), logdet

    def _raw_and_shift(self, params):
        if self.layout == "chunk":
            first, second = params.chunk(2, 1)
        else:
            first, second = params[:, 0::2], params[:, 1::2]
        return (first, second) if self.order == "scale_shift" else (second, first)

    def _passive(self, x):
        """(mask, count): passive places as (1 or C, *S), broadcasting, and their number: of the S positions if the mask
        has one row for all channels, else of the C*S elements."""
        event = tuple(x.shape[1:])
        if self.split == "checkerboard":
            spatial = event[1:] or event
            mask = checkerboard(spatial, x.device)
            size = mask.numel()
            ones = (size + 1) // 2
            mask = mask[None] if event[1:] else mask
        else:
            mask = self.mask
            if mask.dim() == x.dim() and mask.shape[0] == 1:
                mask = mask[0]
            mask = mask.view((1,) * (len(event) - mask.dim()) + tuple(mask.shape))
            if mask.dim() != len(event) or any(m not in (1, e) for m, e in zip(mask.shape, event, strict=False)):
                raise ValueError(f"x: expected x.shape[1:] to go with the mask {tuple(self.mask.shape)}, got {event}")
            size = 1
            for dim in (event[1:] if len(event) > 1 and mask.shape[0] == 1 else event):
                size *= dim
            ones = self.mask_ones * size // mask.numel()
        return (~mask, size - ones) if self.flip else (mask, ones)
