"""Glow's conditioner, convolutions 3x3, 1x1 and 3x3 with rectifiers between, as products over the pixels.

A pixel is a row of a hidden map (B H W, N). A product reads its weights where they lie, whatever their memory format,
and its nine taps from the image itself; bias, rectifier, the rectifier's gradient and the bias's own are part of the
products that need them. Ten launches, forward and backward: hidden maps are written once and read as often as there are
products of them. In float32 those that the weights' gradients are of are written turned, too, with a channel in a row:
of TF32 Hopper's tensor cores read only what has neighbours that are summed over.
"""

import functools

import torch

from . import layout
from .conv_products import product_kernel, weight_gradients_kernel
from .conv_sums import finish_kernel, sum_taps_kernel
from .layout import compute_dtype

NO_TAPS, INNER_TAPS, OUTER_TAPS = 0, 1, 2  # whether a weight's taps are summed over, or are columns of the result
PROGRAMS = 100  # from so many on, a product keeps its tiles large
PARTS_OF = 256  # pixels, the fewest that a part of the sum over the pixels has
SHARES = 264  # programs that share the sums over the pixels
ROW = 4  # a row of columns that are summed by their taps begins at 16 bytes
FINISH_ROWS, FINISH_TILE_ROWS, FINISH_COLUMNS = 8, 32, 256  # of parts, and of tiles, which are more
BLOCK = 64  # rows and columns of a weight that a program rounds or converts
PIXELS = 128  # a row of a turned map is so many, or a multiple: whole tiles
SUMMED = 512  # elements whose taps a program sums
GATHERED = 4096  # elements that a program sums for the last bias at a time


def _precision(dtype):
    return "tf32" if dtype == torch.float32 and layout.convolutions_in_tf32() else "ieee"


def _rounds(precision):
    """Whether operands are rounded for TF32: the interpreter multiplies in full."""
    return precision == "tf32" and not layout.INTERPRETS


def _channel_major(weight):
    """Whether a channel's taps are closer to each other in memory than a tap's channels."""
    strides = weight.stride()
    return strides[3] < min(strides[:2])


def _turns(x):
    """Whether the maps that backward reads have a channel in a row. fastflow/fakes.py says the same, so it may not
    depend on the precision, which may change between the two."""
    return x.dtype == torch.float32 and (x.is_cuda or not layout.INTERPRETS)


def _map(like, pixels, hidden, turned=False):
    """Room for a hidden map."""
    return like.new_empty((hidden, layout.ceil_div(pixels, PIXELS), PIXELS) if turned else (pixels, hidden))


def _is_turned(hidden_map):
    return hidden_map.dim() == 3


@functools.lru_cache(maxsize=64)
def _is_hopper(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache(maxsize=4096)
def _tiles(pixels, columns, depth, itemsize, precision, taps_are, apart, hopper):
    """(rows, columns, depth) of a product's tiles, the largest that keep a GPU busy, and launch options."""
    # What is gathered, or lies apart, has an address in registers for every element; what is masked, a predicate.
    most = 16 if taps_are == INNER_TAPS else 32 if apart else 128 // itemsize
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
    warps = 8 if rows * across >= 64 * 128 else 4
    # On Hopper, whose tensor cores read shared memory, so few that two programs share a multiprocessor.
    most = 128 if hopper and warps == 8 and taps_are != INNER_TAPS else 255
    return rows, across, inner, {"num_warps": warps, **layout.registers(most)}


def _product(a, weight, dims, taps_are, sign, major, image, out, slope, turned=None, bias=None, h=None, sums=False,
             rooms=()):
    """Launch :func:`product_kernel`; dims are the weight's of (inner, outer), rooms two of (weight, room for it).
    Returns the sums, one row a tile."""
    pixels = image[0]
    divisors, wide = _divisors(*image)
    inner, outer = weight.shape[dims[0]], weight.shape[dims[1]]
    columns, depth = outer * (9 if taps_are == OUTER_TAPS else 1), inner * (9 if taps_are == INNER_TAPS else 1)
    precision = _precision(a.dtype)
    rows, across, step, options = _tiles(pixels, columns, depth, a.dtype.itemsize, precision, taps_are,
                                       taps_are == OUTER_TAPS and weight.stride()[dims[0]] != 1, _is_hopper(a.device))
    tiles = layout.ceil_div(pixels, rows)
    partial = a.new_empty((tiles, outer), dtype=compute_dtype(a.dtype)) if sums else None
    programs, prepared, others = tiles * layout.ceil_div(columns, across), (None,) * 6, 0
    if rooms and pixels:
        prepared = tuple(part for source, room in rooms for part in (source, _strides(source, dims), room))
        others = rooms[1][0].shape[dims[1]]
        down = layout.ceil_div(outer, BLOCK)
        programs += down * (down + layout.ceil_div(9 * others, BLOCK))
    layout.launch(product_kernel, programs, a, a, a.stride(), weight, _strides(weight, dims), bias, h, out, turned,
                  partial, *prepared, pixels, *divisors, depth, layout.ceil_div(pixels, PIXELS), INNER=inner,
                  OUTER=outer, OTHERS=others, TAPS=taps_are, SIGN=sign, CHANNEL_MAJOR=major, SLOPE=slope,
                  ROW=outer if out is None else out.shape[1], PRECISION=precision, ROUNDS=_rounds(precision),
                  UPCAST=layout.INTERPRETS, DENSE=taps_are == INNER_TAPS and _dense(a), WIDE=wide,
                  TURNED=h is not None and _is_turned(h), PIXELS=PIXELS, ROWS=rows, COLUMNS=across, DEPTH=step,
                  BLOCK=BLOCK, num_stages=3, **options)
    return partial


def _strides(weight, dims):
    strides = weight.stride()
    return strides[dims[0]], strides[dims[1]], *strides[2:]


def _need_rooms(x, weights, dims):
    """Whether products need the weights other than they are: rounded, in another dtype, or, to copy as many bytes at a
    time as they can, the 3x3 one laid out anew."""
    return (_rounds(_precision(x.dtype)) or any(w.dtype != x.dtype for w in weights)
            or (x.dtype.itemsize == 2 and weights[1].stride()[dims[0]] != 1))


def _rooms(x, weights, dims):
    """((weight, room for it), ...) and the weights as later products read them: the rooms, if they need any. In a room
    what is summed over, dims[0], are neighbours."""
    if not _need_rooms(x, weights, dims):
        return (), weights
    order = (3, 2, 0, 1) if dims[0] == 0 else (2, 3, 0, 1)
    rooms = [x.new_empty((*w.shape[2:], w.shape[dims[1]], w.shape[dims[0]])).permute(order) for w in weights]
    return tuple(zip(weights, rooms, strict=True)), rooms


@functools.lru_cache(maxsize=4096)
def _divisors(pixels, height, width):
    """((height, width and the reciprocals that divide by them), whether these are too inexact for some pixel)."""
    reciprocals = [layout.ceil_div(2**30, max(size, 1)) for size in (height, width)]
    excess = max(reciprocal * size - 2**30 for reciprocal, size in zip(reciprocals, (height, width), strict=True))
    return (height, width, *reciprocals), (pixels + 2 * PIXELS) * max(excess, 1) >= 2**30


def _dense(t):
    """Whether an image's pixels lie evenly apart, from one sample to the next, too."""
    strides = t.stride()
    return strides[2] == t.shape[3] * strides[3] and strides[0] == t.shape[2] * strides[2]


def _image_of(x):
    return x.shape[0] * x.shape[2] * x.shape[3], x.shape[2], x.shape[3]


def _columns(like, pixels, channels):
    """Room for the columns of ``channels`` before their taps are summed."""
    return like.new_empty((pixels, layout.ceil_div(9 * channels, ROW) * ROW), dtype=compute_dtype(like.dtype))


def _sum_taps(z, bias, out, sign, channel_major):
    """out (B, C, H, W) becomes bias plus the sum over a pixel's nine taps of its column in z."""
    image, channels = _image_of(out), out.shape[1]
    pixels, (divisors, wide) = image[0], _divisors(*image)
    block = max(4, layout.next_power_of_2(channels))
    rows = max(1, SUMMED // block)
    layout.launch(sum_taps_kernel, layout.ceil_div(pixels, rows), z, z, bias, out, out.stride(), z.stride(0), pixels,
                  *divisors, CHANNELS=channels, SIGN=sign, CHANNEL_MAJOR=channel_major, DENSE=_dense(out), WIDE=wide,
                  ROWS=rows, BLOCK=block, num_warps=4, **layout.registers(128))


def conv_net_fwd(x, w1, b1, w2, b2, w3, b3, slope, keep):
    """(out, h1, h2) of reference.conv_net, computed in x's dtype; the maps, (B H W, N) or turned, are empty unless
    kept. Four launches."""
    image, hidden = _image_of(x), len(w1)
    b1, b2, b3 = b1.contiguous(), b2.contiguous(), b3.contiguous()
    rooms, (second, last) = _rooms(x, (w2, w3), (1, 0))
    major = _channel_major(last)
    h1, h2 = (_map(x, image[0], hidden) for _ in "12")
    kept_1, kept_2 = (_map(x, image[0], hidden, turned=True) if keep and _turns(x) else None for _ in "12")
    _product(x, w1, (1, 0), INNER_TAPS, 1, _channel_major(w1), image, h1, slope, kept_1, bias=b1, rooms=rooms)
    _product(h1, second, (1, 0), NO_TAPS, 1, False, image, h2, slope, kept_2, bias=b2)
    if kept_1 is not None:
        h1 = kept_1
    columns = _columns(x, image[0], len(w3))
    _product(h2, last, (1, 0), OUTER_TAPS, 1, major, image, columns, slope)
    if kept_2 is not None:
        h2 = kept_2
    out = layout.empty_like_format(x, (x.shape[0], len(w3), *x.shape[2:]), x.dtype)
    _sum_taps(columns, b3, out, 1, major)
    return (out, h1, h2) if keep else (out, layout.nothing(x), layout.nothing(x))


def conv_net_bwd(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights):
    """The gradients for x, w1, b1, w2, b2, w3, b3, empty where not needed. Up to six launches."""
    image, hidden = _image_of(x), len(w1)
    grad = grad.to(x.dtype)
    rooms, (second, first) = _rooms(x, (w2, w1), (0, 1))
    turned = _is_turned(h1)
    turned_2, turned_1 = (_map(x, image[0], hidden, turned=True) if turned and need_weights else None for _ in "21")
    g2 = _map(x, image[0], hidden)
    g1 = _map(x, image[0], hidden) if need_x or turned_1 is None else None
    sums_2 = _product(grad, w3, (0, 1), INNER_TAPS, -1, _channel_major(w3), image, g2, slope, turned_2, h=h2,
                      sums=need_weights, rooms=rooms)
    sums_1 = _product(g2, second, (0, 1), NO_TAPS, 1, False, image, g1, slope, turned_1, h=h1, sums=need_weights)
    g_x = layout.nothing(x)
    if need_x:
        columns, major = _columns(x, image[0], x.shape[1]), _channel_major(first)
        _product(g1, first, (0, 1), OUTER_TAPS, 1, major, image, columns, slope)
        g_x = layout.empty_like_format(x, x.shape, x.dtype)
        _sum_taps(columns, None, g_x, -1, major)
    if not need_weights:
        return (g_x, *(layout.nothing(x) for _ in range(6)))
    grads = (turned_1, turned_2) if turned else (g1, g2)
    return (g_x, *_weight_gradients(grad, x, (w1, w2, w3), (h1, h2), grads, (sums_1, sums_2)))


@functools.lru_cache(maxsize=4096)
def _parts(pixels, hidden, inner, out, tile):
    """(parts, depths of a tile in each, tiles of a part) of the sums over the pixels."""
    rows, columns, hidden_columns, depth = tile
    down = layout.ceil_div(hidden, rows)
    across = layout.ceil_div(hidden, hidden_columns) + sum(layout.ceil_div(9 * c, columns) for c in (inner, out))
    tiles = 1 + down * across
    parts = max(1, min(SHARES // tiles, layout.ceil_div(pixels, PARTS_OF)))
    chunk = layout.ceil_div(pixels, parts * depth)
    return layout.ceil_div(pixels, max(chunk, 1) * depth), chunk, tiles


def _weight_gradients(grad, x, weights, maps, grads, sums):
    (w1, _, w3), image = weights, _image_of(x)
    pixels, (divisors, wide) = image[0], _divisors(*image)
    hidden, inner, out = len(w1), x.shape[1], len(w3)
    dtype, precision = compute_dtype(x.dtype), _precision(x.dtype)
    tile = 128, 64, 128, 128 // x.dtype.itemsize
    if precision == "ieee" and x.dtype.itemsize > 2:
        tile = 32, 32, 32, 16
    parts, chunk, tiles = _parts(pixels, hidden, inner, out, tile)
    of_w1, of_w2, of_w3, of_b3 = (x.new_empty((parts, size), dtype=dtype) for size in (
        hidden * 9 * inner, hidden**2, hidden * 9 * out, out))
    shape = {"HIDDEN": hidden, "IN": inner, "OUT": out, "MAJOR_1": _channel_major(w1), "MAJOR_3": _channel_major(w3)}
    channels = layout.next_power_of_2(out)
    layout.launch(weight_gradients_kernel, parts * tiles, x, x, x.stride(), grad, grad.stride(), *maps, *grads, of_w1,
                  of_w2, of_w3, of_b3, pixels, *divisors, chunk, parts, layout.ceil_div(pixels, PIXELS), **shape,
                  PRECISION=precision, ROUNDS=_rounds(precision), UPCAST=layout.INTERPRETS,
                  DENSE=_dense(x) and _dense(grad), WIDE=wide, TURNED=_is_turned(maps[0]), PIXELS=PIXELS, ROWS=tile[0],
                  COLUMNS=tile[1], HIDDEN_COLUMNS=tile[2], DEPTH=tile[3], CHANNELS=channels,
                  SUMMED=max(1, min(256, GATHERED // channels)), num_warps=8, num_stages=3, **layout.registers(255))
    found = [layout.empty_like_format(w, w.shape, w.dtype) for w in weights]
    b1, b2, b3 = (w.new_empty(w.shape[:1]) for w in weights)
    g_w1, g_w2, g_w3 = found
    blocks = sum(layout.ceil_div(size, FINISH_COLUMNS) for size in (
        hidden, hidden, out, 9 * inner * hidden, 9 * out * hidden, hidden**2))
    layout.launch(finish_kernel, blocks, x, of_w1, sums[0], of_w2, sums[1], of_w3, of_b3, g_w1, g_w1.stride(), b1, g_w2,
                  g_w2.stride(), b2, g_w3, g_w3.stride(), b3, parts, len(sums[0]), len(sums[1]), **shape,
                  ROWS=FINISH_ROWS, TILE_ROWS=FINISH_TILE_ROWS, COLUMNS=FINISH_COLUMNS, num_warps=4)
    return g_w1, b1, g_w2, b2, g_w3, b3


def _forward_launches(x, w1, b1, w2, b2, w3, b3, slope, keep):
    return 4 if _image_of(x)[0] > 0 else 0


def _backward_launches(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights):
    pixels = _image_of(x)[0] > 0
    return pixels * (2 + 2 * need_x + need_weights) + need_weights


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"conv_net_fwd": _forward_launches, "conv_net_bwd": _backward_launches}
