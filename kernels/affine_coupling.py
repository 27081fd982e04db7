"""Affine coupling: y = x*s + t, (x + t)*s or the inverse of either, its log-determinant, and its gradients.

One program handles ``rows`` whole samples, or a part of one: samples beyond ONE_PROGRAM_UP_TO elements are shared
among programs, whose partial log-determinants a second launch adds up. The order of additions depends on the shape of a
sample alone, so the result of a sample does not depend on the batch around it.
"""

import math

import triton
import triton.language as tl

from . import layout, scale_map
from .layout import compute_dtype, offsets_of, store_row_totals

INTERLEAVED, SHIFT_IN_FRONT, SHIFT_FIRST, INVERSE = 1, 2, 4, 8
ADDITIVE = 6  # the index of that kind


@triton.jit(do_not_specialize=["n", "passive_n", "n_rows", "parts", "passive_blocks", "raw_base", "shift_base",
                               "y_base", "passive_y_base", "logdet_stride"])
def affine_coupling_fwd_kernel(
        x_ptr, raw_ptr, shift_ptr, passive_ptr, y_ptr, logdet_ptr, out_ptr,
        x_strides, raw_strides, shift_strides, y_strides, sizes, raw_base, shift_base, y_base, n: tl.int64,
        passive_strides, passive_y_strides, passive_sizes, passive_y_base, passive_n: tl.int64, passive_blocks,
        logdet_stride, n_rows, parts,
        MAP: tl.constexpr, ORDER: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
        PASSIVE_RANK: tl.constexpr, PASSIVE_UNIT: tl.constexpr, PASSIVE_WIDE: tl.constexpr, CHUNK: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y, and per row of ``out`` the log-determinant (CHUNK > 0: per row and part of that many elements,
    its partial sum). ORDER: 4 shift first, 8 inverse. n and passive_n are in units."""
    dtype = out_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    rows = (pid // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    end = n * UNIT
    first = part * 0
    last = end
    if CHUNK:
        first = part * CHUNK
        last = tl.minimum(first + CHUNK, end)
    total = tl.zeros([ROWS, BLOCK], dtype)
    for start in range(first, last, BLOCK):
        index = start + columns
        if not WIDE:
            index = index.to(tl.int32)
        inside = (rows < n_rows) & (index < end)
        x = tl.load(x_ptr + offsets_of(rows, index, sizes, x_strides, 0, RANK, UNIT), mask=inside, other=0.0).to(dtype)
        t = tl.load(shift_ptr + offsets_of(rows, index, sizes, shift_strides, shift_base, RANK, UNIT), mask=inside,
                    other=0.0).to(dtype)
        r = tl.zeros_like(t)
        if raw_ptr is not None:
            r = tl.load(raw_ptr + offsets_of(rows, index, sizes, raw_strides, raw_base, RANK, UNIT), mask=inside,
                        other=0.0).to(dtype)
        t = scale_map.shift_of(t, MAP)
        s, log_s = scale_map.scale_and_log(r, MAP)
        if ORDER == 0:
            y = tl.fma(x, s, t)
        elif ORDER == 4:
            y = (x + t) * s
        elif ORDER == 8:
            y = scale_map.maths.div(x - t, s)
        else:
            y = scale_map.maths.div(x, s) - t
        tl.store(y_ptr + offsets_of(rows, index, sizes, y_strides, y_base, RANK, UNIT), y, mask=inside)
        total += tl.where(inside, log_s, 0.0)
    if passive_ptr is not None:
        end = passive_n * PASSIVE_UNIT
        first = part * passive_blocks * BLOCK
        for start in range(first, tl.minimum(first + passive_blocks * BLOCK, end), BLOCK):
            index = start + columns
            if not PASSIVE_WIDE:
                index = index.to(tl.int32)
            inside = (rows < n_rows) & (index < end)
            source = offsets_of(rows, index, passive_sizes, passive_strides, 0, PASSIVE_RANK, PASSIVE_UNIT)
            target = offsets_of(rows, index, passive_sizes, passive_y_strides, passive_y_base, PASSIVE_RANK,
                                PASSIVE_UNIT)
            tl.store(y_ptr + target, tl.load(passive_ptr + source, mask=inside, other=0.0), mask=inside)
    sums = layout.row_sum(total, ROWS, BLOCK)
    if CHUNK:
        tl.store(out_ptr + rows * parts + part, sums, mask=rows < n_rows)
    else:
        store_row_totals(sums, logdet_ptr, logdet_stride, out_ptr, rows, n_rows, ORDER >= 8)


@triton.jit(do_not_specialize=["n", "n_rows", "parts", "gy_base", "raw_base", "shift_base", "gx_base", "graw_base",
                               "gshift_base", "gl_stride", "passive_gy_base", "passive_gx_base", "passive_n",
                               "passive_blocks"])
def affine_coupling_bwd_kernel(
        gy_ptr, gl_ptr, x_ptr, raw_ptr, shift_ptr, gx_ptr, graw_ptr, gshift_ptr,
        gy_strides, x_strides, raw_strides, shift_strides, gx_strides, graw_strides, gshift_strides, sizes,
        gy_base, raw_base, shift_base, gx_base, graw_base, gshift_base, gl_stride, n: tl.int64, n_rows, parts,
        passive_gy_strides, passive_gx_strides, passive_sizes, passive_gy_base, passive_gx_base, passive_n: tl.int64,
        passive_blocks,
        MAP: tl.constexpr, ORDER: tl.constexpr, DOUBLE: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
        WIDE: tl.constexpr, PASSIVE: tl.constexpr, PASSIVE_RANK: tl.constexpr, PASSIVE_UNIT: tl.constexpr,
        PASSIVE_WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of x, raw and shift, each where its pointer is given; a missing gy or gl counts as zero. PASSIVE: gx
    has channels of its own that passed, whose gradient is copied."""
    dtype = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    rows = (pid // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    index = (pid % parts) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if not WIDE:
        index = index.to(tl.int32)
    inside = (rows < n_rows) & (index < n * UNIT)
    zero = tl.zeros([ROWS, BLOCK], dtype)
    r = zero
    if raw_ptr is not None:
        r = tl.load(raw_ptr + offsets_of(rows, index, sizes, raw_strides, raw_base, RANK, UNIT), mask=inside,
                    other=0.0).to(dtype)
    s, own_slope, slope, in_bounds = scale_map.scale_and_slopes(r, MAP)
    gl = zero
    if gl_ptr is not None:
        gl = gl + tl.load(gl_ptr + rows * gl_stride, mask=rows < n_rows, other=0.0).to(dtype)
        if ORDER >= 8:
            gl = -gl
    gx = zero
    gshift = zero
    graw = zero
    if gy_ptr is not None:
        gy = tl.load(gy_ptr + offsets_of(rows, index, sizes, gy_strides, gy_base, RANK, UNIT), mask=inside,
                     other=0.0).to(dtype)
        x = zero
        t = zero
        if graw_ptr is not None:
            x = tl.load(x_ptr + offsets_of(rows, index, sizes, x_strides, 0, RANK, UNIT), mask=inside,
                        other=0.0).to(dtype)
            if ORDER == 4 or ORDER == 8:
                t = tl.load(shift_ptr + offsets_of(rows, index, sizes, shift_strides, shift_base, RANK, UNIT),
                            mask=inside, other=0.0).to(dtype)
                t = scale_map.shift_of(t, MAP)
        if ORDER < 8:
            gx = gy * s
            gshift = gy
            if ORDER == 4:
                gshift = gx
            scaled = x + t  # what s multiplies
            if MAP[14]:
                graw = scale_map.gradient_of_both(gy * scaled, gl, own_slope, slope, in_bounds, MAP)
            else:
                graw = tl.fma(gx, scaled, gl) * slope
        else:
            gx = scale_map.maths.div(gy, s)
            gshift = -gx
            if ORDER == 12:
                gshift = -gy
            scaled = x - t  # what s divides
            if MAP[14]:
                through_s = -gx * scale_map.maths.div(scaled, s)
                graw = scale_map.gradient_of_both(through_s, gl, own_slope, slope, in_bounds, MAP)
            else:
                # The zero is NaN at an infinite s, as the quotient's gradient is.
                graw = tl.fma(-gx, scaled, tl.fma(s, zero, gl)) * slope
    elif MAP[13]:
        graw = tl.where(in_bounds, gl, 0.0) * slope
    else:
        graw = gl * slope
    if graw_ptr is not None:
        tl.store(graw_ptr + offsets_of(rows, index, sizes, graw_strides, graw_base, RANK, UNIT), graw, mask=inside)
    if gx_ptr is not None:
        tl.store(gx_ptr + offsets_of(rows, index, sizes, gx_strides, gx_base, RANK, UNIT), gx, mask=inside)
    if gshift_ptr is not None:
        tl.store(gshift_ptr + offsets_of(rows, index, sizes, gshift_strides, gshift_base, RANK, UNIT),
                 scale_map.shift_of(gshift, MAP), mask=inside)
    if PASSIVE:
        end = passive_n * PASSIVE_UNIT
        first = (pid % parts) * passive_blocks * BLOCK
        for start in range(first, tl.minimum(first + passive_blocks * BLOCK, end), BLOCK):
            index = start + tl.arange(0, BLOCK)[None, :]
            if not PASSIVE_WIDE:
                index = index.to(tl.int32)
            inside = (rows < n_rows) & (index < end)
            value = zero
            if gy_ptr is not None:
                source = offsets_of(rows, index, passive_sizes, passive_gy_strides, passive_gy_base, PASSIVE_RANK,
                                    PASSIVE_UNIT)
                value = tl.load(gy_ptr + source, mask=inside, other=0.0).to(dtype)
            target = offsets_of(rows, index, passive_sizes, passive_gx_strides, passive_gx_base, PASSIVE_RANK,
                                PASSIVE_UNIT)
            tl.store(gx_ptr + target, value, mask=inside)


def _operands(params, shift, kind, flags):
    """(raw, its strides, base), (shift, strides, base): the two operands inside the params. raw is None if additive."""
    if shift is not None:
        return (params, params.stride(), 0), (shift, shift.stride(), 0)
    if kind == ADDITIVE:
        return (None, params.stride(), 0), (params, params.stride(), 0)
    strides, second = layout.halves(params, flags & INTERLEAVED)
    if flags & SHIFT_IN_FRONT:
        return (params, strides, second), (params, strides, 0)
    return (params, strides, 0), (params, strides, second)


def affine_coupling_fwd(x, params, shift, logdet, passive, kept, flags, kind, gain, offset, out_gain, clamp, eps,
                        hard_min, hard_max, shift_gain):
    """(y, logdet); see functional.affine_coupling. One launch, two for samples of more than 16384 elements."""
    dtype = compute_dtype(x.dtype)
    active, passive_first = 0 if passive is None else passive.shape[1], 0  # the first channel of each in y
    y = layout.empty_like_format(x, (x.shape[0], active + x.shape[1], *x.shape[2:]),
                                 layout.result_dtype(x, params, shift, passive))
    if kept:
        x, passive, active, passive_first = layout.parts_of_whole(x, kept)
    out = x.new_empty((x.shape[0],), dtype=dtype)
    (raw, raw_strides, raw_base), (shift, shift_strides, shift_base) = _operands(params, shift, kind, flags)
    y_base = active * y.stride(1)
    plan = layout.plan(tuple(x.shape), (x.stride(), raw_strides, shift_strides, y.stride()),
                       (raw_base, shift_base, y_base), reorder=True)
    rows, block, warps = layout.tile_of(plan.n, x.dtype.itemsize == 8)
    parts = layout.parts_of(plan.n)
    beside = plan  # stands for nothing
    if passive is not None:
        beside = layout.plan(tuple(passive.shape), (passive.stride(), y.stride()), (passive_first * y.stride(1),),
                             reorder=True)
    batch = x.shape[0]
    sums = out if parts == 1 else x.new_empty((batch, parts), dtype=dtype)
    layout.launch(affine_coupling_fwd_kernel, layout.ceil_div(batch, rows) * parts, x,
           x, raw, shift, passive, y, logdet, sums, *plan.strides, plan.sizes, *plan.bases,
           plan.n_units, beside.strides[0], beside.strides[1], beside.sizes, beside.bases[0], beside.n_units,
           layout.ceil_div(beside.n, parts * block), 0 if logdet is None else logdet.stride(0), batch, parts,
           MAP=scale_map.constants(kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain),
           ORDER=flags & (SHIFT_FIRST | INVERSE), **plan.meta(), PASSIVE_RANK=beside.rank, PASSIVE_UNIT=beside.unit,
           PASSIVE_WIDE=beside.wide, CHUNK=layout.CHUNK if parts > 1 else 0, ROWS=rows, BLOCK=block, num_warps=warps,
           **layout.registers(128))
    if parts > 1:
        layout.row_sums(sums, out, logdet, bool(flags & INVERSE))
    return y, out


def affine_coupling_bwd(grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift, flags, kind,
                        gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
    """(grad_x, grad_params, grad_shift); see functional.affine_coupling. One launch. What is not needed is empty."""
    pair = shift is not None
    (raw, raw_strides, raw_base), (shift, shift_strides, shift_base) = _operands(params, shift, kind, flags)
    gx = layout.empty_like_format(x, x.shape, x.dtype) if need_x else None
    # The first channel of the active part in x and so in grad_x, and in grad_y.
    active, active_y = 0, 0 if grad_y is None else grad_y.shape[1] - x.shape[1]
    if kept:
        x, passive, active, passive_first = layout.parts_of_whole(x, kept)
        active_y = active
    gparams = layout.empty_like_format(params, params.shape, params.dtype) if need_params else None
    gsecond = layout.empty_like_format(shift, shift.shape, shift.dtype) if pair and need_shift else None
    if gparams is None:
        (graw, graw_strides, graw_base), (gshift, gshift_strides, gshift_base) = (None, raw_strides, 0), (None,
                                                                                                       shift_strides, 0)
    else:
        (graw, graw_strides, graw_base), (gshift, gshift_strides, gshift_base) = _operands(
            gparams, gparams if pair else None, kind, flags)
    if pair:
        gshift, gshift_base = gsecond, 0
        gshift_strides = shift_strides if gsecond is None else gsecond.stride()
    gy_strides = x.stride() if grad_y is None else grad_y.stride()
    gx_strides = x.stride() if gx is None else gx.stride()
    plan = layout.plan(tuple(x.shape), (x.stride(), gy_strides, raw_strides, shift_strides, gx_strides, graw_strides,
                                        gshift_strides),
                       (active_y * gy_strides[1], raw_base, shift_base, active * gx_strides[1], graw_base,
                        gshift_base), reorder=True)
    rows, block, warps = layout.tile_of(plan.n, x.dtype.itemsize == 8)
    copies = bool(kept) and gx is not None
    beside = plan  # stands for nothing
    if copies:
        beside = layout.plan(tuple(passive.shape), (gy_strides, gx_strides),
                             (passive_first * gy_strides[1], passive_first * gx_strides[1]), reorder=True)
    parts = layout.ceil_div(plan.n, block) or int(copies and beside.n > 0)
    x_strides, gy_strides, *others = plan.strides
    if gx is not None or graw is not None or gshift is not None:
        layout.launch(affine_coupling_bwd_kernel, layout.ceil_div(x.shape[0], rows) * parts, x,
               grad_y, grad_logdet, x, raw, shift, gx, graw, gshift, gy_strides, x_strides, *others, plan.sizes,
               *plan.bases, 0 if grad_logdet is None else grad_logdet.stride(0), plan.n_units, x.shape[0], parts,
               *beside.strides[:2], beside.sizes, *beside.bases[:2], beside.n_units,
               layout.ceil_div(beside.n, max(parts, 1) * block),
               MAP=scale_map.constants(kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain),
               ORDER=flags & (SHIFT_FIRST | INVERSE), DOUBLE=x.dtype.itemsize == 8, **plan.meta(), PASSIVE=copies,
               PASSIVE_RANK=beside.rank, PASSIVE_UNIT=beside.unit, PASSIVE_WIDE=beside.wide, ROWS=rows, BLOCK=block,
               num_warps=warps, **layout.registers(128))
    return tuple(layout.nothing(x) if g is None else g for g in (gx, gparams, gsecond))


def _fwd_launches(x, params, shift, logdet, passive, kept, *scalars):
    if x.shape[0] == 0:
        return 0
    return 1 if layout.parts_of((x.shape[1] - abs(kept)) * math.prod(x.shape[2:])) == 1 else 2


def _bwd_launches(grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift, *scalars):
    positions = x.shape[0] * math.prod(x.shape[2:])
    active = (x.shape[1] - abs(kept)) * positions > 0 and (need_x or need_params or (need_shift and shift is not None))
    return int(active or (need_x and kept * positions != 0))


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"affine_coupling_fwd": _fwd_launches, "affine_coupling_bwd": _bwd_launches}
