"""Sign, log|det| and inverse of small matrices: one program holds one matrix in registers.

Gauss-Jordan elimination in place with partial pivoting. Rows stay where they are: ``position`` says where a row would
stand had the pivot rows been exchanged as LAPACK does, which also settles ties. The inverse comes out with its rows and
columns permuted and is put in order by the store.
"""

import math

import triton
import triton.language as tl

from . import layout, maths

LARGEST = 32  # matrices beyond it do not fit in the registers of a program


@triton.jit(do_not_specialize=["size", "matrix_stride", "row_stride", "column_stride"])
def slogdet_kernel(weight_ptr, sign_ptr, logabsdet_ptr, inverse_ptr, matrix_stride: tl.int64, row_stride: tl.int64,
                   column_stride: tl.int64, size, SIZE: tl.constexpr):
    """One matrix of ``size`` <= SIZE per program, in float64; padded with the identity."""
    matrix = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, SIZE)
    row = rows[:, None]
    column = rows[None, :]
    inside = (row < size) & (column < size)
    source = weight_ptr + matrix * matrix_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    a = tl.load(source, mask=inside, other=0.0).to(tl.float64)
    a = tl.where(inside, a, tl.where(row == column, 1.0, 0.0).to(tl.float64))
    broken = tl.max(tl.max((a != a).to(tl.int32), 1), 0) > 0
    singular = tl.full([], 0, tl.int32)
    position = rows
    pivots = tl.full([SIZE], 1.0, tl.float64)  # by step
    swaps = tl.full([], 0, tl.int32)
    for step in range(size):
        at = tl.sum(tl.where(column == step, a, 0.0), 1)  # the column to eliminate, by row
        size_of = tl.where(position < step, -1.0, tl.where(at == at, tl.abs(at), float("inf")).to(tl.float64))
        largest = tl.max(size_of, 0)
        chosen = tl.min(tl.where(size_of == largest, position, SIZE), 0)
        is_pivot = position == chosen
        position = tl.where(is_pivot, step, tl.where(position == step, chosen, position))
        swaps += (chosen != step).to(tl.int32)
        pivot = tl.sum(tl.where(is_pivot, at, 0.0), 0)
        singular = tl.where(pivot == 0.0, 1, singular)
        pivots = tl.where(rows == step, pivot, pivots)
        pivot = tl.where(pivot == 0.0, tl.full([], 1.0, tl.float64), pivot)
        pivot_row = tl.sum(tl.where(is_pivot[:, None], a, 0.0), 0)
        if inverse_ptr is not None:
            pivot_row = tl.where(rows == step, 1.0, pivot_row).to(tl.float64)
            scaled, factor = pivot_row / pivot, at.to(tl.float64) / pivot  # equal rows have the factor 1 and cancel
            rest = tl.fma(-factor[:, None], pivot_row[None, :], tl.where(column == step, 0.0, a).to(tl.float64))
            a = tl.where(is_pivot[:, None], tl.broadcast_to(scaled[None, :], [SIZE, SIZE]), rest)
        else:
            factor = tl.where(position <= step, 0.0, at).to(tl.float64) / pivot
            a = tl.fma(-factor[:, None], pivot_row[None, :], a)
    negative = (tl.sum((pivots < 0.0).to(tl.int32), 0) + swaps) & 1
    total = tl.sum(maths.log(tl.abs(pivots)), 0)
    sign = tl.where(negative == 1, -1.0, 1.0)
    nan = float("nan")
    lost = broken | (total != total)
    sign = tl.where(singular == 1, 0.0, sign)
    total = tl.where(singular == 1, tl.full([], float("-inf"), tl.float64), total)
    tl.store(sign_ptr + matrix, tl.where(lost, nan, sign))
    tl.store(logabsdet_ptr + matrix, tl.where(broken, tl.full([], nan, tl.float64), total))
    if inverse_ptr is not None:
        # Row r holds row position[r] of the inverse of the permuted matrix, column c its column c, which belongs to the
        # matrix's row whose position is c.
        origin = tl.sum(tl.where(position[:, None] == column, row, 0), 0)
        finite = (total - total) == 0.0
        a = tl.where(broken | (singular == 1) | (finite == 0), tl.full([], nan, tl.float64), a)
        target = matrix * size * size + position[:, None].to(tl.int64) * size + origin[None, :]
        tl.store(inverse_ptr + target, a, mask=(position[:, None] < size) & (origin[None, :] < size) & inside)


def _size_of(weight):
    size = weight.shape[-1]
    if size > LARGEST:
        raise ValueError(f"weight: expected matrices up to {LARGEST}x{LARGEST}, which fit in registers, "
                         f"got {size}x{size}")
    return size


def slogdet_fwd(weight, want_inverse):
    """(sign, logabsdet, inverse or (0,)); see functional.slogdet_inverse. One launch.

    Raises:
        ValueError: a matrix is larger than 32 x 32.
    """
    size = _size_of(weight)
    dtype = layout.compute_dtype(weight.dtype)
    sign = weight.new_empty(weight.shape[:-2], dtype=dtype)
    logabsdet = weight.new_empty(weight.shape[:-2], dtype=dtype)
    inverse = weight.new_empty(weight.shape if want_inverse else (0,), dtype=dtype)
    flat = weight.reshape(math.prod(weight.shape[:-2]), size, size)
    padded = max(2, layout.next_power_of_2(max(size, 1)))
    layout.launch(slogdet_kernel, flat.shape[0], weight, flat, sign, logabsdet, inverse if want_inverse else None,
                  *flat.stride(), size, SIZE=padded, num_warps=1 if padded <= 16 else 4, **layout.registers(168))
    return sign, logabsdet, inverse


def _fwd_launches(weight, want_inverse):
    _size_of(weight)
    return int(math.prod(weight.shape[:-2]) > 0)


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"slogdet_fwd": _fwd_launches}
