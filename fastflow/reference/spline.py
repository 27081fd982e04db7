"""Monotonic splines with linear tails, element by element, in eager PyTorch."""

import torch
import torch.nn.functional as F

from fastflow import reference
from fastflow.reference.layout import memory_format_of

__all__ = ["SPLINES", "spline", "spline_bins", "spline_params"]

SPLINES = ("rq", "linear")


def spline_params(kind, n_bins):
    """Raw parameters per element: 3*n_bins - 1 (widths, heights, inner slopes) for "rq", n_bins (heights) for "linear".
    """
    return 3 * n_bins - 1 if kind == "rq" else n_bins


def spline_bins(kind, n_params):
    """The bins that so many raw parameters per element stand for, or None: no whole number of them."""
    if kind == "linear":
        return n_params if n_params > 0 else None
    return (n_params + 1) // 3 if n_params > 1 and n_params % 3 == 2 else None


def spline(x, params, *, kind="rq", tail_bound=3.0, tails="linear", min_width=1e-3, min_height=1e-3,
           min_derivative=1e-3, gain=1.0, clamp=None, end_derivative=1.0, inverse=False, logdet=None):
    """y = f(x) per element, or its inverse, and log|det J|; see functional.spline."""
    dtype, out_dtype = reference.compute_dtype(x, params), reference.result_dtype(x, params)
    xc, per_element = x.to(dtype), params.shape[1] // max(x.shape[1], 1)
    outside = xc.abs() > tail_bound
    value = torch.where(outside, 0.0, xc)
    raw = params.to(dtype).reshape(x.shape[0], x.shape[1], per_element, *x.shape[2:]).movedim(2, -1)
    raw = torch.where(outside[..., None], 0.0, raw)  # a masked branch hands out no NaN
    n_bins = spline_bins(kind, per_element) or 1
    if kind == "linear":
        heights = _softmax(raw, gain, clamp, min_height, n_bins, tail_bound)
        result, log_slope = _linear(value, heights, n_bins, tail_bound, inverse)
    else:
        widths = _softmax(raw[..., :n_bins], gain, clamp, min_width, n_bins, tail_bound)
        heights = _softmax(raw[..., n_bins:2 * n_bins], gain, clamp, min_height, n_bins, tail_bound)
        slopes = _slopes(raw[..., 2 * n_bins:], clamp, min_derivative, end_derivative)
        result, log_slope = _rational_quadratic(value, widths, heights, slopes, tail_bound, inverse)
    # Rounding must not carry an element out of the interval, where the inverse would leave it alone.
    result = result + (result.clamp(-tail_bound, tail_bound) - result).detach()
    y = torch.where(outside, xc, result)
    total = torch.where(outside, 0.0, log_slope).flatten(1).sum(1)
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


def _slopes(raw, clamp, least, end):
    """Slopes at all knots: ``end`` at the two ends, where the tails begin."""
    grown = reference.softplus(raw) if clamp is None else torch.exp(raw / (1.0 + raw.abs() / clamp))
    return F.pad(least + grown, (1, 1), value=end)


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
