"""Philox4x32-10 and the normals made from it: element i of a stream is word i % 4 of counter i // 4.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
import triton
import triton.language as tl

from . import layout, maths


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full([], 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full([], 0xCD9E8D57, tl.uint32))
        low0 = c0 * tl.full([], 0xD2511F53, tl.uint32)
        low1 = c2 * tl.full([], 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _words(block, seed):
    """The four words of counter ``block`` (int64) under the key ``seed`` (int64)."""
    zero = (block * 0).to(tl.uint32)
    return philox4x32(block.to(tl.uint32), (block >> 32).to(tl.uint32), zero, zero,
                      zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32))


@triton.jit
def _radius(word):
    """sqrt(-2 log u) for u = ((word >> 8) + 1/2) * 2^-24, exact also where float32 can't hold u."""
    k = (word >> 8).to(tl.int32)
    high = k >= 8388608
    # From 1/2 on, log u = log1p(-t) with t = 1 - u = ((2^24 - 1 - k) + 1/2) * 2^-24, which float32 holds.
    t = (tl.where(high, 16777215 - k, k).to(tl.float32) + 0.5) * 5.9604644775390625e-08
    # Both logarithms from one polynomial: log(t) by its bits, log1p(-t) by doubling from 1/4 on.
    bits = t.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    exponent = ((bits >> 23) - 127).to(tl.float32)
    mantissa = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    doubled = t > 0.25
    f = tl.where(high, tl.where(doubled, 1.0 - 2.0 * t, -t), mantissa - 1.0)
    return maths.sqrt(-2.0 * maths.log_parts(f, tl.where(high, tl.where(doubled, -1.0, 0.0), exponent)))


@triton.jit
def _pair(radius_word, angle_word):
    radius = _radius(radius_word)
    cosine, sine = maths.cos_sin_turns((angle_word >> 8).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def normals_of_blocks(block, seed):
    """float32 normals of the int64 counters ``block`` [R, N]: [R, 4N], those of a counter side by side."""
    w0, w1, w2, w3 = _words(block, seed)
    n0, n1 = _pair(w0, w1)
    n2, n3 = _pair(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [block.shape[0], 4 * block.shape[1]])


@triton.jit
def normals_of_elements(element, offset, seed):
    """float32 normals of single elements of a stream, each with its counter: where neighbours do not share one."""
    w0, w1, w2, w3 = _words((element >> 2) + offset, seed)
    late = (element & 2) == 2
    cosine, sine = _pair(tl.where(late, w2, w0), tl.where(late, w3, w1))
    return tl.where((element & 1) == 1, sine, cosine)


@triton.jit(do_not_specialize=["n"])
def philox4x32_kernel(counter_ptr, key_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    c0, c1, c2, c3 = philox4x32(
        tl.load(counter_ptr + 4 * row, mask=inside, other=0).to(tl.uint32),
        tl.load(counter_ptr + (4 * row + 1), mask=inside, other=0).to(tl.uint32),
        tl.load(counter_ptr + (4 * row + 2), mask=inside, other=0).to(tl.uint32),
        tl.load(counter_ptr + (4 * row + 3), mask=inside, other=0).to(tl.uint32),
        tl.load(key_ptr + 2 * row, mask=inside, other=0).to(tl.uint32),
        tl.load(key_ptr + (2 * row + 1), mask=inside, other=0).to(tl.uint32))
    tl.store(out_ptr + 4 * row, c0.to(tl.int64), mask=inside)
    tl.store(out_ptr + (4 * row + 1), c1.to(tl.int64), mask=inside)
    tl.store(out_ptr + (4 * row + 2), c2.to(tl.int64), mask=inside)
    tl.store(out_ptr + (4 * row + 3), c3.to(tl.int64), mask=inside)


def philox4x32_words(counter, key):
    """(n, 4) int64 words of the (n, 4) counters under the (n, 2) keys, all words in [0, 2^32)."""
    counter, key = counter.contiguous(), key.expand(*counter.shape[:-1], 2).contiguous()
    out = torch.empty_like(counter)
    n = counter.numel() // 4
    layout.launch(philox4x32_kernel, layout.ceil_div(n, 256), counter, counter, key, out, n, BLOCK=256)
    return out
