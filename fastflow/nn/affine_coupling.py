"""The affine coupling layer: part of the input scales and shifts the rest."""

import torch
import torch.nn.functional as F

from fastflow import checks, functional
from fastflow.autograd import differentiable
from fastflow.functional import ScaleMap
from fastflow.nn.channel_affine import deferrable
from fastflow.nn.coupling import Coupling

__all__ = ["AffineCoupling"]


class AffineCoupling(Coupling):
    """z keeps the passive part of x and transforms the rest, z = x*s + t, with s and t computed from the passive part.

    Four ways to split x (B, C, *S):

    - "channel": along dim 1 into the first C // 2 channels and the rest (one more if C is odd). The first half is
      passive, with ``flip`` the second; channels keep their places. The conditioner sees the passive half and returns
      params of twice the channels of the other.
    - a list of indices: those channels are passive, with ``flip`` the others; otherwise like "channel". The conditioner
      sees them in that order, or the others in theirs.
    - "checkerboard": a position is passive where the sum of its spatial indices (for (B, D) data the feature's index)
      is even, with ``flip`` where it is odd.
    - a mask, a tensor of zeros and ones that broadcasts against x.shape[1:] from the right, so (C, 1, 1) selects
      channels of an image: 1 is passive, with ``flip`` 0.

    In the last two, z = mask*x + (1 - mask)*(x*s + t); the conditioner sees mask*x and returns params (B, 2C, *S) or a
    pair, each (B, C, *S), of which those at passive places are ignored, also in the log-determinant.

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
        super().__init__(conditioner, split, flip)
        checks.choice("layout", layout, functional.LAYOUTS)
        checks.choice("order", order, ("scale_shift", "shift_scale"))
        self.scale = ScaleMap.of(scale)
        self.layout = layout
        self.order = order
        self.shift_first = bool(shift_first)
        self.params_per_channel = 1 if self.scale.kind == "additive" else 2

    def extra_repr(self):
        return f"split={self.split!r}, flip={self.flip}, scale={self.scale}"

    def _parts(self, x):
        if (self.split == "channel" and x.shape[1] > 1 and torch.is_grad_enabled() and x.requires_grad
                and deferrable(x)):
            half = x.shape[1] // 2
            whole, passive = _Seen.apply(x, *((half, x.shape[1] - half) if self.flip else (0, half)))
            return passive, whole
        return super()._parts(x)

    def _couple_channels(self, x, parts, params, inverse, logdet):
        passive, active = parts
        if active.shape[1] == x.shape[1] > passive.shape[1]:  # whole
            kept = -passive.shape[1] if self.flip else passive.shape[1]
            return self._transform(active, params, inverse, logdet, kept)
        if not self.flip:
            return self._transform(active, params, inverse, logdet, passive)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._transform(x, params, inverse, logdet, -passive.shape[1])
        # With a gradient of x, the split's node joins those of both parts; that of the whole and that of the
        # conditioner's slice of it, widened with zeros, would be added.
        y, logdet = self._transform(active, params, inverse, logdet, None)
        return torch.cat([y, passive.to(y.dtype)], 1), logdet

    def _couple_masked(self, x, params, inverse, logdet):
        if isinstance(params, (tuple, list)):
            params = self._packed(params)
        return super()._couple_masked(x, params, inverse, logdet)

    def _transform(self, x, params, inverse, logdet, passive):
        return functional.affine_coupling(x, params, scale=self.scale, layout=self.layout, order=self.order,
                                          shift_first=self.shift_first, inverse=inverse, logdet=logdet, passive=passive)

    def _select(self, params, active):
        if self.params_per_channel == 1:
            return params.flatten(1).index_select(1, active)
        return tuple(p.flatten(1).index_select(1, active) for p in self._raw_and_shift(params))

    def _packed(self, pair):
        if len(pair) != 2:
            raise ValueError(f"conditioner output: expected a pair (raw_scale, shift), got {len(pair)} tensors")
        for part in pair:
            checks.tensor("conditioner output", part)
        first, second = pair if self.order == "scale_shift" else pair[::-1]
        if self.layout == "chunk":
            return torch.cat([first, second], 1)
        return torch.stack([first, second], 2).flatten(1, 2)

    def _raw_and_shift(self, params):
        if self.layout == "chunk":
            first, second = params.chunk(2, 1)
        else:
            first, second = params[:, 0::2], params[:, 1::2]
        return (first, second) if self.order == "scale_shift" else (second, first)


class _Seen(torch.autograd.Function):
    """(x, the channels of x that a conditioner sees), whose gradients meet in one launch.

    The gradient of the whole comes fresh from the coupling's backward, to which alone it is handed: the conditioner's
    is added to its channels where they are. torch.split would copy both parts once more.
    """

    @staticmethod
    def forward(ctx, x, start, length):
        ctx.set_materialize_grads(False)
        ctx.consts = start, length, x.shape[1] - start - length
        return x.view_as(x), x.narrow(1, start, length)

    @staticmethod
    def backward(ctx, grad, grad_seen):
        if grad_seen is None:
            return grad, None, None
        start, length, behind = ctx.consts
        if grad is None or differentiable.wanted((grad, grad_seen)):
            wide = F.pad(grad_seen, (0, 0) * (grad_seen.dim() - 2) + (start, behind))
            return wide if grad is None else grad + wide, None, None
        grad.narrow(1, start, length).add_(grad_seen)
        return grad, None, None
