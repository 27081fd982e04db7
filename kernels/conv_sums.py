"""What brings together the parts of the gradients of Glow's conditioner, and the taps of its convolutions."""

import triton
import triton.language as tl

from .conv_products import inside, pixel_of, split, weight_offset


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
    tap, channel = split(index % (9 * CHANNELS), CHANNELS, CHANNEL_MAJOR)
    to = (index // (9 * CHANNELS)).to(tl.int64) * hidden_stride + weight_offset(tap, channel, channel_stride, strides)
    _finish(ptr, parts, out_ptr, to, index, HIDDEN * 9 * CHANNELS, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["parts", "tiles_1", "tiles_2"])
def finish_kernel(of_w1_ptr, of_b1_ptr, of_w2_ptr, of_b2_ptr, of_w3_ptr, of_b3_ptr, w1_ptr, w1_strides, b1_ptr, w2_ptr,
                  w2_strides, b2_ptr, w3_ptr, w3_strides, b3_ptr, parts, tiles_1, tiles_2, HIDDEN: tl.constexpr,
                  IN: tl.constexpr, OUT: tl.constexpr, MAJOR_1: tl.constexpr, MAJOR_3: tl.constexpr,
                  ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The six gradients from their parts, where they belong."""
    biases = tl.cdiv(HIDDEN, COLUMNS)
    after_b2 = 2 * biases + tl.cdiv(OUT, COLUMNS)
    after_w1 = after_b2 + tl.cdiv(9 * IN * HIDDEN, COLUMNS)
    after_w3 = after_w1 + tl.cdiv(9 * OUT * HIDDEN, COLUMNS)
    block = tl.program_id(0)
    lane = tl.arange(0, COLUMNS)
    if block < biases:
        index = block * COLUMNS + lane
        _finish(of_b1_ptr, tiles_1, b1_ptr, index.to(tl.int64), index, HIDDEN, TILE_ROWS, COLUMNS)
    elif block < 2 * biases:
        index = (block - biases) * COLUMNS + lane
        _finish(of_b2_ptr, tiles_2, b2_ptr, index.to(tl.int64), index, HIDDEN, TILE_ROWS, COLUMNS)
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


@triton.jit(do_not_specialize=["pixels", "height", "width", "per_height", "per_width"])
def sum_taps_kernel(z_ptr, bias_ptr, out_ptr, out_strides, row_stride, pixels, height, width, per_height, per_width,
                    CHANNELS: tl.constexpr, SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, DENSE: tl.constexpr,
                    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What is left of a convolution whose weight multiplied first: out = bias plus the sum over a pixel's nine taps of
    its column in z."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    image = (height, width, per_height, per_width)
    y, x, at = pixel_of(pixel, pixels, out_strides, image, DENSE, WIDE)
    total = tl.zeros([ROWS, BLOCK], z_ptr.dtype.element_ty)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel.to(tl.int64), mask=channel < CHANNELS, other=0.0).to(total.dtype)
    for tap in tl.static_range(9):
        down = SIGN * (tap // 3 - 1)
        right = SIGN * (tap % 3 - 1)
        row = pixel + (down * width + right)
        column = tap * CHANNELS + channel
        if CHANNEL_MAJOR:
            column = channel * 9 + tap
        total += tl.load(z_ptr + (row * row_stride + column), other=0.0,
                         mask=inside(y, x, down, right, image) & (channel < CHANNELS))
    tl.store(out_ptr + (at + channel.to(tl.int64) * out_strides[1]), total,
             mask=(pixel < pixels) & (channel < CHANNELS))
