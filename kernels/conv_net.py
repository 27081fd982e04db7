"""Glow's conditioner, convolutions 3x3, 1x1 and 3x3 with rectifiers between, as products over the pixels.

A pixel is a row of a hidden map (B H W, N). A product reads its weights where they lie, whatever their memory format,
and its nine taps from the image itself; bias, rectifier, the rectifier's gradient and the bias's own are part of the
products that need them. Ten launches, forward and backward: hidden maps are written once and read as often as there are
products of them.
"""

import functools

import torch

from . import layout
from .conv_products import finish_kernel, product_kernel, sum_taps_kernel, weight_gradients_kernel
from .layout import compute_dtype

NO_TAPS, INNER_TAPS, OUTER_TAPS = 0, 1, 2  # whether a weight's taps are summed over, or are columns of the result
PROGRAMS = 100  # from so many on, a product keeps its tiles large
PARTS_OF = 256  # pixels, the fewest that a part of the sum over the pixels has
SHARES = 264  # programs that share the sums over the pixels
ROW = 4  # a row of columns that are summed by their taps begins at 16 bytes
FINISH_ROWS, FINISH_COLUMNS = 8, 256
BLOCK = 1024  # elements of a weight that a program rounds
SUMMED = 512  # elements whose taps a program sums


def _precision(dtype):
    return "tf32" if dtype == torch.float32 and layout.convolutions_in_tf32() else "ieee"


def _rounds(precision):
    """Whether operands are rounded for TF32: the interpreter multiplies in full."""
    return precision == "tf32" and not layout.INTERPRETS


def _channel_major(weight):
    """Whether a channel's taps are closer to each other in memory than a tap's channels."""
    strides = weight.stride()
    return strides[3] < min(strides[:2])


@functools.lru_cache(maxsize=4096)
def _tiles(pixels, columns, depth, itemsize, precision, taps_are):
    """(rows, columns, depth) of a product's tiles, the largest that keep a GPU busy, and launch options."""
    # What is gathered, or lies apart, has an address in registers for every element; what is masked, a predicate.
    most = {NO_TAPS: 128 // itemsize, INNER_TAPS: 16, OUTER_TAPS: 32}[taps_are]
    inner = next((k for k in (64, 32) if k <= most and depth % k == 0), 16)
    across = min(128, max(16, layout.next_power_of_2(columns)))
    if precision == "ieee" and itemsize > 2:  # no tensor cores
        return 32, min(across, 32), 16, {"num_warps": itemsize, **layout.registers(168)}
    rows = 128
    while layout.ceil_div(pixels, rows) * layout.ceil_div(columns, across) < PROGRAMS:
        if rows == 128:
            rows = 64
        elif across == 128:
            across = 64
        else:
            break
    return rows, across, inner, {"num_warps": 8 if rows * across >= 64 * 128 else 4, **layout.registers(255)}


def _product(a, weight, dims, taps_are, sign, major, image, out, slope, bias=None, h=None, sums=False, rounding=None):
    """Launch :func:`product_kernel`; dims are the weight's of (inner, outer), rounding two pairs of a dense weight and
    room for it rounded. Returns the sums, one row a tile."""
    pixels, height, width = image
    inner, outer = weight.shape[dims[0]], weight.shape[dims[1]]
    columns, depth = outer * (9 if taps_are == OUTER_TAPS else 1), inner * (9 if taps_are == INNER_TAPS else 1)
    precision = _precision(a.dtype)
    rows, across, step, options = _tiles(pixels, columns, depth, a.dtype.itemsize, precision, taps_are)
    tiles = layout.ceil_div(pixels, rows)
    partial = a.new_empty((tiles, outer), dtype=compute_dtype(a.dtype)) if sums else None
    strides = weight.stride()
    programs, pairs = tiles * layout.ceil_div(columns, across), (None, None, 0) * 2
    if rounding is not None and pixels:
        pairs = tuple(part for pair in rounding for part in (*pair, pair[0].numel()))
        programs += sum(layout.ceil_div(pair[0].numel(), BLOCK) for pair in rounding)
    layout.launch(product_kernel, programs, a, a, a.stride(), weight,
                  (strides[dims[0]], strides[dims[1]], *strides[2:]), bias, h, out, partial, *pairs, pixels, height,
                  width, depth, INNER=inner, OUTER=outer, TAPS=taps_are, SIGN=sign, CHANNEL_MAJOR=major, SLOPE=slope,
                  ROW=out.shape[1], PRECISION=precision, ROUNDS=_rounds(precision), UPCAST=layout.INTERPRETS, ROWS=rows,
                  COLUMNS=across, DEPTH=step, BLOCK=BLOCK, num_stages=3, **options)
    return partial


def _for_rounding(x, *weights):
    """((weight, room for it rounded), ...) and the weights as later products read them: the rooms, for TF32."""
    if not _rounds(_precision(x.dtype)):
        return None, weights
    dense = [w if torch.empty_like(w).stride() == w.stride() else w.contiguous() for w in weights]
    pairs = tuple((w, torch.empty_like(w)) for w in dense)
    return pairs, [room for _, room in pairs]


def _image_of(x):
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[2], x.shape[3]


def _columns(like, pixels, channels):
    """Room for the columns of ``channels`` before their taps are summed."""
    return like.new_empty((pixels, layout.ceil_div(9 * channels, ROW) * ROW), dtype=compute_dtype(like.dtype))


def _sum_taps(z, bias, out, sign, channel_major):
    """out (B, C, H, W) becomes bias plus the sum over a pixel's nine taps of its column in z."""
    (pixels, height, width), channels = _image_of(out), out.shape[1]
    block = max(4, layout.next_power_of_2(channels))
    rows = max(1, SUMMED // block)
    layout.launch(sum_taps_kernel, layout.ceil_div(pixels, rows), z, z, bias, out, out.stride(), z.stride(0), pixels,
                  height, width, CHANNELS=channels, SIGN=sign, CHANNEL_MAJOR=channel_major, ROWS=rows, BLOCK=block,
                  num_warps=4, **layout.registers(128))


def conv_net_fwd(x, w1, b1, w2, b2, w3, b3, slope, keep):
    """(out, h1, h2) of reference.conv_net, computed in x's dtype; the maps (B H W, N) are empty unless kept. Four
    launches."""
    image, hidden = _image_of(x), len(w1)
    b1, b2, b3 = b1.contiguous(), b2.contiguous(), b3.contiguous()
    rounding, (second, last) = _for_rounding(x, w2, w3)
    major = _channel_major(last)
    h1, h2 = (x.new_empty((image[0], hidden)) for _ in "12")
    _product(x, w1, (1, 0), INNER_TAPS, 1, _channel_major(w1), image, h1, slope, bias=b1, rounding=rounding)
    _product(h1, second, (1, 0), NO_TAPS, 1, False, image, h2, slope, bias=b2)
    columns = _columns(x, image[0], len(w3))
    _product(h2, last, (1, 0), OUTER_TAPS, 1, major, image, columns, slope)
    out = layout.empty_like_format(x, (x.shape[0], len(w3), *x.shape[2:]), x.dtype)
    _sum_taps(columns, b3, out, 1, major)
    return (out, h1, h2) if keep else (out, layout.nothing(x), layout.nothing(x))


def conv_net_bwd(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights):
    """The gradients for x, w1, b1, w2, b2, w3, b3, empty where not needed. Up to six launches."""
    image = _image_of(x)
    grad = grad.to(x.dtype)
    rounding, (second, first) = _for_rounding(x, w2, w1)
    g2, g1 = torch.empty_like(h2), torch.empty_like(h1)
    sums_2 = _product(grad, w3, (0, 1), INNER_TAPS, -1, _channel_major(w3), image, g2, slope, h=h2, sums=need_weights,
                      rounding=rounding)
    sums_1 = _product(g2, second, (0, 1), NO_TAPS, 1, False, image, g1, slope, h=h1, sums=need_weights)
    g_x = layout.nothing(x)
    if need_x:
        columns, major = _columns(x, image[0], x.shape[1]), _channel_major(first)
        _product(g1, first, (0, 1), OUTER_TAPS, 1, major, image, columns, slope)
        g_x = layout.empty_like_format(x, x.shape, x.dtype)
        _sum_taps(columns, None, g_x, -1, major)
    if not need_weights:
        return (g_x, *(layout.nothing(x) for _ in range(6)))
    return (g_x, *_weight_gradients(grad, x, (w1, w2, w3), (h1, h2), (g1, g2), (sums_1, sums_2)))


@functools.lru_cache(maxsize=4096)
def _parts(pixels, hidden, inner, out, tile):
    """(parts, pixels of each, tiles of a part) of the sums over the pixels."""
    rows, columns, _ = tile
    down = layout.ceil_div(hidden, rows)
    tiles = down * sum(layout.ceil_div(width, columns) for width in (hidden, 9 * out, 9 * inner)) + 1
    parts = max(1, min(layout.ceil_div(SHARES, tiles), layout.ceil_div(pixels, PARTS_OF)))
    chunk = layout.ceil_div(pixels, parts)
    return layout.ceil_div(pixels, max(chunk, 1)), chunk, tiles


def _weight_gradients(grad, x, weights, maps, grads, sums):
    (w1, _, w3), (pixels, height, width) = weights, _image_of(x)
    hidden, inner, out = len(w1), x.shape[1], len(w3)
    dtype, precision = compute_dtype(x.dtype), _precision(x.dtype)
    tile = (32, 32, 16) if precision == "ieee" and x.dtype.itemsize > 2 else (128, 64, 32)
    parts, chunk, tiles = _parts(pixels, hidden, inner, out, tile)
    of_w1, of_w2, of_w3, of_b3 = (x.new_empty((parts, size), dtype=dtype) for size in (
        hidden * 9 * inner, hidden**2, hidden * 9 * out, out))
    shape = {"HIDDEN": hidden, "IN": inner, "OUT": out, "MAJOR_1": _channel_major(w1), "MAJOR_3": _channel_major(w3)}
    layout.launch(weight_gradients_kernel, parts * tiles, x, x, x.stride(), grad, grad.stride(), *maps, *grads, of_w1,
                  of_w2, of_w3, of_b3, pixels, height, width, chunk, parts, **shape, PRECISION=precision,
                  ROUNDS=_rounds(precision), UPCAST=layout.INTERPRETS, ROWS=tile[0], COLUMNS=tile[1], DEPTH=tile[2],
                  CHANNELS=layout.next_power_of_2(out), num_warps=8, num_stages=3, **layout.registers(255))
    found = [layout.empty_like_format(w, w.shape, w.dtype) for w in weights]
    b1, b2, b3 = (w.new_empty(w.shape[:1]) for w in weights)
    g_w1, g_w2, g_w3 = found
    blocks = sum(layout.ceil_div(size, FINISH_COLUMNS) for size in (
        hidden, hidden, out, 9 * inner * hidden, 9 * out * hidden, hidden**2))
    layout.launch(finish_kernel, blocks, x, of_w1, sums[0], of_w2, sums[1], of_w3, of_b3, g_w1, g_w1.stride(), b1, g_w2,
                  g_w2.stride(), b2, g_w3, g_w3.stride(), b3, parts, len(sums[0]), len(sums[1]), **shape,
                  ROWS=FINISH_ROWS, COLUMNS=FINISH_COLUMNS, num_warps=4)
    return g_w1, b1, g_w2, b2, g_w3, b3


def _forward_launches(x, w1, b1, w2, b2, w3, b3, slope, keep):
    return 4 if _image_of(x)[0] > 0 else 0


def _backward_launches(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights):
    pixels = _image_of(x)[0] > 0
    return pixels * (2 + 2 * need_x + need_weights) + need_weights


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"conv_net_fwd": _forward_launches, "conv_net_bwd": _backward_launches}
