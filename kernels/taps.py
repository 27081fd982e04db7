"""The nine taps of a 3x3 convolution as columns of a matrix, and what lies between the products of such columns.

A pixel is a row; column ``tap * C + channel`` (or ``channel * 9 + tap``, CHANNEL_MAJOR) belongs to the pixel that lies
SIGN * (tap // 3 - 1, tap % 3 - 1) away, zero beyond the border.
"""

import triton
import triton.language as tl

from . import layout
from .layout import compute_dtype

TILE = 2048
COLUMNS, ROWS = 128, 16  # of a tile of rectified_sum
PROGRAMS = 1024  # that share the rows of a rectified_sum


@triton.jit
def _away(pixel, tap, height, width, SIGN: tl.constexpr):
    """(row of the pixel that lies ``tap`` away, whether it is in the image); pixel int64."""
    y = (pixel // width) % height + SIGN * (tap // 3 - 1)
    x = pixel % width + SIGN * (tap % 3 - 1)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return pixel + SIGN * ((tap // 3 - 1) * width + tap % 3 - 1), inside


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def gather_taps_kernel(x_ptr, out_ptr, strides, pixels, height, width, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
                       SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if CHANNEL_MAJOR:
        tap = column % 9
        channel = column // 9
    else:
        tap = column // CHANNELS
        channel = column % CHANNELS
    source, inside = _away(pixel, tap, height, width, SIGN)
    inside = inside & (pixel < pixels) & (column < 9 * CHANNELS)
    sample = source // (height * width)
    at = (sample * strides[0] + channel.to(tl.int64) * strides[1] + (source // width) % height * strides[2]
          + source % width * strides[3])
    value = tl.load(x_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + (pixel * COLUMNS + column), value, mask=(pixel < pixels) & (column < COLUMNS))


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def sum_taps_kernel(z_ptr, bias_ptr, out_ptr, row_stride, pixels, height, width, CHANNELS: tl.constexpr,
                    SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):
    dtype = tl.float64 if DOUBLE else tl.float32
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    there = (pixel < pixels) & (channel < CHANNELS)
    total = tl.zeros([ROWS, BLOCK], dtype)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel.to(tl.int64), mask=channel < CHANNELS, other=0.0).to(dtype)
    for tap in tl.static_range(9):
        source, inside = _away(pixel, tap, height, width, SIGN)
        column = tap * CHANNELS + channel
        if CHANNEL_MAJOR:
            column = channel * 9 + tap
        total += tl.load(z_ptr + (source * row_stride + column), mask=there & inside, other=0.0).to(dtype)
    tl.store(out_ptr + (pixel * CHANNELS + channel), total, mask=there)


@triton.jit(do_not_specialize=["rows", "chunk"])
def rectified_sum_kernel(grad_ptr, h_ptr, out_ptr, partial_ptr, rows, columns, chunk, DOUBLE: tl.constexpr,
                         ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    dtype = tl.float64 if DOUBLE else tl.float32
    across = tl.cdiv(columns, COLUMNS)
    pid = tl.program_id(0)
    part = pid // across
    column = (pid % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    first = part.to(tl.int64) * chunk
    total = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(first, tl.minimum(first + chunk, rows), ROWS):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < rows) & (column < columns)
        at = row * columns + column
        h = tl.load(h_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        grad = tl.where(h <= 0.0, 0.0, grad.to(dtype))  # NaN lets it through, as in eager
        tl.store(out_ptr + at, grad, mask=inside)
        total += grad
    tl.store(partial_ptr + (part.to(tl.int64) * columns + column), tl.sum(total, 0)[None, :], mask=column < columns)


@triton.jit(do_not_specialize=["rows", "columns"])
def column_sums_kernel(partial_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], partial_ptr.dtype.element_ty)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        total += tl.load(partial_ptr + (row * columns + column), mask=(row < rows) & (column < columns), other=0.0)
    tl.store(out_ptr + column.to(tl.int64), tl.sum(total, 0)[None, :], mask=column < columns)


def _rows_of(block):
    return max(1, TILE // block)


def gather_taps(x, sign, channel_major, columns):
    """(B*H*W, columns) of x (B, C, H, W), zeros from column 9 C on. One launch."""
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    out = x.new_empty((pixels, columns))
    block = triton.next_power_of_2(max(columns, 16))
    rows = _rows_of(block)
    layout.launch(gather_taps_kernel, layout.ceil_div(pixels, rows) if columns else 0, x, x, out, x.stride(), pixels,
                  height, width, CHANNELS=channels, COLUMNS=columns, SIGN=sign, CHANNEL_MAJOR=channel_major, ROWS=rows,
                  BLOCK=block, num_warps=8)
    return out


def sum_taps(z, bias, batch, channels, height, width, sign, channel_major):
    """(B, C, H, W) in channels_last: bias plus the sum over a pixel's nine taps of its column in z. One launch."""
    out = z.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    block = triton.next_power_of_2(max(channels, 4))
    rows = max(1, TILE // 4 // block)
    pixels = batch * height * width
    layout.launch(sum_taps_kernel, layout.ceil_div(pixels, rows) if channels else 0, z, z, bias, out, z.stride(0),
                  pixels, height, width, CHANNELS=channels, SIGN=sign, CHANNEL_MAJOR=channel_major,
                  DOUBLE=z.dtype.itemsize == 8, ROWS=rows, BLOCK=block, num_warps=4)
    return out


def rectified_sum(grad, h):
    """(grad where h is not <= 0, its sums over the rows in the dtype of compute) of contiguous (N, C). Two launches."""
    rows, columns = grad.shape
    out = grad.new_empty(grad.shape)
    across = layout.ceil_div(columns, COLUMNS)
    chunk = ROWS * max(1, layout.ceil_div(rows * max(across, 1), ROWS * PROGRAMS))
    parts = layout.ceil_div(rows, chunk)
    dtype = compute_dtype(grad.dtype)
    partial, sums = grad.new_empty((parts, columns), dtype=dtype), grad.new_empty((columns,), dtype=dtype)
    layout.launch(rectified_sum_kernel, parts * across, grad, grad, h, out, partial, rows, columns, chunk,
                  DOUBLE=dtype.itemsize == 8, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8)
    layout.launch(column_sums_kernel, across, grad, partial, sums, parts, columns, ROWS=ROWS, COLUMNS=COLUMNS,
                  num_warps=8)
    return out, sums


def _gather_launches(x, sign, channel_major, columns):
    return int(columns > 0 and x.shape[0] * x.shape[2] * x.shape[3] > 0)


def _sum_launches(z, bias, batch, channels, height, width, sign, channel_major):
    return int(batch * channels * height * width > 0)


def _rectified_launches(grad, h):
    return int(grad.numel() > 0) + int(grad.shape[1] > 0)


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"gather_taps": _gather_launches, "sum_taps": _sum_launches, "rectified_sum": _rectified_launches}
