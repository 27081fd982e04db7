"""Monotonic splines on an interval, element by element, in eager PyTorch."""

import math

import torch
import torch.nn.functional as F

from fastflow import reference
from fastflow.reference.layout import memory_format_of
from fastflow.reference.rounding import just_below, nearest

__all__ = ["SPLINES", "TAILS", "spline", "spline_bins", "spline_params", "wrapped"]

SPLINES = ("rq", "linear")
TAILS = ("linear", "circular", None)
SLOPES = {"linear": -1, "circular": 0, None: 1}  # raw slopes less bins


def spline_params(kind, n_bins, tails="linear"):
    """Raw parameters per element: n_bins (heights) for "linear", for "rq" 3*n_bins - 1 (widths, heights, inner slopes),
    one more with "circular" tails (the slope of both ends), two more without tails (that of each end)."""
    return 3 * n_bins + SLOPES[tails] if kind == "rq" else n_bins


def spline_bins(kind, n_params, tails="linear"):
    """The bins that so many raw parameters per element stand for, or None: no whole number of them."""
    if kind == "linear":
        return n_params if n_params > 0 else None
    sizes = n_params - SLOPES[tails]  # not by divmod, which Dynamo has not for symbols
    return sizes // 3 if sizes > 0 and sizes % 3 == 0 else None


def wrapped(x, bound):
    """x on the circle, as a number of [-bound, bound); what is one already stays exactly."""
    turned = x - 2.0 * bound * torch.floor((x + bound) / (2.0 * bound)).detach()
    value = torch.where((x >= -bound) & (x < bound), x, turned)
    # Rounding may carry it to the end, which is the beginning.
    return torch.where((value < -bound) | (value >= bound), -bound + (value - value.detach()), value)


def spline(x, params, *, kind="rq", tail_bound=3.0, tails="linear", min_width=1e-3, min_height=1e-3,
           min_derivative=1e-3, gain=1.0, clamp=None, end_derivative=1.0, inverse=False, logdet=None):
    """y = f(x) per element, or its inverse, and log|det J|; see functional.spline."""
    dtype, out_dtype = reference.compute_dtype(x, params), reference.result_dtype(x, params)
    xc, per_element = x.to(dtype), params.shape[1] // max(x.shape[1], 1)
    if tails == "circular":
        xc = wrapped(xc, tail_bound)
    # An end as x's dtype has it counts as inside where there are no tails.
    outside = xc.abs() > (tail_bound if tails == "linear" else max(tail_bound, nearest(tail_bound, x.dtype)))
    value = torch.where(outside, 0.0, xc if tails == "linear" else xc.clamp(-tail_bound, tail_bound))
    raw = params.to(dtype).reshape(x.shape[0], x.shape[1], per_element, *x.shape[2:]).movedim(2, -1)
    raw = torch.where(outside[..., None], 0.0, raw)  # a masked branch hands out no NaN
    n_bins = spline_bins(kind, per_element, tails) or 1
    if kind == "linear":
        heights = _softmax(raw, gain, clamp, min_height, n_bins, tail_bound)
        result, log_slope = _linear(value, heights, n_bins, tail_bound, inverse)
    else:
        widths = _softmax(raw[..., :n_bins], gain, clamp, min_width, n_bins, tail_bound)
        heights = _softmax(raw[..., n_bins:2 * n_bins], gain, clamp, min_height, n_bins, tail_bound)
        slopes = _slopes(raw[..., 2 * n_bins:], clamp, min_derivative, end_derivative, tails)
        result, log_slope = _rational_quadratic(value, widths, heights, slopes, tail_bound, inverse)
    # Rounding must not carry an element out of the interval, where the inverse would leave it alone; nor, where nothing
    # is outside, to an end, which densities on a half-open interval leave out.
    end = tail_bound if tails == "linear" else just_below(tail_bound, out_dtype)
    result = result + (result.clamp(-end, end) - result).detach()
    y = torch.where(outside, xc, result) if tails == "linear" else result
    beyond = 0.0 if tails == "linear" else math.inf if inverse else -math.inf
    total = torch.where(outside, beyond, log_slope).flatten(1).sum(1)
    if inverse:
        total = -total
    if logdet is not None:
        total = logdet.to(dtype) + total
    return y.to(out_dtype).contiguous(memory_format=memory_format_of(x)), total


def _softmax(raw, gain, clamp, least, n_bins, bound):
    """Sizes of the bins, which add up to 2*bound."""
    raw = gain * raw
    if clamp is not None:
        raw = raw / (1.0 + (2.0 / clamp) * raw.abs())
    return 2.0 * bound * (least + (1.0 - least * n_bins) * torch.softmax(raw, -1))


def _slopes(raw, clamp, least, end, tails):
    """Slopes at all knots: ``end`` at the two ends, where linear tails begin; on a circle these are one knot."""
    slopes = least + (reference.softplus(raw) if clamp is None else torch.exp(raw / (1.0 + raw.abs() / clamp)))
    if tails == "linear":
        return F.pad(slopes, (1, 1), value=end)
    return torch.cat([slopes, slopes[..., :1]], -1) if tails == "circular" else slopes


def _knots(sizes, bound):
    """The left end of every bin."""
    return F.pad(torch.cumsum(sizes, -1)[..., :-1], (1, 0)) - bound


def _bin_of(value, knots):
    """The bin [left, right) that holds the value; the first one for NaN."""
    return ((value[..., None] >= knots).sum(-1, keepdim=True) - 1).clamp(min=0)


def _linear(value, heights, n_bins, bound, inverse):
    width = 2.0 * bound / n_bins
    lefts = torch.arange(n_bins, device=value.device, dtype=value.dtype) * width - bound
    bottoms = _knots(heights, bound)
    index = _bin_of(value, bottoms if inverse else lefts)
    left, bottom = (t.gather(-1, index)[..., 0] for t in (lefts.expand(bottoms.shape), bottoms))
    slope = heights.gather(-1, index)[..., 0] / width
    result = left + (value - bottom) / slope if inverse else bottom + (value - left) * slope
    return result, torch.log(slope)


def _rational_quadratic(value, widths, heights, slopes, bound, inverse):
    lefts, bottoms = _knots(widths, bound), _knots(heights, bound)
    index = _bin_of(value, bottoms if inverse else lefts)
    left, width, bottom, height, d0, d1 = (t.gather(-1, index)[..., 0] for t in (
        lefts, widths, bottoms, heights, slopes[..., :-1], slopes[..., 1:]))
    s = height / width
    bend = d0 + d1 - 2.0 * s
    if inverse:
        eta = (value - bottom) / height
        b = d0 - eta * bend
        square = b * b + 4.0 * ((s - d0) + eta * bend) * s * eta
        tiny = torch.finfo(value.dtype).tiny
        # Not negative but by rounding. Not 0 either, where the slope of the root is infinite; NaN stays.
        root = torch.sqrt(torch.where(square < tiny, tiny, square))
        theta = 2.0 * s * eta / (b + root)
        result = left + theta * width
    else:
        theta = (value - left) / width
    rest = 1.0 - theta
    both = theta * rest
    denominator = s + bend * both
    if not inverse:
        result = bottom + height * (s * theta * theta + d0 * both) / denominator
    ratio = s / denominator
    numerator = d1 * theta * theta + 2.0 * s * both + d0 * rest * rest
    return result, torch.log(numerator * ratio * ratio)
