"""How launchers see tensors: which dims run as one, how far apart elements lie, how wide a load may be, how a sample is
cut into tiles. And the one place where a kernel is launched."""

import functools
import math

import torch
import triton
import triton.language as tl

MAX_UNIT = 16  # elements; a 16-byte load needs at most 8
ONE_PROGRAM_UP_TO = 16384  # elements of a sample that one program adds up in its own loop
CHUNK = 8192  # elements of a program where a sample is shared among several
REDUCE_BLOCK = 1024
INT32_LIMIT = 2**31 - 2**16  # indices below it stay in 32 bits, a tile's padding included
# Of every launch. Products and sums are fused where a kernel says so and nowhere else: which of them a compiler would
# fuse differs between variants of one kernel, and would undo sums that keep their roundings.
OPTIONS = {"enable_fp_fusion": False}
INTERPRETS = triton.knobs.runtime.interpret


def launch(kernel, programs, like, *args, **meta):
    """Run ``kernel`` as ``programs`` programs on grid axis 0, on ``like``'s device and its current stream."""
    if programs:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, **meta, **OPTIONS)


def registers(count):
    """The launch option of at most ``count`` registers per thread. ptxas, left to choose a bound of its own, may spill
    a register or two to fit one more block on a multiprocessor; these bounds are tried to have no spill."""
    return {} if torch.version.hip else {"maxnreg": count}


def convolutions_in_tf32():
    """Whether torch lets cuDNN round the operands of float32 convolutions to 10 bits."""
    if torch.version.hip:
        return False
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by torch's newer names, which the older ones refuse to read
        return torch.backends.cudnn.conv.fp32_precision == "tf32"


def ceil_div(a, b):
    """ceil(a / b); triton.cdiv costs microseconds on the host."""
    return -(-a // b)


class Plan:
    """Operands of shape (B, *dims), dims run as few: what :func:`offsets_of` needs.

    Attributes:
        n: elements per sample; n_units: the same in units.
        sizes: the merged dims, the last one in units.
        strides: per operand (lead strides, one stride per merged dim), all but the last in units, or all in
            elements for a loose operand.
        bases: the base offsets, in units.
        unit: a power of two that divides the last dim, every outer stride and every base offset. A kernel multiplies by
            it, which tells the compiler how wide a load may be.
        wide: whether an index within a sample needs 64 bits.
    """

    __slots__ = ("bases", "n", "n_units", "rank", "sizes", "strides", "unit", "wide")

    def __init__(self, sizes, strides, bases, loose):
        bound = strides[: len(strides) - loose]
        unit = self.unit = math.gcd(MAX_UNIT, sizes[-1], *bases, *(s for own in bound for s in own[:-1]))
        self.n = math.prod(sizes)
        self.n_units = self.n // unit
        self.sizes = (*sizes[:-1], sizes[-1] // unit)
        self.strides = tuple((*(s // unit for s in own[:-1]), own[-1]) for own in bound) + strides[len(bound):]
        self.bases = tuple(base // unit for base in bases)
        self.rank = len(sizes)
        self.wide = self.n >= INT32_LIMIT

    def meta(self):
        return {"RANK": self.rank, "UNIT": self.unit, "WIDE": self.wide}


@functools.lru_cache(maxsize=4096)
def plan(shape, strides, bases=(), lead=1, reorder=False, loose=0):
    """The Plan of operands of one shape.

    Args:
        shape: (lead dims, *dims) of all operands.
        strides: one tuple per operand, in elements.
        bases: offsets of operands within their tensors, in elements.
        lead: leading dims that stay separate (1: the batch; 2: batch and channel).
        loose: how many operands at the end are not worth wide loads, and so don't narrow those of the others.
        reorder: whether dims may be visited in memory order (that of the first operand) instead of logical order.
    """
    dims = [d for d in range(lead, len(shape)) if shape[d] != 1]
    heads = [own[:lead] for own in strides]
    if any(shape[d] == 0 for d in dims):
        return Plan((0,), tuple((*head, 1) for head in heads), bases, loose)
    if reorder:
        dims.sort(key=lambda d: next((own[d] for own in strides if own[d]), 0), reverse=True)
    merged = []  # [size, [stride per operand]]
    for d in dims:
        own = [s[d] for s in strides]
        if merged and all(outer == shape[d] * inner for outer, inner in zip(merged[-1][1], own, strict=True)):
            merged[-1] = [merged[-1][0] * shape[d], own]
        else:
            merged.append([shape[d], own])
    merged = merged or [[1, [1] * len(strides)]]
    full = tuple((*head, *(m[1][i] for m in merged)) for i, head in enumerate(heads))
    return Plan(tuple(m[0] for m in merged), full, bases, loose)


def next_power_of_2(n):
    """The least power of two from n >= 1 on; triton.next_power_of_2 costs microseconds on the host, too."""
    return 1 << (n - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def tile_of(n, double, largest=2048):
    """(rows, block, num_warps): a tile of ``rows`` samples times ``block`` of the n elements of each."""
    largest //= 4 if double else 1
    block = min(max(16, next_power_of_2(max(n, 1))), largest)
    rows = max(1, 512 // block)
    return rows, block, 8 if rows * block >= 2048 else 4


def parts_of(n, one_program=ONE_PROGRAM_UP_TO, chunk=CHUNK):
    """Programs that share one sample of n elements."""
    return ceil_div(n, chunk) if n > one_program else 1


def suggests_channels_last(t):
    """Whether t's memory format, as its strides suggest it (Tensor.suggest_memory_format), is channels_last(_3d)."""
    shape, strides = t.shape, t.stride()
    if t.dim() not in (4, 5) or strides[1] == 0:
        return False
    least = 0
    for d in (1, *range(t.dim() - 1, 1, -1), 0):
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(shape[d], 1)
    return True


def empty_like_format(t, shape, dtype):
    """Uninitialised, in the memory format that t's strides suggest."""
    memory_format = torch.contiguous_format
    if suggests_channels_last(t):
        memory_format = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=t.device, memory_format=memory_format)


def nothing(like):
    """A result that was not asked for."""
    return torch.empty((0,), dtype=like.dtype, device=like.device)


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(like, *operands):
    """``like``'s dtype, float32 if any operand is."""
    if like.dtype != torch.float64 and any(t is not None and t.dtype == torch.float32 for t in operands):
        return torch.float32
    return like.dtype


def parts_of_whole(x, kept):
    """(active, passive, first channel of each) of a whole tensor whose first ``kept`` channels pass, or last -kept."""
    if kept >= 0:
        return x[:, kept:], x[:, :kept], kept, 0
    return x[:, :kept], x[:, kept:], 0, x.shape[1] + kept


def halves(params, interleaved):
    """(strides as if of one half, elements from the first half to the second) of packed params along dim 1."""
    strides = list(params.stride())
    second = strides[1] if interleaved else strides[1] * (params.shape[1] // 2)
    if interleaved:
        strides[1] *= 2
    return tuple(strides), second


@triton.jit
def offsets_of(batch, index, sizes, strides, base, RANK: tl.constexpr, UNIT: tl.constexpr,
               LOOSE: tl.constexpr = False):
    """int64 offsets of element ``index`` (within a sample) of sample ``batch`` (int64) of an operand of a Plan."""
    return offsets_within(batch * strides[0] + base, index, sizes, strides, 1, RANK, UNIT, LOOSE)


@triton.jit
def offsets_within(outer, index, sizes, strides, LEAD: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
                   LOOSE: tl.constexpr = False):
    """int64 offsets of element ``index`` of what begins ``outer`` (int64) units into an operand of a Plan."""
    rest = index
    inner = index
    if RANK > 1:
        inner = rest % (sizes[RANK - 1] * UNIT)
        rest = rest // (sizes[RANK - 1] * UNIT)
        for step in tl.static_range(RANK - 2):
            outer = outer + (rest % sizes[RANK - 2 - step]).to(tl.int64) * strides[LEAD + RANK - 2 - step]
            rest = rest // sizes[RANK - 2 - step]
        outer = outer + rest.to(tl.int64) * strides[LEAD]
    if not LOOSE:
        outer = outer * UNIT
    return outer + inner.to(tl.int64) * strides[LEAD + RANK - 1]


@triton.jit
def row_sum(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile [ROWS, BLOCK] summed along its rows: [ROWS, 1].

    The order of tl.sum is the compiler's: it depends on how a tile lies in registers, and so on the width of loads,
    which differs with strides and alignment. So neighbours are added two by two. The sums of 128 elements, which lie in
    several warps, are added at once: in float64, which holds a sum of a few float32 whatever its order.
    """
    AT_ONCE: tl.constexpr = BLOCK >> 7 if tile.dtype == tl.float32 and BLOCK > 128 else 1
    for level in tl.static_range(12):
        if BLOCK >> level > AT_ONCE:
            tile = tl.sum(tl.reshape(tile, [ROWS, BLOCK >> (level + 1), 2]), 2)
    if AT_ONCE > 1:
        tile = tl.sum(tile.to(tl.float64), 1).to(tl.float32)[:, None]
    return tile


@triton.jit
def column_sum(tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of few rows along the columns: [1, BLOCK]."""
    for level in tl.static_range(12):
        if ROWS >> level > 1:
            tile = tl.sum(tl.reshape(tile, [ROWS >> (level + 1), 2, BLOCK]), 1)
    return tile


@triton.jit(do_not_specialize=["carried_stride", "n_rows", "length"])
def row_sums_kernel(partial_ptr, carried_ptr, carried_stride, out_ptr, n_rows, length,
                    NEGATE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """out[r] = [carried[r] +] (+/-) sum of row r of the contiguous (n_rows, length) partial."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], out_ptr.dtype.element_ty)
    for start in range(0, length, BLOCK):
        inside = (rows < n_rows) & (start + columns < length)
        total += tl.load(partial_ptr + (rows * length + start + columns), mask=inside, other=0.0)
    store_row_totals(row_sum(total, ROWS, BLOCK), carried_ptr, carried_stride, out_ptr, rows, n_rows, NEGATE)


@triton.jit
def store_row_totals(total, carried_ptr, carried_stride, out_ptr, rows, n_rows, NEGATE: tl.constexpr):
    if NEGATE:
        total = -total
    if carried_ptr is not None:
        carried = tl.load(carried_ptr + rows * carried_stride, mask=rows < n_rows, other=0.0)
        total = carried.to(total.dtype) + total
    tl.store(out_ptr + rows, total, mask=rows < n_rows)


def row_sums(partial, out, carried=None, negate=False):
    """Launch :func:`row_sums_kernel`; partial holds out.numel() rows."""
    rows = out.numel()
    length = partial.numel() // max(rows, 1)
    block = min(next_power_of_2(max(length, 16)), REDUCE_BLOCK)
    per_program = max(1, 512 // block)
    launch(row_sums_kernel, ceil_div(rows, per_program), out, partial, carried,
           0 if carried is None else carried.stride(0), out, rows, length, NEGATE=negate, BLOCK=block, ROWS=per_program)
