"""The memory layouts that every operator must read, as functions from a tensor to one of the same shape and dtype.

All but the stride-0 ones also keep the values.
"""

import torch


def contiguous(t):
    return t.contiguous()


def transposed(t):
    """The last two dims swapped in memory."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() >= 2 else t.contiguous()


def permuted(t):
    """Dims in memory in reverse order."""
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def step_sliced(t):
    """Every second element of a wider last dim; what lies between is NaN."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=t.device)
    view = wide[..., ::2]
    view.copy_(t)
    return view


def odd_offset(t):
    """Dense, one element into its storage: aligned for no vector load."""
    flat = torch.full((t.numel() + 3,), float("nan"), dtype=t.dtype, device=t.device)
    view = flat[1 : 1 + t.numel()].view(t.shape)
    view.copy_(t)
    return view


def expanded(dim):
    """Stride 0 along ``dim``: every index there shows the first one's values."""

    def layout(t):
        return t.narrow(dim, 0, 1).contiguous().expand(t.shape) if t.shape[dim] else t

    layout.__name__ = f"expanded_{dim}"
    return layout


def channels_last(t):
    """Dim 1 fastest: torch.channels_last for 4-D tensors, channels_last_3d for 5-D ones, their like otherwise."""
    if t.dim() < 3:
        return t.contiguous()
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def channel_slice(t):
    """Some channels of a bigger channels_last buffer, as a conditioner's half arrives; the others are NaN."""
    shape = list(t.shape)
    shape[1] = 2 * shape[1] + 1
    big = channels_last(torch.full(shape, float("nan"), dtype=t.dtype, device=t.device))
    view = big[:, 1 : 1 + t.shape[1]]
    view.copy_(t)
    return view


def padded(t):
    """The inside of a buffer that is larger in every dim: not dense in any."""
    big = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = big[tuple(slice(1, 1 + n) for n in t.shape)]
    view.copy_(t)
    return view


KEEP_VALUES = (contiguous, transposed, permuted, step_sliced, odd_offset, channels_last, channel_slice, padded)
STRIDE_ZERO = (expanded(0), expanded(1), expanded(-1))
ALL = KEEP_VALUES + STRIDE_ZERO
# Shapes whose channels_last and contiguous strides can't be told apart by density alone.
AMBIGUOUS_SHAPES = ((3, 1, 4, 5), (3, 4, 1, 1), (1, 4, 1, 1), (3, 2, 4, 1), (1, 1, 4, 4))


def by_name(layout):
    return layout.__name__
