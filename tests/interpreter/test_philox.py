"""Philox4x32-10 and its normals: published vectors, the reference's stream, and independence of the tiling."""

import pytest
import torch
import triton
import triton.language as tl
from fastflow.kernels import gaussian, philox

from fastflow import reference

# Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))]


@triton.jit
def stream_kernel(grouped_ptr, single_ptr, offset: tl.int64, seed: tl.int64, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    element = (pid * BLOCK + tl.arange(0, BLOCK))[None, :]
    block = (pid * (BLOCK // 4) + tl.arange(0, BLOCK // 4))[None, :] + offset
    tl.store(grouped_ptr + element, philox.normals_of_blocks(block, seed))
    tl.store(single_ptr + element, philox.normals_of_elements(element, offset, seed))


@triton.jit
def radius_kernel(word_ptr, out_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, philox._radius(tl.load(word_ptr + at).to(tl.uint32)))


def test_known_answers():
    counters, keys, words = (torch.tensor(column) for column in zip(*KNOWN, strict=True))
    assert torch.equal(gaussian.philox4x32(counters, keys), words)


def test_same_words_as_the_reference():
    counters = torch.randint(0, 2**32, (1000, 4))
    keys = torch.randint(0, 2**32, (1000, 2))
    assert torch.equal(gaussian.philox4x32(counters, keys), reference.philox4x32(counters, keys))


@pytest.mark.parametrize("offset, seed", [(0, 5), (2**32 - 3, -7), (2**40 + 1, 2**62 + 12345)])
def test_normals_match_the_reference_whatever_the_block(offset, seed):
    count = 1 << 12
    expected = reference.philox_normal((count,), seed, offset)
    for block in (1024, 4096):
        grouped, single = torch.empty(count), torch.empty(count)
        stream_kernel[(count // block,)](grouped, single, offset, seed, BLOCK=block)
        assert torch.equal(grouped, single)
        assert (grouped - expected).abs().max() < 1e-6
        if block == 1024:
            first = grouped
    assert torch.equal(first, grouped)


def test_the_radius_is_exact_at_both_ends():
    """u is not rounded to float32: near 1, log(u) comes from 1 - u."""
    k = torch.cat([torch.arange(0, 1024), torch.arange(2**23 - 512, 2**23 + 512), torch.arange(2**24 - 2048, 2**24)])
    out = torch.empty(k.numel())
    radius_kernel[(1,)](k << 8, out, COUNT=k.numel())
    low = torch.log((k.double() + 0.5) * 2.0**-24)
    high = torch.log1p(-(2.0**24 - 0.5 - k.double()) * 2.0**-24)
    exact = torch.sqrt(-2.0 * torch.where(k < 2**23, low, high))
    assert ((out.double() - exact).abs() <= 2e-7 * exact).all()
