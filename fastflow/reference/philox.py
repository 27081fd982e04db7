"""The random numbers of gaussian_sample_kl: Philox4x32-10 and Box-Muller."""

import math

import torch

__all__ = ["philox4x32", "philox_normal", "to_int64"]


def philox4x32(counter, key):
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: (..., 4) int64, words in [0, 2^32), least significant first.
        key: (..., 2) int64, likewise, broadcasting against ``counter``.

    Returns:
        (..., 4) int64 of 32-bit words.
    """
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # int64 products wrap modulo 2^64, which leaves all 64 bits right.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def to_int64(value):
    """The low 64 bits of an int, be it numpy's, as a signed one."""
    value = value if isinstance(value, int) else int(value)
    return ((value & 0xFFFFFFFFFFFFFFFF) ^ (1 << 63)) - (1 << 63)


def philox_normal(shape, seed, offset=0, *, batch_dim=0, device=None):
    """float32 standard normals: element i of the row-major order is normal i%4 of counter i//4 + offset.

    The key is the low and high word of ``seed``: an int, a 0-d int64 tensor, or a (B,) int64 tensor whose entry b keys
    the elements with index b along ``batch_dim``. With u = ((word >> 8) + 0.5) * 2^-24, Box-Muller on words (0, 1)
    gives normals 0 and 1 as sqrt(-2 log u0) times cos and sin of 2 pi u1, and on words (2, 3) normals 2 and 3.
    """
    mask = 0xFFFFFFFF
    if not isinstance(seed, torch.Tensor):
        seed = torch.full((), to_int64(seed), dtype=torch.int64, device=device)  # filled there, as a graph can record
    seed = seed.to(device if device is not None else seed.device)
    size = math.prod(shape)
    index = torch.arange(size, device=seed.device)
    if seed.dim() == 0:
        index = index[: (size + 3) // 4] * 4  # one block gives four elements
    else:
        seed = seed.reshape([-1 if d == batch_dim else 1 for d in range(len(shape))]).expand(shape).reshape(-1)
    block = (index >> 2) + offset
    counter = torch.stack([block & mask, (block >> 32) & mask, torch.zeros_like(block), torch.zeros_like(block)], -1)
    words = philox4x32(counter, torch.stack([seed & mask, (seed >> 32) & mask], -1))
    u = ((words >> 8).double() + 0.5) * 2.0**-24
    radius, angle = torch.sqrt(-2.0 * torch.log(u[..., 0::2])), 2.0 * math.pi * u[..., 1::2]
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], -1).flatten(-2).float()
    if seed.dim() == 0:
        return normals.reshape(-1)[:size].reshape(shape)
    return normals.gather(-1, (index & 3)[:, None]).reshape(shape)
