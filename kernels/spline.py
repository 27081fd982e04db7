"""Monotonic splines: value or inverse, log-determinant and all gradients.

An element of a tile is a spline of its own; its parameters are read one after the other, so that registers don't
depend on the number of bins. Programs share samples as in affine_coupling.py, which says why.
"""

import math

import triton
import triton.language as tl

from . import layout, maths, spline_map
from .layout import compute_dtype, offsets_of, store_row_totals

TILE = 512  # elements; 4 a thread, the 16 bytes of an access in float32
ONE_PROGRAM_UP_TO, CHUNK = 4096, 1024  # see layout.parts_of; an element costs several times a coupling's


@triton.jit
def _raw(params_ptr, offsets, step, j, inside, outside, dtype: tl.constexpr):
    """Parameter j of every element; 0 outside the interval, so that whatever it is, nothing of it is left."""
    raw = tl.load(params_ptr + (offsets + j * step), mask=inside, other=0.0).to(dtype)
    return tl.where(outside, 0.0, raw)


@triton.jit
def _shares(params_ptr, offsets, step, first, inside, outside, like, MAP: tl.constexpr):
    """(largest size, one over the sum of exponentials) of the softmax over the parameters from ``first`` on."""
    peak = tl.full(like.shape, float("-inf"), like.dtype)
    for k in range(MAP[2]):
        size = spline_map.bounded_size(_raw(params_ptr, offsets, step, first + k, inside, outside, like.dtype), MAP)
        peak = tl.where(size > peak, size, peak)
    total = tl.zeros_like(like)
    for k in range(MAP[2]):
        size = spline_map.bounded_size(_raw(params_ptr, offsets, step, first + k, inside, outside, like.dtype), MAP)
        total += spline_map.exp_share(size - peak)
    return peak, maths.div(tl.full(like.shape, 1.0, like.dtype), total)


@triton.jit
def _share(params_ptr, offsets, step, j, peak, inside, outside, MAP: tl.constexpr):
    """The exponential of parameter j in its softmax."""
    size = spline_map.bounded_size(_raw(params_ptr, offsets, step, j, inside, outside, peak.dtype), MAP)
    return spline_map.exp_share(size - peak)


@triton.jit
def _locate(params_ptr, offsets, step, value, inside, outside, MAP: tl.constexpr):
    """The bin [left, right) of each value: its number, for widths and heights each (largest size, one over the sum,
    exponential of the bin, sum of those before it), and the raw slopes at both ends, 0 at the ends of the interval.
    Without widths (linear), height's stand for them."""
    BINS: tl.constexpr = MAP[2]
    RQ: tl.constexpr = MAP[0] == spline_map.RATIONAL_QUADRATIC
    heights: tl.constexpr = BINS if RQ else 0
    h_peak, h_inverse = _shares(params_ptr, offsets, step, heights, inside, outside, value, MAP)
    w_peak = h_peak
    w_inverse = h_inverse
    if RQ:
        w_peak, w_inverse = _shares(params_ptr, offsets, step, 0, inside, outside, value, MAP)
    number = tl.zeros(value.shape, tl.int32)
    w_own = tl.zeros_like(value)
    w_before = tl.zeros_like(value)
    h_own = tl.zeros_like(value)
    h_before = tl.zeros_like(value)
    w_sum = tl.zeros_like(value)
    h_sum = tl.zeros_like(value)
    position = tl.full([], 0.0, value.dtype)
    for k in range(BINS):
        h = _share(params_ptr, offsets, step, heights + k, h_peak, inside, outside, MAP)
        if MAP[1]:
            knot = spline_map.knot(position, h_inverse, h_sum, MAP[7], MAP[6], MAP[3])
        elif RQ:
            knot = spline_map.knot(position, w_inverse, w_sum, MAP[5], MAP[4], MAP[3])
        else:
            knot = tl.zeros_like(value) + (position * (2.0 * MAP[3] / BINS) - MAP[3])
        beyond = (value >= knot) | (k == 0)  # NaN: the first bin
        number = tl.where(beyond, k, number)
        h_own = tl.where(beyond, h, h_own)
        h_before = tl.where(beyond, h_sum, h_before)
        h_sum += h
        if RQ:
            w = _share(params_ptr, offsets, step, k, w_peak, inside, outside, MAP)
            w_own = tl.where(beyond, w, w_own)
            w_before = tl.where(beyond, w_sum, w_before)
            w_sum += w
        position += 1.0
    raw0 = tl.zeros_like(value)
    raw1 = tl.zeros_like(value)
    if RQ:
        raw0 = _raw(params_ptr, offsets, step, 2 * BINS - 1 + number.to(tl.int64), inside & (number > 0), outside,
                    value.dtype)
        raw1 = _raw(params_ptr, offsets, step, 2 * BINS + number.to(tl.int64), inside & (number < BINS - 1), outside,
                    value.dtype)
    return number, (w_peak, w_inverse, w_own, w_before), (h_peak, h_inverse, h_own, h_before), raw0, raw1


@triton.jit
def _place(number, widths, heights, raw0, raw1, MAP: tl.constexpr):
    """(left, width, bottom, height, d0, d1) of the bins found."""
    _, w_inverse, w_own, w_before = widths
    _, h_inverse, h_own, h_before = heights
    BINS: tl.constexpr = MAP[2]
    position = number.to(h_own.dtype)
    height = tl.fma(MAP[7] * h_inverse, h_own, tl.full([], MAP[6], h_own.dtype))
    bottom = spline_map.knot(position, h_inverse, h_before, MAP[7], MAP[6], MAP[3])
    one = tl.full(height.shape, 1.0, height.dtype)
    if MAP[0] == spline_map.LINEAR:
        WIDTH: tl.constexpr = 2.0 * MAP[3] / BINS
        return position * WIDTH - MAP[3], one * WIDTH, bottom, height, one, one
    else:
        width = tl.fma(MAP[5] * w_inverse, w_own, tl.full([], MAP[4], w_own.dtype))
        left = spline_map.knot(position, w_inverse, w_before, MAP[5], MAP[4], MAP[3])
        end = one * MAP[11]
        d0 = tl.where(number == 0, end, spline_map.derivative_of(raw0, MAP))
        d1 = tl.where(number == BINS - 1, end, spline_map.derivative_of(raw1, MAP))
        return left, width, bottom, height, d0, d1


@triton.jit(do_not_specialize=["n", "n_rows", "parts", "step", "logdet_stride"])
def spline_fwd_kernel(x_ptr, params_ptr, y_ptr, logdet_ptr, out_ptr, x_strides, y_strides, params_strides, sizes,
                      step: tl.int64, n: tl.int64, logdet_stride, n_rows, parts, MAP: tl.constexpr,
                      RANK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, LOOSE: tl.constexpr,
                      CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y, and per row of ``out`` the log-determinant (CHUNK > 0: per row and part of that many elements, its partial
    sum). n is in units, step, from one parameter of an element to the next, in units or with LOOSE in elements."""
    dtype = out_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    part = pid % parts
    rows = (pid // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    if not LOOSE:
        step = step * UNIT
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
        outside = tl.abs(x) > MAP[3]
        value = tl.where(outside, 0.0, x)
        offsets = offsets_of(rows, index, sizes, params_strides, 0, RANK, UNIT, LOOSE)
        number, widths, heights, raw0, raw1 = _locate(params_ptr, offsets, step, value, inside, outside, MAP)
        left, width, bottom, height, d0, d1 = _place(number, widths, heights, raw0, raw1, MAP)
        if MAP[0] == spline_map.LINEAR:
            slope = maths.div(height, width)
            result = left + maths.div(value - bottom, slope) if MAP[1] else tl.fma(value - left, slope, bottom)
        else:
            if MAP[1]:
                theta = spline_map.theta_of_y(value, left, width, bottom, height, d0, d1)
            else:
                theta = maths.div(value - left, width)
            theta, s, _, denominator, _, slope = spline_map.point_at(theta, left, width, bottom, height, d0, d1)
            if MAP[1]:
                result = tl.fma(theta, width, left)
            else:
                result = tl.fma(height, spline_map.share_at(theta, s, denominator, d0), bottom)
        y = tl.where(outside, x, spline_map.confined(result, MAP[3]))
        tl.store(y_ptr + offsets_of(rows, index, sizes, y_strides, 0, RANK, UNIT), y, mask=inside)
        total += tl.where(inside & (outside == 0), maths.log(slope), 0.0)
    sums = layout.row_sum(total, ROWS, BLOCK)
    if CHUNK:
        tl.store(out_ptr + rows * parts + part, sums, mask=rows < n_rows)
    else:
        store_row_totals(sums, logdet_ptr, logdet_stride, out_ptr, rows, n_rows, MAP[1])


@triton.jit
def _store_size_gradients(params_ptr, offsets, step, gparams_ptr, goffsets, gstep, first, number, axis, of_start,
                          of_size, inside, outside, SPAN: tl.constexpr, MAP: tl.constexpr):
    """Gradients of the raw sizes from parameter ``first`` on: softmax's, times the span. of_start: the gradient of what
    lies below the bin chosen, of_size: that of its size."""
    peak, inverse_sum, own, before = axis
    mean = tl.fma(of_start, before, of_size * own) * inverse_sum
    factor = SPAN * inverse_sum
    for k in range(MAP[2]):
        raw = _raw(params_ptr, offsets, step, first + k, inside, outside, peak.dtype)
        share = spline_map.exp_share(spline_map.bounded_size(raw, MAP) - peak)
        part = tl.where(number == k, of_size, tl.where(number > k, of_start, 0.0))
        gradient = share * factor * (part - mean) * spline_map.bounded_size_slope(raw, MAP)
        tl.store(gparams_ptr + (goffsets + (first + k) * gstep), gradient, mask=inside)


@triton.jit(do_not_specialize=["n", "n_rows", "parts", "step", "gstep", "gl_stride"])
def spline_bwd_kernel(gy_ptr, gl_ptr, x_ptr, params_ptr, gx_ptr, gparams_ptr, x_strides, gy_strides, gx_strides,
                      params_strides, gparams_strides, sizes, step: tl.int64, gstep: tl.int64, gl_stride, n: tl.int64,
                      n_rows, parts, MAP: tl.constexpr, DOUBLE: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
                      WIDE: tl.constexpr, LOOSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of x and the params, each where its pointer is given; a missing gy or gl counts as zero."""
    dtype = tl.float64 if DOUBLE else tl.float32
    BINS: tl.constexpr = MAP[2]
    pid = tl.program_id(0).to(tl.int64)
    rows = (pid // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    index = (pid % parts) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if not WIDE:
        index = index.to(tl.int32)
    if not LOOSE:
        step = step * UNIT
        gstep = gstep * UNIT
    inside = (rows < n_rows) & (index < n * UNIT)
    zero = tl.zeros([ROWS, BLOCK], dtype)
    x = tl.load(x_ptr + offsets_of(rows, index, sizes, x_strides, 0, RANK, UNIT), mask=inside, other=0.0).to(dtype)
    outside = tl.abs(x) > MAP[3]
    value = tl.where(outside, 0.0, x)
    gy = zero
    if gy_ptr is not None:
        gy = tl.load(gy_ptr + offsets_of(rows, index, sizes, gy_strides, 0, RANK, UNIT), mask=inside,
                     other=0.0).to(dtype)
    gl = zero
    if gl_ptr is not None:
        gl = gl + tl.load(gl_ptr + rows * gl_stride, mask=rows < n_rows, other=0.0).to(dtype)
        if MAP[1]:
            gl = -gl
    incoming = tl.where(outside, 0.0, gy)
    incoming_log = tl.where(outside, 0.0, gl)
    offsets = offsets_of(rows, index, sizes, params_strides, 0, RANK, UNIT, LOOSE)
    number, widths, heights, raw0, raw1 = _locate(params_ptr, offsets, step, value, inside, outside, MAP)
    place = _place(number, widths, heights, raw0, raw1, MAP)
    left, width, bottom, height, d0, d1 = place
    if MAP[0] == spline_map.LINEAR:
        slope = maths.div(height, width)
        if MAP[1]:
            theta = maths.div(value - bottom, height)
            operand = maths.div(incoming, slope)
            of_bottom = -operand
        else:
            theta = maths.div(value - left, width)
            operand = incoming * slope
            of_bottom = incoming
        of_height = tl.fma(of_bottom, theta, maths.div(incoming_log, height))
        of_left = zero
        of_width = zero
        of_d0 = zero
        of_d1 = zero
    else:
        if MAP[1]:
            theta = spline_map.theta_of_y(value, left, width, bottom, height, d0, d1)
        else:
            theta = maths.div(value - left, width)
        point = spline_map.point_at(theta, left, width, bottom, height, d0, d1)
        operand, of_left, of_width, of_bottom, of_height, of_d0, of_d1 = spline_map.rational_quadratic_gradient(
            place, point, incoming, incoming_log, MAP[1])
    if gx_ptr is not None:
        tl.store(gx_ptr + offsets_of(rows, index, sizes, gx_strides, 0, RANK, UNIT), tl.where(outside, gy, operand),
                 mask=inside)
    if gparams_ptr is not None:
        goffsets = offsets_of(rows, index, sizes, gparams_strides, 0, RANK, UNIT, LOOSE)
        if MAP[0] == spline_map.LINEAR:
            _store_size_gradients(params_ptr, offsets, step, gparams_ptr, goffsets, gstep, 0, number, heights,
                                  of_bottom, of_height, inside, outside, MAP[7], MAP)
        else:
            _store_size_gradients(params_ptr, offsets, step, gparams_ptr, goffsets, gstep, 0, number, widths, of_left,
                                  of_width, inside, outside, MAP[5], MAP)
            _store_size_gradients(params_ptr, offsets, step, gparams_ptr, goffsets, gstep, BINS, number, heights,
                                  of_bottom, of_height, inside, outside, MAP[7], MAP)
            of_d0 = of_d0 * spline_map.derivative_slope(raw0, MAP)
            of_d1 = of_d1 * spline_map.derivative_slope(raw1, MAP)
            for k in range(BINS - 1):  # of the slope between bins k and k + 1
                gradient = tl.where(number == k, of_d1, tl.where(number == k + 1, of_d0, 0.0))
                tl.store(gparams_ptr + (goffsets + (2 * BINS + k) * gstep), gradient, mask=inside)


def _per_element(x, params):
    return params.shape[1] // x.shape[1] if x.shape[1] else 1


def _constants(x, params, kind, inverse, *rest):
    per_element = _per_element(x, params)
    bins = per_element if kind == spline_map.LINEAR.value else (per_element + 1) // 3
    return spline_map.constants(kind, bool(inverse), bins, *rest)


def _plan(shape, elements, params, per_element):
    """The plan of operands with these strides, those of params last and as of their first per element; LOOSE; and
    per params the step from one parameter to the next."""
    steps = tuple(own[1] for own in params)
    firsts = tuple((own[0], own[1] * per_element, *own[2:]) for own in params)
    found = layout.plan(shape, (*elements, *firsts), steps, reorder=True)
    if found.unit > 1 and all(own[-1] == 1 for own in found.strides[len(elements):]):
        return found, False, found.bases
    # Elements lie further apart than their parameters: nothing of these is read in one piece.
    return layout.plan(shape, (*elements, *firsts), reorder=True, loose=len(params)), True, steps


def _tile(n, double):
    """(rows, block, num_warps)."""
    most = TILE // 2 if double else TILE
    block = min(layout.next_power_of_2(max(n, 1)), most)
    return most // block, block, 4


def spline_fwd(x, params, logdet, *scalars):
    """(y, logdet); see functional.spline. One launch, two for samples of more than 4096 elements."""
    dtype = compute_dtype(x.dtype)
    y = layout.empty_like_format(x, x.shape, layout.result_dtype(x, params))
    batch = x.shape[0]
    out = x.new_empty((batch,), dtype=dtype)
    plan, loose, (step,) = _plan(tuple(x.shape), (x.stride(), y.stride()), (params.stride(),), _per_element(x, params))
    rows, block, warps = _tile(plan.n, x.dtype.itemsize == 8)
    parts = layout.parts_of(plan.n, ONE_PROGRAM_UP_TO, CHUNK)
    sums = out if parts == 1 else x.new_empty((batch, parts), dtype=dtype)
    MAP = _constants(x, params, *scalars)
    layout.launch(spline_fwd_kernel, layout.ceil_div(batch, rows) * parts, x,
                  x, params, y, logdet, sums, *plan.strides, plan.sizes, step, plan.n_units,
                  0 if logdet is None else logdet.stride(0), batch, parts, MAP=MAP, **plan.meta(), LOOSE=loose,
                  CHUNK=CHUNK if parts > 1 else 0, ROWS=rows, BLOCK=block, num_warps=warps, **layout.registers(168))
    if parts > 1:
        layout.row_sums(sums, out, logdet, MAP[1])
    return y, out


def spline_bwd(grad_y, grad_logdet, x, params, need_x, need_params, *scalars):
    """(grad_x, grad_params); see functional.spline. One launch. What is not needed is empty."""
    gx = layout.empty_like_format(x, x.shape, x.dtype) if need_x else None
    gparams = layout.empty_like_format(params, params.shape, params.dtype) if need_params else None
    elements = [x.stride() if t is None else t.stride() for t in (x, grad_y, gx)]
    both = (params.stride(), params.stride() if gparams is None else gparams.stride())
    plan, loose, steps = _plan(tuple(x.shape), tuple(elements), both, _per_element(x, params))
    double = x.dtype.itemsize == 8
    rows, block, warps = _tile(plan.n, double)
    parts = layout.ceil_div(plan.n, block)
    if need_x or need_params:
        layout.launch(spline_bwd_kernel, layout.ceil_div(x.shape[0], rows) * parts, x,
                      grad_y, grad_logdet, x, params, gx, gparams, *plan.strides, plan.sizes, *steps,
                      0 if grad_logdet is None else grad_logdet.stride(0), plan.n_units, x.shape[0], parts,
                      MAP=_constants(x, params, *scalars), DOUBLE=double, **plan.meta(), LOOSE=loose, ROWS=rows,
                      BLOCK=block, num_warps=warps, **layout.registers(255))
    return tuple(layout.nothing(x) if g is None else g for g in (gx, gparams))


def _fwd_launches(x, params, logdet, *scalars):
    if x.shape[0] == 0:
        return 0
    return 1 if layout.parts_of(math.prod(x.shape[1:]), ONE_PROGRAM_UP_TO, CHUNK) == 1 else 2


def _bwd_launches(grad_y, grad_logdet, x, params, need_x, need_params, *scalars):
    return int(x.numel() > 0 and (need_x or need_params))


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"spline_fwd": _fwd_launches, "spline_bwd": _bwd_launches}
