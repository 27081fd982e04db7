"""The products over the pixels that Glow's conditioner is made of, and what brings the gradients' parts together.

A pixel is a row; an image is read by its strides, a weight likewise. A column of nine taps is ``tap * C + channel``, or
``channel * 9 + tap`` (CHANNEL_MAJOR), as they lie in the weight.
"""

import triton
import triton.language as tl


@triton.jit
def _split(index, CHANNELS: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """(tap, channel) of a column, of which a channel's taps or a tap's channels are neighbours; beyond the last column
    a tap that no pixel has."""
    tap = index // CHANNELS
    channel = index % CHANNELS
    if CHANNEL_MAJOR:
        tap = index % 9
        channel = index // 9
    return tl.where(index < 9 * CHANNELS, tap, 31), channel


@triton.jit
def _weight_offset(tap, channel, channel_stride, strides):
    return (channel.to(tl.int64) * channel_stride + (tap // 3).to(tl.int64) * strides[2]
            + (tap % 3).to(tl.int64) * strides[3])


@triton.jit
def _pixel(pixel, pixels, strides, height, width, SIGN: tl.constexpr):
    """(bits of the taps that lie in the image, none beyond the last pixel, offset in it) of pixels, int64."""
    y = ((pixel // width) % height).to(tl.int32)
    x = (pixel % width).to(tl.int32)
    at = (pixel // width // height * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3])
    found = tl.zeros_like(y)
    for tap in tl.static_range(9):
        down = y + SIGN * (tap // 3 - 1)
        right = x + SIGN * (tap % 3 - 1)
        inside = (down >= 0) & (down < height) & (right >= 0) & (right < width) & (pixel < pixels)
        found |= inside.to(tl.int32) << tap
    return found, at


@triton.jit
def _gathered(ptr, strides, found, at, tap, channel, SIGN: tl.constexpr):
    """What lies SIGN times ``tap`` away from the pixels, zero beyond the border. Pixels and taps as they broadcast."""
    away = (channel.to(tl.int64) * strides[1] + (SIGN * (tap // 3 - 1)).to(tl.int64) * strides[2]
            + (SIGN * (tap % 3 - 1)).to(tl.int64) * strides[3])
    return tl.load(ptr + (at + away), mask=((found >> tap) & 1) != 0, other=0.0)


@triton.jit
def _matrix(ptr, row, column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of a contiguous matrix of so many columns; rows are there, columns beyond the last are zero."""
    at = row[:, None] * WIDTH + column[None, :]
    if WIDTH % COLUMNS == 0:
        return tl.load(ptr + at)
    return tl.load(ptr + at, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def _bent(value, by, SLOPE: tl.constexpr):
    """value, SLOPE times it where ``by`` is not positive; where that is NaN value stays."""
    less = tl.zeros_like(value)
    if SLOPE != 0.0:  # infinity times zero is none
        less = value * SLOPE
    return tl.where(by <= 0.0, less, value)


@triton.jit
def _rounded(value, ROUNDS: tl.constexpr):
    """float32 rounded to the 10 bits that TF32 keeps, ties away from zero: tensor cores drop the others, which would
    make every product smaller."""
    if ROUNDS:
        bits = (value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), float("nan"))
    return value


@triton.jit
def _copy_rounded(from_ptr, to_ptr, block, size, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, _rounded(tl.load(from_ptr + at, mask=at < size, other=0.0), True), mask=at < size)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter has no arithmetic of bfloat16
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _product_tile(program, a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr, sums_ptr, pixels,
                  height, width, depth, INNER: tl.constexpr, OUTER: tl.constexpr, TAPS: tl.constexpr,
                  SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, SLOPE: tl.constexpr, ROW: tl.constexpr,
                  PRECISION: tl.constexpr, ROUNDS: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    WIDTH: tl.constexpr = OUTER * 9 if TAPS == 2 else OUTER
    ALL: tl.constexpr = INNER * 9 if TAPS == 1 else INNER
    across = tl.cdiv(WIDTH, COLUMNS)
    tile = program // across
    pixel = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    if TAPS == 2:
        tap, channel = _split(column, OUTER, CHANNEL_MAJOR)
        of_column = _weight_offset(tap, channel, weight_strides[1], weight_strides)
    else:
        of_column = column.to(tl.int64) * weight_strides[1]
    if TAPS == 1:
        found, at = _pixel(pixel, pixels, a_strides, height, width, SIGN)
    row = tl.minimum(pixel, pixels.to(tl.int64) - 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, depth, DEPTH):  # a bound that the compiler knew would have it unroll and spill
        k = start + tl.arange(0, DEPTH)
        if TAPS == 1:
            tap, channel = _split(k, INNER, CHANNEL_MAJOR)
            a = _gathered(a_ptr, a_strides, found[:, None], at[:, None], tap[None, :], channel[None, :], SIGN)
            a = _rounded(a, ROUNDS)
            of_k = _weight_offset(tap, channel, weight_strides[0], weight_strides)
        else:
            a = _matrix(a_ptr, row, k, ALL, DEPTH)
            of_k = k.to(tl.int64) * weight_strides[0]
        if ALL % DEPTH == 0 and WIDTH % COLUMNS == 0:
            weight = tl.load(weight_ptr + (of_k[:, None] + of_column[None, :]))
        else:
            weight = tl.load(weight_ptr + (of_k[:, None] + of_column[None, :]), other=0.0,
                             mask=(k < ALL)[:, None] & (column < WIDTH)[None, :])
        weight = _rounded(weight.to(a_ptr.dtype.element_ty), ROUNDS and TAPS == 1)
        total = _dot(a, weight, total, PRECISION, UPCAST)
    to = pixel[:, None] * ROW + column[None, :]
    there = (pixel < pixels)[:, None] & (column < ROW)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column.to(tl.int64), mask=column < WIDTH, other=0.0)
        total += bias[None, :].to(total.dtype)
        total = _bent(total, total, SLOPE)
    if h_ptr is not None:
        h = tl.load(h_ptr + to, mask=there, other=0.0)
        total = _bent(total, h, SLOPE)
        if sums_ptr is not None:
            tl.store(sums_ptr + (tile.to(tl.int64) * OUTER + column), mask=column < WIDTH,
                     value=tl.sum(tl.where(there, total, 0.0), 0))
    tl.store(out_ptr + to, _rounded(total, ROUNDS and TAPS != 2), mask=there)


@triton.jit(do_not_specialize=["pixels", "height", "width", "depth"])
def product_kernel(a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr, sums_ptr, first_ptr,
                   first_rounded_ptr, first_size, second_ptr, second_rounded_ptr, second_size, pixels, height, width,
                   depth, INNER: tl.constexpr, OUTER: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
                   CHANNEL_MAJOR: tl.constexpr, SLOPE: tl.constexpr, ROW: tl.constexpr, PRECISION: tl.constexpr,
                   ROUNDS: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                   DEPTH: tl.constexpr, BLOCK: tl.constexpr):
    """out[p, j] = sum_k a[p, k] weight[k, j]: with a bias rectified, or where there is h the gradient of what was
    rectified to h, with its sums over the tile's pixels.

    ROUNDS: operands are float32 and multiplied in TF32. Hidden maps are rounded when they are written, gathered
    operands and their weights here; two other weights, which the next products need rounded, by programs of their own.
    """
    if first_ptr is None:
        _product_tile(tl.program_id(0), a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr,
                      sums_ptr, pixels, height, width, depth, INNER, OUTER, TAPS, SIGN, CHANNEL_MAJOR, SLOPE, ROW,
                      PRECISION, ROUNDS, UPCAST, ROWS, COLUMNS, DEPTH)
    else:
        blocks = tl.cdiv(first_size, BLOCK)
        others = blocks + tl.cdiv(second_size, BLOCK)
        program = tl.program_id(0)
        if program < blocks:
            _copy_rounded(first_ptr, first_rounded_ptr, program, first_size, BLOCK)
        elif program < others:
            _copy_rounded(second_ptr, second_rounded_ptr, program - blocks, second_size, BLOCK)
        else:
            _product_tile(program - others, a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr,
                          sums_ptr, pixels, height, width, depth, INNER, OUTER, TAPS, SIGN, CHANNEL_MAJOR, SLOPE, ROW,
                          PRECISION, ROUNDS, UPCAST, ROWS, COLUMNS, DEPTH)


@triton.jit
def _of_weight(h_ptr, other_ptr, strides, out_ptr, tile, part, chunk, pixels, height, width, HIDDEN: tl.constexpr,
               CHANNELS: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
               PRECISION: tl.constexpr, ROUNDS: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of out[part, n, j] = the sum over the part's pixels of h[p, n] other[p, j]."""
    WIDTH: tl.constexpr = CHANNELS * 9 if TAPS else CHANNELS
    across = tl.cdiv(WIDTH, COLUMNS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    if TAPS:
        tap, channel = _split(column, CHANNELS, CHANNEL_MAJOR)
    first = part.to(tl.int64) * chunk
    end = tl.minimum(first + chunk, pixels)
    total = tl.zeros([ROWS, COLUMNS], tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(first, end, DEPTH):
        pixel = start + tl.arange(0, DEPTH).to(tl.int64)
        h = tl.load(h_ptr + (pixel[:, None] * HIDDEN + row[None, :]), other=0.0,
                    mask=(pixel < end)[:, None] & (row < HIDDEN)[None, :])
        if TAPS:
            found, at = _pixel(pixel, end, strides, height, width, SIGN)
            other = _gathered(other_ptr, strides, found[:, None], at[:, None], tap[None, :], channel[None, :], SIGN)
            other = _rounded(other, ROUNDS)
        else:
            other = tl.load(other_ptr + (pixel[:, None] * CHANNELS + column[None, :]), other=0.0,
                            mask=(pixel < end)[:, None] & (column < WIDTH)[None, :])
        total = _dot(tl.trans(h), other, total, PRECISION, UPCAST)
    to = (part.to(tl.int64) * HIDDEN + row[:, None]) * WIDTH + column[None, :]
    tl.store(out_ptr + to, total, mask=(row < HIDDEN)[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["pixels", "height", "width", "chunk", "parts"])
def weight_gradients_kernel(x_ptr, x_strides, grad_ptr, grad_strides, h1_ptr, h2_ptr, g1_ptr, g2_ptr, of_w1_ptr,
                            of_w2_ptr, of_w3_ptr, of_b3_ptr, pixels, height, width, chunk, parts,
                            HIDDEN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, MAJOR_1: tl.constexpr,
                            MAJOR_3: tl.constexpr, PRECISION: tl.constexpr, ROUNDS: tl.constexpr,
                            UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                            CHANNELS: tl.constexpr):
    """The gradients of the three weights and of the last bias, in parts of the pixels."""
    down = tl.cdiv(HIDDEN, ROWS)
    second = down * tl.cdiv(HIDDEN, COLUMNS)
    third = second + down * tl.cdiv(9 * OUT, COLUMNS)
    first = third + down * tl.cdiv(9 * IN, COLUMNS)
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    if tile < second:
        _of_weight(g2_ptr, h1_ptr, x_strides, of_w2_ptr, tile, part, chunk, pixels, height, width, HIDDEN, HIDDEN,
                   False, 1, False, PRECISION, ROUNDS, UPCAST, ROWS, COLUMNS, DEPTH)
    elif tile < third:
        _of_weight(h2_ptr, grad_ptr, grad_strides, of_w3_ptr, tile - second, part, chunk, pixels, height, width, HIDDEN,
                   OUT, True, -1, MAJOR_3, PRECISION, ROUNDS, UPCAST, ROWS, COLUMNS, DEPTH)
    elif tile < first:
        _of_weight(g1_ptr, x_ptr, x_strides, of_w1_ptr, tile - third, part, chunk, pixels, height, width, HIDDEN, IN,
                   True, 1, MAJOR_1, PRECISION, ROUNDS, UPCAST, ROWS, COLUMNS, DEPTH)
    else:
        channel = tl.arange(0, CHANNELS)
        begin = part.to(tl.int64) * chunk
        end = tl.minimum(begin + chunk, pixels)
        total = tl.zeros([DEPTH, CHANNELS], of_b3_ptr.dtype.element_ty)
        for start in range(begin, end, DEPTH):
            pixel = start + tl.arange(0, DEPTH).to(tl.int64)
            _, at = _pixel(pixel, end, grad_strides, height, width, 1)
            value = tl.load(grad_ptr + (at[:, None] + channel[None, :].to(tl.int64) * grad_strides[1]), other=0.0,
                            mask=(pixel < end)[:, None] & (channel < OUT)[None, :])
            total += value.to(total.dtype)
        tl.store(of_b3_ptr + (part.to(tl.int64) * OUT + channel), tl.sum(total, 0), mask=channel < OUT)


@triton.jit
def _finish(ptr, parts, out_ptr, to, index, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out[to] = the sum over the parts of what is ``index``-th in each of ``size`` elements."""
    total = tl.zeros([ROWS, COLUMNS], ptr.dtype.element_ty)
    for start in range(0, parts, ROWS):
        row = start + tl.arange(0, ROWS)
        total += tl.load(ptr + (row.to(tl.int64)[:, None] * size + index[None, :]), other=0.0,
                         mask=(row < parts)[:, None] & (index < size)[None, :])
    tl.store(out_ptr + to, tl.sum(total, 0), mask=index < size)


@triton.jit
def _finish_taps(ptr, parts, out_ptr, strides, hidden_stride, channel_stride, index, HIDDEN: tl.constexpr,
                 CHANNELS: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tap, channel = _split(index % (9 * CHANNELS), CHANNELS, CHANNEL_MAJOR)
    to = (index // (9 * CHANNELS)).to(tl.int64) * hidden_stride + _weight_offset(tap, channel, channel_stride, strides)
    _finish(ptr, parts, out_ptr, to, index, HIDDEN * 9 * CHANNELS, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["parts", "tiles_1", "tiles_2"])
def finish_kernel(of_w1_ptr, of_b1_ptr, of_w2_ptr, of_b2_ptr, of_w3_ptr, of_b3_ptr, w1_ptr, w1_strides, b1_ptr, w2_ptr,
                  w2_strides, b2_ptr, w3_ptr, w3_strides, b3_ptr, parts, tiles_1, tiles_2, HIDDEN: tl.constexpr,
                  IN: tl.constexpr, OUT: tl.constexpr, MAJOR_1: tl.constexpr, MAJOR_3: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The six gradients from their parts, where they belong."""
    biases = tl.cdiv(HIDDEN, COLUMNS)
    after_b2 = 2 * biases + tl.cdiv(OUT, COLUMNS)
    after_w1 = after_b2 + tl.cdiv(9 * IN * HIDDEN, COLUMNS)
    after_w3 = after_w1 + tl.cdiv(9 * OUT * HIDDEN, COLUMNS)
    block = tl.program_id(0)
    lane = tl.arange(0, COLUMNS)
    if block < biases:
        index = block * COLUMNS + lane
        _finish(of_b1_ptr, tiles_1, b1_ptr, index.to(tl.int64), index, HIDDEN, ROWS, COLUMNS)
    elif block < 2 * biases:
        index = (block - biases) * COLUMNS + lane
        _finish(of_b2_ptr, tiles_2, b2_ptr, index.to(tl.int64), index, HIDDEN, ROWS, COLUMNS)
    elif block < after_b2:
        index = (block - 2 * biases) * COLUMNS + lane
        _finish(of_b3_ptr, parts, b3_ptr, index.to(tl.int64), index, OUT, ROWS, COLUMNS)
    elif block < after_w1:
        index = (block - after_b2) * COLUMNS + lane
        _finish_taps(of_w1_ptr, parts, w1_ptr, w1_strides, w1_strides[0], w1_strides[1], index, HIDDEN, IN, MAJOR_1,
                     ROWS, COLUMNS)
    elif block < after_w3:
        index = (block - after_w1) * COLUMNS + lane
        _finish_taps(of_w3_ptr, parts, w3_ptr, w3_strides, w3_strides[1], w3_strides[0], index, HIDDEN, OUT, MAJOR_3,
                     ROWS, COLUMNS)
    else:
        index = (block - after_w3) * COLUMNS + lane
        to = (index // HIDDEN).to(tl.int64) * w2_strides[0] + (index % HIDDEN).to(tl.int64) * w2_strides[1]
        _finish(of_w2_ptr, parts, w2_ptr, to, index, HIDDEN * HIDDEN, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def sum_taps_kernel(z_ptr, bias_ptr, out_ptr, out_strides, row_stride, pixels, height, width, CHANNELS: tl.constexpr,
                    SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What is left of a convolution whose weight multiplied first: out = bias plus the sum over a pixel's nine taps of
    its column in z."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    found, at = _pixel(pixel, pixels, out_strides, height, width, SIGN)
    total = tl.zeros([ROWS, BLOCK], z_ptr.dtype.element_ty)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel.to(tl.int64), mask=channel < CHANNELS, other=0.0).to(total.dtype)
    for tap in tl.static_range(9):
        row = pixel + SIGN * ((tap // 3 - 1) * width + tap % 3 - 1)
        column = tap * CHANNELS + channel
        if CHANNEL_MAJOR:
            column = channel * 9 + tap
        total += tl.load(z_ptr + (row * row_stride + column), other=0.0,
                         mask=(((found >> tap) & 1) != 0) & (channel < CHANNELS))
    tl.store(out_ptr + (at + channel.to(tl.int64) * out_strides[1]), total,
             mask=(pixel < pixels) & (channel < CHANNELS))
