"""The nine taps of a 3x3 convolution whose weight multiplied first: its columns are added up where they belong.

A pixel is a row; column ``tap * C + channel`` (or ``channel * 9 + tap``, CHANNEL_MAJOR) belongs to the pixel that lies
SIGN * (tap // 3 - 1, tap % 3 - 1) away, zero beyond the border.
"""

import triton
import triton.language as tl

from . import layout

TILE = 512


@triton.jit(do_not_specialize=["pixels", "height", "width"])
def sum_taps_kernel(z_ptr, bias_ptr, out_ptr, out_strides, row_stride, pixels, height, width, CHANNELS: tl.constexpr,
                    SIGN: tl.constexpr, CHANNEL_MAJOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    there = (pixel < pixels) & (channel < CHANNELS)
    y = (pixel // width) % height
    x = pixel % width
    total = tl.zeros([ROWS, BLOCK], z_ptr.dtype.element_ty)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel.to(tl.int64), mask=channel < CHANNELS, other=0.0).to(total.dtype)
    for tap in tl.static_range(9):
        down = SIGN * (tap // 3 - 1)
        right = SIGN * (tap % 3 - 1)
        inside = there & (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
        column = tap * CHANNELS + channel
        if CHANNEL_MAJOR:
            column = channel * 9 + tap
        total += tl.load(z_ptr + ((pixel + down * width + right) * row_stride + column), mask=inside, other=0.0)
    at = (pixel // width // height * out_strides[0] + channel.to(tl.int64) * out_strides[1] + y * out_strides[2]
          + x * out_strides[3])
    tl.store(out_ptr + at, total, mask=there)


def sum_taps(z, bias, out, sign, channel_major):
    """out (B, C, H, W) becomes bias plus the sum over a pixel's nine taps of its column in z. One launch."""
    batch, channels, height, width = out.shape
    block = max(4, 1 << (channels - 1).bit_length())
    rows = max(1, TILE // block)
    pixels = batch * height * width
    layout.launch(sum_taps_kernel, layout.ceil_div(pixels, rows), z, z, bias, out, out.stride(), z.stride(0), pixels,
                  height, width, CHANNELS=channels, SIGN=sign, CHANNEL_MAJOR=channel_major, ROWS=rows, BLOCK=block,
                  num_warps=4, **layout.registers(128))
