"""Jet: affine couplings on image patches with vision transformers as conditioners."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.logdets import zero_logdet
from fastflow.flows.patchify import Patchify
from fastflow.flows.transform import Compose
from fastflow.functional import ScaleMap
from fastflow.nn import AffineCoupling
from fastflow.nn.precision import taken
from fastflow.nn.transformer import TransformerLayer

__all__ = ["CONFIGS", "Jet"]

# Couplings and their depth; ImageNet 64x64 at 3.72 and 3.66 bits/dim.
CONFIGS = {
    "imagenet64-207m": {"image_shape": (3, 64, 64), "couplings": 32, "depth": 2},
    "imagenet64-1b": {"image_shape": (3, 64, 64), "couplings": 64, "depth": 5},
}
KINDS = ("channel", "channel", "channel", "channel", "spatial")
SPATIAL = ("checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes", "hstripes-inv")


class _Gather(nn.Module):
    """Tokens (B, T, D) to what a coupling splits along dim 1, by a fixed order: channels (B, D, T) or tokens; or back.

    Args:
        order: list of the T or D indices.
        channel: whether it orders channels.
        back: whether it undoes that.
    """

    moves_elements = True

    def __init__(self, order, channel, back):
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.channel, self.back = channel, back

    def forward(self, x, context=None):
        return self._run(x, self.back), zero_logdet(x)

    def inverse(self, z, context=None):
        return self._run(z, not self.back), zero_logdet(z)

    def _run(self, x, back):
        if back:
            x = x.index_select(1, torch.argsort(self.order))
            return x.transpose(1, 2) if self.channel else x
        return (x.transpose(1, 2) if self.channel else x).index_select(1, self.order)


class _ViT(nn.Module):
    """The conditioner: half of the channels (B, D/2, T), or of the tokens (B, T/2, D), to the params of the rest.

    It sees T tokens of D/2 values in both cases: each spatial one is cut in two.
    """

    def __init__(self, tokens, features, channels, depth, heads, channel):
        super().__init__()
        self.channel, self.half = channel, features // 2
        self.proj_in = nn.Linear(self.half, channels)
        self.pos_embed = nn.Parameter(torch.randn(tokens, channels) / math.sqrt(channels))
        self.layers = nn.ModuleList(TransformerLayer(channels, heads, approximate="tanh", eps=1e-6)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(channels, 1e-6)
        self.proj_out = nn.Linear(channels, features)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x, context=None):
        if context is not None:
            raise ValueError("context: expected None, because Jet is unconditional")
        checks.goes_with("x", x, "weight", self.proj_in.weight)
        x = taken(x, self.proj_in.weight)
        tokens = x.transpose(1, 2) if self.channel else x.unflatten(2, (2, self.half)).flatten(1, 2)
        h = self.proj_in(tokens) + self.pos_embed
        for layer in self.layers:
            h = layer(h)
        out = self.proj_out(self.norm(h))
        if self.channel:
            return out.transpose(1, 2)
        # (B, T, shift | scale) to (shift | scale of whole tokens, along dim 1)
        halves = out.unflatten(2, (2, self.half)).unflatten(1, (-1, 2)).permute(0, 3, 1, 2, 4)
        return halves.flatten(1, 2).flatten(2)


def _spatial_order(kind, rows, columns):
    """Indices of the passive half of the tokens, then of the other."""
    pattern = kind.removesuffix("-inv")
    if pattern == "checkerboard":
        even = [(row + column) % 2 == 0 for row in range(rows) for column in range(columns)]
    elif pattern == "vstripes":
        even = [column % 2 == 0 for _ in range(rows) for column in range(columns)]
    else:
        even = [row % 2 == 0 for row in range(rows) for _ in range(columns)]
    if kind.endswith("-inv"):
        even = [not value for value in even]
    return sorted(range(rows * columns), key=lambda index: not even[index])


class Jet(Flow):
    """Jet for images (B, C, H, W) with values around [-0.5, 0.5]; the base is N(0, I) over tokens z (B, T, D).

    Images are multiplied by ``data_scale`` and cut into T = HW / P^2 patches of D = C P^2 values. Affine couplings
    follow, z2 = (x2 + b) * 2 sigmoid(s): of half of the channels, by a permutation drawn at construction and fixed, or
    of half of the tokens, by a checkerboard or stripes. Conditioners are vision transformers whose last layer starts at
    zero, and with it the couplings as the identity. Train on dequantised images, :meth:`bits_per_dim`.

    Args:
        image_shape: (C, H, W), H and W divisible by ``patch_size``; D even, and T with spatial couplings.
        patch_size: P.
        channels: width of the transformers.
        couplings: number of couplings.
        depth: layers of each transformer.
        heads: attention heads, which divide ``channels``.
        kinds: "channel" and "spatial" in the order in which couplings take turns.
        spatial: the splits that the spatial ones take in turn, "checkerboard", "vstripes" (columns) or "hstripes"
            (rows), which pass the even places on, each with the suffix "-inv" to pass on the odd ones.
        data_scale: multiplies the images; 2 gives the couplings values in [-1, 1], as in the paper.

    Raises:
        ValueError, TypeError: a size that does not fit; the message names the argument.

    References:
        Kolesnikov et al., "Jet: a modern transformer-based normalizing flow", 2024, arXiv:2412.15129.
    """

    configs = CONFIGS

    def __init__(self, image_shape, *, patch_size=4, channels=512, couplings=32, depth=2, heads=8, kinds=KINDS,
                 spatial=SPATIAL, data_scale=2.0):
        patches = Patchify(image_shape, patch_size, channels_last=True, scale=data_scale)
        for name, value in (("channels", channels), ("couplings", couplings), ("depth", depth)):
            checks.count(name, value, 1)
        if not kinds:
            raise ValueError("kinds: expected at least one")
        for kind in kinds:
            checks.choice("kinds", kind, ("channel", "spatial"))
        if "spatial" in kinds and not spatial:
            raise ValueError("spatial: expected at least one split")
        for kind in spatial:
            checks.choice("spatial", kind, SPATIAL)
        layers, (tokens, features), uses = [], patches.token_shape, 0
        if features % 2:
            raise ValueError(f"patch_size: expected an even number of values in a patch, got {features}")
        for index in range(couplings):
            channel = kinds[index % len(kinds)] == "channel"
            if channel:
                order = torch.randperm(features, device="cpu").tolist()
            else:
                order, uses = self._order(spatial[uses % len(spatial)], patches), uses + 1
            layers += [_Gather(order, channel, back=False),
                       AffineCoupling(_ViT(tokens, features, channels, depth, heads, channel), scale=ScaleMap.jet(),
                                      order="shift_scale", shift_first=True),
                       _Gather(order, channel, back=True)]
        super().__init__(Compose(patches, *layers), StandardNormal(patches.token_shape))
        self.image_shape = patches.image_shape

    def shard_groups(self):
        """The couplings: each is a group of FSDP2's."""
        return [layer for layer in self.transform.transforms if isinstance(layer, AffineCoupling)]

    @staticmethod
    def _order(kind, patches):
        rows, columns = patches.rows, patches.columns
        lines = {"v": columns, "h": rows, "c": rows * columns}[kind[0]]
        if lines % 2:
            raise ValueError(f"image_shape: expected an even number of patches for {kind!r} to halve, "
                             f"got {rows} rows of {columns}")
        return _spatial_order(kind, rows, columns)
