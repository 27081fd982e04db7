"""The conditioner of Flow++: gated convolutions and self-attention over all positions."""

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.nn.context import ContextShift
from fastflow.nn.precision import taken

__all__ = ["GatedAttentionNet", "GatedConv"]


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels (dim 1) of each position."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _concat_elu(x):
    return F.elu(torch.cat([x, -x], 1))


class GatedConv(nn.Module):
    """h + a*sigmoid(b), a and b from two convolutions over ELU(h, -h), 3x3 and 1x1, normalised over the channels.

    Args:
        channels: of input and output.
        dropout: probability between the convolutions.
    """

    def __init__(self, channels, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.dropout = nn.Dropout2d(dropout)
        self.gate = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.norm = ChannelNorm(channels)

    def forward(self, h):
        inner = self.dropout(_concat_elu(self.conv(_concat_elu(h))))
        return self.norm(h + F.glu(self.gate(inner), 1))


class GatedAttention(nn.Module):
    """h + a*sigmoid(b), a and b from multi-head self-attention of all positions, normalised over the channels."""

    def __init__(self, channels, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.gate = nn.Conv2d(channels, 2 * channels, 1)
        self.norm = ChannelNorm(channels)

    def forward(self, h, position):
        batch, channels, height, width = h.shape
        q, k, v = self.qkv(h + position).flatten(2).unflatten(1, (3, self.n_heads, -1)).transpose(3, 4).unbind(1)
        heads = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        mixed = heads.reshape(batch, channels, height, width)
        return self.norm(h + F.glu(self.gate(mixed), 1))


class GatedAttentionNet(nn.Module):
    """A 3x3 convolution, ``n_blocks`` times a gated convolution and gated self-attention, and a 3x3 convolution.

    The last one starts at zero, so that a coupling starts simple. Attention sees a learned embedding of the position.

    Args:
        in_channels, out_channels: channels of input and output.
        size: (H, W) of the input.
        hidden_channels: channels between, a multiple of ``n_heads``.
        n_blocks: pairs of gated convolution and attention.
        n_heads: heads of the attention; 0 for gated convolutions alone.
        dropout: probability inside the gated convolutions.
        context: keyword arguments of a ContextShift, which adds what the context says to the first convolution's
            answer; none for a network without a context.

    Raises:
        ValueError: hidden_channels do not split into heads; on a call, x of another size, or a context of another shape
            than the network was built for.

    References:
        Ho et al., "Flow++", 2019, arXiv:1902.00275, section 3.3.
    """

    def __init__(self, in_channels, out_channels, size, hidden_channels=96, n_blocks=10, n_heads=4, dropout=0.0,
                 **context):
        super().__init__()
        if n_heads < 0 or n_heads > 0 and hidden_channels % n_heads:
            raise ValueError(f"hidden_channels: expected a multiple of n_heads = {n_heads}, got {hidden_channels}")
        self.size = tuple(size)
        self.first = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.context = ContextShift(hidden_channels, **context)
        self.blocks = nn.ModuleList()
        for _ in range(n_blocks):
            block = [GatedConv(hidden_channels, dropout)]
            self.blocks.append(nn.ModuleList([*block, GatedAttention(hidden_channels, n_heads)] if n_heads else block))
        self.position = nn.Parameter(0.01 * torch.randn(hidden_channels, *self.size)) if n_heads and n_blocks else None
        self.last = nn.Conv2d(hidden_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x, context=None):
        checks.events("x", x, (self.first.in_channels, *self.size))
        x = taken(x, self.first.weight)
        shift = self.context(x, context)
        h = self.first(x) if shift is None else self.first(x) + shift
        for conv, *attention in self.blocks:
            h = conv(h)
            for layer in attention:
                h = layer(h, self.position)
        return self.last(h)
