"""Pre-norm transformer layers over tokens (B, T, C), and the keys and values that decoding keeps of them."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["GrowingCache", "KVCache", "TransformerLayer"]


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), and to that + mlp(norm(.)): one layer of a transformer over tokens (B, T, C).

    Args:
        channels: C.
        heads: number of attention heads, which divides C.
        expansion: hidden width of the MLP over C.
        approximate: of the GELU, "none" or "tanh".
        eps: of the layer norms.

    References:
        Vaswani et al., "Attention is all you need", 2017, arXiv:1706.03762.
        Dosovitskiy et al., "An image is worth 16x16 words", 2021, arXiv:2010.11929.
    """

    def __init__(self, channels, heads, *, expansion=4, approximate="none", eps=1e-5):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads: expected a number that divides channels = {channels}, got {heads}")
        self.heads, self.approximate = heads, approximate
        self.attention_norm = nn.LayerNorm(channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels, eps)
        self.up = nn.Linear(channels, expansion * channels)
        self.down = nn.Linear(expansion * channels, channels)

    def forward(self, x, *, causal=False, remember=None, temperature=None):
        """(B, T, C) of x (B, T, C).

        Args:
            causal: whether a token sees none after it.
            remember: None, or a function (keys, values) -> (keys, values, mask), each (B, heads, *, C / heads), that
                adds those of earlier tokens; the mask says what each token of x sees, and ``causal`` does not count.
            temperature: None or (B, 1, 1, 1), by which attention logits are divided.
        """
        x = x + self._attention(self.attention_norm(x), causal, remember, temperature)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate=self.approximate))

    def _attention(self, x, causal, remember, temperature):
        heads = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        if temperature is not None:
            queries = queries / temperature.to(queries.dtype)
        mask = None
        if remember is not None:
            keys, values, mask = remember(keys, values)
            causal = False
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
        return self.proj(seen.transpose(1, 2).flatten(2))


class KVCache:
    """Keys and values of up to ``length`` tokens, for each layer in one preallocated tensor that is written in place.

    Where to write is a tensor on the device, so that a recorded CUDA graph can be replayed at every position. For use
    without gradients.
    """

    def __init__(self, length):
        self.length, self._kept = length, {}

    def clear(self):
        """Forget what was written. It is zeroed, because a masked NaN would still spoil a sum."""
        for kept in self._kept.values():
            for tensor in kept:
                tensor.zero_()

    def at(self, rows, limit):
        """The next tokens stand at positions ``rows`` (n,) int64, all below ``limit``; later ones are out of sight."""
        self.rows, self.limit = rows, limit
        self.mask = torch.arange(limit, device=rows.device) <= rows[:, None]

    def extend(self, layer, keys, values):
        """Write those of the tokens announced, and return (keys, values, mask) of everything below the limit."""
        if layer not in self._kept:
            shape = (*keys.shape[:2], self.length, keys.shape[3])
            self._kept[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        for kept, new in zip(self._kept[layer], (keys, values), strict=True):
            kept.index_copy_(2, self.rows, new)
        return *(kept[:, :, :self.limit] for kept in self._kept[layer]), self.mask


class GrowingCache:
    """The same for decoding one token at a time with gradients: new tensors at every step."""

    def __init__(self):
        self._kept = {}

    def extend(self, layer, keys, values):
        if layer in self._kept:
            keys, values = (torch.cat(pair, 2) for pair in zip(self._kept[layer], (keys, values), strict=True))
        self._kept[layer] = keys, values
        return keys, values, None
