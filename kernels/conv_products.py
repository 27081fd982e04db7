"""The products over the pixels that Glow's conditioner is made of.

A pixel is a row; an image is read by its strides, a weight likewise. A column of nine taps is ``tap * C + channel``, or
``channel * 9 + tap`` (CHANNEL_MAJOR), as they lie in the weight. A turned map has a channel in a row, of whole blocks
of pixels, zero beyond the last: for tensor cores take TF32 operands only with neighbours that are summed over.
"""

import triton
import triton.language as tl


@triton.jit
def split(index, CHANNELS: tl.constexpr, CHANNEL_MAJOR: tl.constexpr):
    """(tap, channel) of a column, of which a channel's taps or a tap's channels are neighbours; beyond the last column
    a tap that no pixel has."""
    tap = index // CHANNELS
    channel = index % CHANNELS
    if CHANNEL_MAJOR:
        tap = index % 9
        channel = index // 9
    return tl.where(index < 9 * CHANNELS, tap, 3 << 28), channel


@triton.jit
def weight_offset(tap, channel, channel_stride, strides):
    return (channel.to(tl.int64) * channel_stride + (tap // 3).to(tl.int64) * strides[2]
            + (tap % 3).to(tl.int64) * strides[3])


@triton.jit
def pixel_of(pixel, pixels, strides, image, DENSE: tl.constexpr, WIDE: tl.constexpr):
    """(line, place in it, offset) in an image of pixels, int64; beyond the last a line far outside it. Divisions are
    many instructions, in 64 bits most of all: not WIDE, image's reciprocals do instead. DENSE: the pixels lie
    evenly apart."""
    if WIDE:
        line = pixel // image[1]
        sample = line // image[0]
        x = (pixel - line * image[1]).to(tl.int32)
        y = (line - sample * image[0]).to(tl.int32)
        there = pixel < pixels
    else:
        index = pixel.to(tl.int32)
        line = tl.umulhi(index.to(tl.uint32) << 2, image[3].to(tl.uint32)).to(tl.int32)
        sample = tl.umulhi(line.to(tl.uint32) << 2, image[2].to(tl.uint32)).to(tl.int32)
        x = index - line * image[1]
        y = line - sample * image[0]
        there = index < pixels.to(tl.int32)
    at = pixel * strides[3]
    if not DENSE:
        at = sample.to(tl.int64) * strides[0] + y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return tl.where(there, y, -(1 << 30)), x, at


@triton.jit
def inside(y, x, down, right, image):
    """Whether what lies ``down`` and ``right`` of a pixel is in the image, both ends in one comparison."""
    return ((y + down).to(tl.uint32) < image[0].to(tl.uint32)) & ((x + right).to(tl.uint32) < image[1].to(tl.uint32))


@triton.jit
def _gathered(ptr, strides, y, x, at, tap, channel, image, SIGN: tl.constexpr):
    """What lies SIGN times ``tap`` away from the pixels, zero beyond the border. Pixels and taps as they broadcast."""
    down = SIGN * (tap // 3 - 1)
    right = SIGN * (tap % 3 - 1)
    away = channel.to(tl.int64) * strides[1] + down.to(tl.int64) * strides[2] + right.to(tl.int64) * strides[3]
    return tl.load(ptr + (at + away), mask=inside(y, x, down, right, image), other=0.0)


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
        # The sum of a NaN's bits may wrap.
        bits = tl.add(value.to(tl.int32, bitcast=True), 0x1000, sanitize_overflow=False) & -0x2000
        value = tl.where(value == value, bits.to(tl.float32, bitcast=True), float("nan"))
    return value


@triton.jit
def _turned_at(channel, pixel, blocks, PIXELS: tl.constexpr):
    """Offsets in a turned map whose rows are so many blocks of PIXELS."""
    return channel.to(tl.int64) * (blocks.to(tl.int64) * PIXELS) + pixel


@triton.jit
def _turned(ptr, channel, pixel, blocks, WIDTH: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr):
    """A tile of a turned map, a channel in a row; pixels are there, channels beyond the last are zero."""
    at = _turned_at(channel[:, None], pixel[None, :], blocks, PIXELS)
    if WIDTH % ROWS == 0:
        return tl.load(ptr + at)
    return tl.load(ptr + at, mask=(channel < WIDTH)[:, None], other=0.0)


@triton.jit
def _prepare(weight_ptr, strides, room_ptr, block, INNER: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
             ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """room[column, k], contiguous, becomes a block of a weight in room's dtype, rounded for TF32 if ROUNDS."""
    down: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    k = (block % down) * BLOCK + tl.arange(0, BLOCK)
    column = (block // down) * BLOCK + tl.arange(0, BLOCK)
    there = (k < INNER)[:, None] & (column < CHANNELS * TAPS)[None, :]
    of_column = weight_offset(column // CHANNELS, column % CHANNELS, strides[1], strides)
    weight = tl.load(weight_ptr + (k.to(tl.int64)[:, None] * strides[0] + of_column[None, :]), mask=there, other=0.0)
    tl.store(room_ptr + (column.to(tl.int64)[None, :] * INNER + k[:, None]), mask=there,
             value=_rounded(weight.to(room_ptr.dtype.element_ty), ROUNDS))


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter has no arithmetic of bfloat16
        a = a.to(total.dtype)
        b = b.to(total.dtype)
    return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def _quarters(total, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a large tile in four parts: what is done to the whole of it at once takes too many registers, and
    too much shared memory to lay it out anew."""
    left, right = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, 2, COLUMNS // 4]), [0, 3, 2, 1]))
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    return first, second, third, fourth


@triton.jit
def _product_tile(program, a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr, turned_ptr, sums_ptr,
                  pixels, image, depth, blocks, INNER: tl.constexpr, OUTER: tl.constexpr, TAPS: tl.constexpr,
                  SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, SLOPE: tl.constexpr, ROW: tl.constexpr,
                  PRECISION: tl.constexpr, ROUNDS: tl.constexpr, UPCAST: tl.constexpr, DENSE: tl.constexpr,
                  WIDE: tl.constexpr, TURNED: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    WIDTH: tl.constexpr = OUTER * 9 if TAPS == 2 else OUTER
    ALL: tl.constexpr = INNER * 9 if TAPS == 1 else INNER
    across = tl.cdiv(WIDTH, COLUMNS)
    tile = program // across
    pixel = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % across) * COLUMNS + tl.arange(0, COLUMNS)
    if TAPS == 2:
        tap, channel = split(column, OUTER, CHANNEL_MAJOR)
        of_column = weight_offset(tap, channel, weight_strides[1], weight_strides)
    else:
        of_column = column.to(tl.int64) * weight_strides[1]
    if TAPS == 1:
        y, x, at = pixel_of(pixel, pixels, a_strides, image, DENSE, WIDE)
    row = tl.minimum(pixel, pixels.to(tl.int64) - 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, depth, DEPTH):  # a bound that the compiler knew would have it unroll and spill
        k = start + tl.arange(0, DEPTH)
        if TAPS == 1:
            tap, channel = split(k, INNER, CHANNEL_MAJOR)
            a = _gathered(a_ptr, a_strides, y[:, None], x[:, None], at[:, None], tap[None, :], channel[None, :], image,
                          SIGN)
            a = _rounded(a, ROUNDS)
            of_k = weight_offset(tap, channel, weight_strides[0], weight_strides)
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
    if COLUMNS >= 128:
        quarters = _quarters(total, ROWS, COLUMNS)
        for part in tl.static_range(4):
            of_part = (program % across) * COLUMNS + part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            _product_end(quarters[part], tile, pixel, of_part, bias_ptr, h_ptr, out_ptr, turned_ptr, sums_ptr, pixels,
                         blocks, OUTER, WIDTH, TAPS, SLOPE, ROW, ROUNDS, TURNED, PIXELS)
    else:
        _product_end(total, tile, pixel, column, bias_ptr, h_ptr, out_ptr, turned_ptr, sums_ptr, pixels, blocks, OUTER,
                     WIDTH, TAPS, SLOPE, ROW, ROUNDS, TURNED, PIXELS)


@triton.jit
def _product_end(total, tile, pixel, column, bias_ptr, h_ptr, out_ptr, turned_ptr, sums_ptr, pixels, blocks,
                 OUTER: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, SLOPE: tl.constexpr, ROW: tl.constexpr,
                 ROUNDS: tl.constexpr, TURNED: tl.constexpr, PIXELS: tl.constexpr):
    """What becomes of a product's columns."""
    there = (pixel < pixels)[:, None]
    to = pixel[:, None] * ROW + column[None, :]
    turned_to = _turned_at(column[None, :], pixel[:, None], blocks, PIXELS)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column.to(tl.int64), mask=column < WIDTH, other=0.0)
        total += bias[None, :].to(total.dtype)
        total = _bent(total, total, SLOPE)
    if h_ptr is not None:
        if TURNED:
            h = tl.load(h_ptr + turned_to, mask=(column < OUTER)[None, :], other=0.0)
        else:
            h = tl.load(h_ptr + to, mask=there & (column < OUTER)[None, :], other=0.0)
        total = _bent(total, h, SLOPE)
        if sums_ptr is not None:
            tl.store(sums_ptr + (tile.to(tl.int64) * OUTER + column), mask=column < WIDTH,
                     value=tl.sum(tl.where(there, total, 0.0), 0))
    total = _rounded(total, ROUNDS and TAPS != 2)
    if out_ptr is not None:
        tl.store(out_ptr + to, total, mask=there & (column < ROW)[None, :])
    if turned_ptr is not None:
        tl.store(turned_ptr + turned_to, tl.where(there, total, 0.0), mask=(column < OUTER)[None, :])


@triton.jit(do_not_specialize=["pixels", "height", "width", "per_height", "per_width", "depth", "blocks"])
def product_kernel(a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr, turned_ptr, sums_ptr,
                   first_ptr, first_strides, first_room_ptr, second_ptr, second_strides, second_room_ptr, pixels,
                   height, width, per_height, per_width, depth, blocks, INNER: tl.constexpr, OUTER: tl.constexpr,
                   OTHERS: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr,
                   SLOPE: tl.constexpr, ROW: tl.constexpr, PRECISION: tl.constexpr, ROUNDS: tl.constexpr,
                   UPCAST: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr,
                   PIXELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                   BLOCK: tl.constexpr):
    """out[p, j] = sum_k a[p, k] weight[k, j], and the same turned: with a bias rectified, or where there is h (TURNED
    itself) the gradient of what was rectified to h, with its sums over the tile's pixels.

    ROUNDS: operands are float32 and multiplied in TF32. Hidden maps are rounded when they are written, gathered
    operands and their weights here; two other weights, 1x1 and 3x3 with OTHERS channels, which the next products need
    rounded or in another dtype, by programs of their own.
    """
    program = tl.program_id(0)
    image = (height, width, per_height, per_width)
    if first_ptr is None:
        _product_tile(program, a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr, turned_ptr,
                      sums_ptr, pixels, image, depth, blocks, INNER, OUTER, TAPS, SIGN, CHANNEL_MAJOR, SLOPE,
                      ROW, PRECISION, ROUNDS, UPCAST, DENSE, WIDE, TURNED, PIXELS, ROWS, COLUMNS, DEPTH)
    else:
        down: tl.constexpr = (OUTER + BLOCK - 1) // BLOCK
        first: tl.constexpr = down * down
        second: tl.constexpr = first + down * ((9 * OTHERS + BLOCK - 1) // BLOCK)
        if program < first:
            _prepare(first_ptr, first_strides, first_room_ptr, program, OUTER, OUTER, 1, ROUNDS, BLOCK)
        elif program < second:
            _prepare(second_ptr, second_strides, second_room_ptr, program - first, OUTER, OTHERS, 9, ROUNDS, BLOCK)
        else:
            _product_tile(program - second, a_ptr, a_strides, weight_ptr, weight_strides, bias_ptr, h_ptr, out_ptr,
                          turned_ptr, sums_ptr, pixels, image, depth, blocks, INNER, OUTER, TAPS, SIGN,
                          CHANNEL_MAJOR, SLOPE, ROW, PRECISION, ROUNDS, UPCAST, DENSE, WIDE, TURNED, PIXELS, ROWS,
                          COLUMNS, DEPTH)


@triton.jit
def _of_weight(h_ptr, other_ptr, strides, out_ptr, tile, part, first, end, image, blocks,
               HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, SIGN: tl.constexpr,
               CHANNEL_MAJOR: tl.constexpr, PRECISION: tl.constexpr, ROUNDS: tl.constexpr, UPCAST: tl.constexpr,
               DENSE: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """A tile of out[part, n, j] = the sum over the part's pixels of h[p, n] other[p, j]."""
    WIDTH: tl.constexpr = CHANNELS * 9 if TAPS else CHANNELS
    across = tl.cdiv(WIDTH, COLUMNS)
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    if TAPS:
        tap, channel = split(column, CHANNELS, CHANNEL_MAJOR)
    total = tl.zeros([ROWS, COLUMNS], tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(first, end, DEPTH):
        pixel = start + tl.arange(0, DEPTH).to(tl.int64)
        if TURNED:
            h = _turned(h_ptr, row, pixel, blocks, HIDDEN, PIXELS, ROWS)
        else:
            h = tl.trans(tl.load(h_ptr + (pixel[:, None] * HIDDEN + row[None, :]), other=0.0,
                                 mask=(pixel < end)[:, None] & (row < HIDDEN)[None, :]))
        if TAPS:
            y, x, at = pixel_of(pixel, end, strides, image, DENSE, WIDE)
            other = _gathered(other_ptr, strides, y[:, None], x[:, None], at[:, None], tap[None, :], channel[None, :],
                              image, SIGN)
            other = _rounded(other, ROUNDS)
        elif TURNED:
            other = tl.trans(_turned(other_ptr, column, pixel, blocks, WIDTH, PIXELS, COLUMNS))
        else:
            other = tl.load(other_ptr + (pixel[:, None] * CHANNELS + column[None, :]), other=0.0,
                            mask=(pixel < end)[:, None] & (column < WIDTH)[None, :])
        total = _dot(h, other, total, PRECISION, UPCAST)
    at = (part.to(tl.int64) * HIDDEN + row[:, None]) * WIDTH
    if COLUMNS >= 64:
        quarters = _quarters(total, ROWS, COLUMNS)
        for quarter in tl.static_range(4):
            column = (tile % across) * COLUMNS + quarter * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            tl.store(out_ptr + (at + column[None, :]), quarters[quarter],
                     mask=(row < HIDDEN)[:, None] & (column < WIDTH)[None, :])
    else:
        tl.store(out_ptr + (at + column[None, :]), total, mask=(row < HIDDEN)[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["pixels", "height", "width", "per_height", "per_width", "chunk", "parts", "blocks"])
def weight_gradients_kernel(x_ptr, x_strides, grad_ptr, grad_strides, h1_ptr, h2_ptr, g1_ptr, g2_ptr, of_w1_ptr,
                            of_w2_ptr, of_w3_ptr, of_b3_ptr, pixels, height, width, per_height, per_width, chunk,
                            parts, blocks, HIDDEN: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
                            MAJOR_1: tl.constexpr, MAJOR_3: tl.constexpr, PRECISION: tl.constexpr,
                            ROUNDS: tl.constexpr, UPCAST: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr,
                            TURNED: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                            HIDDEN_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr,
                            SUMMED: tl.constexpr):
    """The gradients of the last bias and of the three weights, in parts of ``chunk`` times DEPTH pixels."""
    image = (height, width, per_height, per_width)
    down = tl.cdiv(HIDDEN, ROWS)
    first_w1 = 1 + down * tl.cdiv(9 * OUT, COLUMNS)
    first_w2 = first_w1 + down * tl.cdiv(9 * IN, COLUMNS)
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts
    first = part.to(tl.int64) * chunk * DEPTH
    end = tl.minimum(first + chunk.to(tl.int64) * DEPTH, pixels)
    if tile == 0:  # what takes longest begins first: a chain of loads, and what is gathered
        channel = tl.arange(0, CHANNELS)
        total = tl.zeros([SUMMED, CHANNELS], of_b3_ptr.dtype.element_ty)
        for start in range(first, end, SUMMED):
            pixel = start + tl.arange(0, SUMMED).to(tl.int64)
            _, _, at = pixel_of(pixel, end, grad_strides, image, DENSE, WIDE)
            value = tl.load(grad_ptr + (at[:, None] + channel[None, :].to(tl.int64) * grad_strides[1]), other=0.0,
                            mask=(pixel < end)[:, None] & (channel < OUT)[None, :])
            total += value.to(total.dtype)
        tl.store(of_b3_ptr + (part.to(tl.int64) * OUT + channel), tl.sum(total, 0), mask=channel < OUT)
    elif tile < first_w1:
        _of_weight(h2_ptr, grad_ptr, grad_strides, of_w3_ptr, tile - 1, part, first, end, image, blocks, HIDDEN, OUT,
                   True, -1, MAJOR_3, PRECISION, ROUNDS, UPCAST, DENSE, WIDE, TURNED, PIXELS, ROWS, COLUMNS, DEPTH)
    elif tile < first_w2:
        _of_weight(g1_ptr, x_ptr, x_strides, of_w1_ptr, tile - first_w1, part, first, end, image, blocks, HIDDEN, IN,
                   True, 1, MAJOR_1, PRECISION, ROUNDS, UPCAST, DENSE, WIDE, TURNED, PIXELS, ROWS, COLUMNS, DEPTH)
    else:
        _of_weight(g2_ptr, h1_ptr, x_strides, of_w2_ptr, tile - first_w2, part, first, end, image, blocks, HIDDEN,
                   HIDDEN, False, 1, False, PRECISION, ROUNDS, UPCAST, DENSE, WIDE, TURNED, PIXELS, ROWS,
                   HIDDEN_COLUMNS, DEPTH)
