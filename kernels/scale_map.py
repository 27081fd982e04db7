"""The scale maps of an affine coupling: s and log s of a raw conditioner output, and the slope of log s."""

import functools
import math

import triton
import triton.language as tl

from . import maths

EXP, SIGMOID, TANH, ATAN, SOFTPLUS, RATIONAL, ADDITIVE = (tl.constexpr(i) for i in range(7))


@functools.lru_cache(maxsize=256)
def constants(kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
    """The tuple MAP that a kernel is specialised for: the map's parameters and the logarithms that they need."""
    log_gain = math.log(out_gain) if out_gain > 0 else 0.0
    log_eps = math.log(eps) if eps > 0 else 0.0
    log_min = math.log(hard_min) if hard_min > 0 else -math.inf
    log_max = math.log(hard_max) if 0 < hard_max < math.inf else math.inf
    return (kind, gain, offset, out_gain, log_gain, clamp, eps, log_eps, hard_min, hard_max, log_min, log_max,
            shift_gain)


@triton.jit
def shift_of(t, MAP: tl.constexpr):
    if MAP[12] != 1.0:
        t = t * MAP[12]
    return t


@triton.jit
def _argument(r, MAP: tl.constexpr):
    if MAP[1] != 1.0 or MAP[2] != 0.0:
        r = r * MAP[1] + MAP[2]
    return r


@triton.jit
def _bounded(v, low, high):
    """v within [low, high], NaN kept."""
    low = tl.full([], low, v.dtype)
    high = tl.full([], high, v.dtype)
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def scale_and_log(r, MAP: tl.constexpr):
    """(s, log s), log s from the pre-activation."""
    KIND: tl.constexpr = MAP[0]
    OUT_GAIN: tl.constexpr = MAP[3]
    CLAMP: tl.constexpr = MAP[5]
    EPS: tl.constexpr = MAP[6]
    u = _argument(r, MAP)
    if KIND == ADDITIVE:
        log_s = tl.zeros_like(u)
        s = log_s + 1.0
    elif KIND == SIGMOID:
        s, _, tail = maths.sigmoid_parts(u)
        log_s = tl.where(u < 0.0, u, 0.0) - tail
        if OUT_GAIN != 1.0:
            s = s * OUT_GAIN
            log_s = log_s + MAP[4]
    elif KIND == SOFTPLUS:
        s = maths.softplus(u)
        # Where softplus underflows, its logarithm does not: u - exp(u)/2 and smaller terms.
        log_s = tl.where(u < -20.0, u - 0.5 * s, maths.log(s))
    else:
        if KIND == EXP:
            log_s = u
            if OUT_GAIN != 1.0:
                log_s = u * OUT_GAIN
        elif KIND == RATIONAL:
            log_s = maths.div(u, 1.0 + maths.div(tl.abs(u), tl.full([], CLAMP, u.dtype)))
        else:
            v = u
            if CLAMP != 1.0:
                v = maths.div(u, tl.full([], CLAMP, u.dtype))
            if KIND == TANH:
                log_s, _ = maths.tanh_and_slope(v)
            else:
                log_s = maths.atan(v)
            if CLAMP * OUT_GAIN != 1.0:
                log_s = log_s * (CLAMP * OUT_GAIN)
        s = maths.exp(log_s)
    if EPS != 0.0:
        s = s + EPS
        gap = log_s - MAP[7]
        log_s = tl.where(gap > 0.0, log_s, tl.full([], MAP[7], u.dtype)) + maths.log1p(maths.exp(-tl.abs(gap)))
    if MAP[8] > float("-inf") or MAP[9] < float("inf"):
        s = _bounded(s, MAP[8], MAP[9])
        log_s = _bounded(log_s, MAP[10], MAP[11])
    return s, log_s


@triton.jit
def scale_and_slope(r, MAP: tl.constexpr):
    """(s, d log s / dr): the slope is that of log s after eps and bounds, 0 outside the bounds."""
    KIND: tl.constexpr = MAP[0]
    OUT_GAIN: tl.constexpr = MAP[3]
    CLAMP: tl.constexpr = MAP[5]
    EPS: tl.constexpr = MAP[6]
    u = _argument(r, MAP)
    if KIND == ADDITIVE:
        slope = tl.zeros_like(u)
        s = slope + 1.0
    elif KIND == SIGMOID:
        s, slope, _ = maths.sigmoid_parts(u)
        if OUT_GAIN != 1.0:
            s = s * OUT_GAIN
    elif KIND == SOFTPLUS:
        near, _, tail = maths.sigmoid_parts(u)
        s = tl.where(u > 0.0, u, 0.0) + tail
        slope = tl.where(u < -20.0, 1.0 - 0.5 * s, maths.div(near, s))
    else:
        if KIND == EXP:
            log_s = u
            if OUT_GAIN != 1.0:
                log_s = u * OUT_GAIN
            slope = tl.zeros_like(u) + OUT_GAIN
        elif KIND == RATIONAL:
            one = tl.full([], 1.0, u.dtype)
            shrink = maths.div(one, 1.0 + maths.div(tl.abs(u), tl.full([], CLAMP, u.dtype)))
            log_s = u * shrink
            slope = shrink * shrink + 0.0 * log_s  # NaN at an infinite u, as in eager
        else:
            v = u
            if CLAMP != 1.0:
                v = maths.div(u, tl.full([], CLAMP, u.dtype))
            if KIND == TANH:
                log_s, slope = maths.tanh_and_slope(v)
            else:
                log_s = maths.atan(v)
                slope = maths.div(tl.full([], 1.0, u.dtype), 1.0 + v * v)
            slope = slope * OUT_GAIN
            log_s = log_s * (CLAMP * OUT_GAIN)
        s = maths.exp(log_s)
    lost = 0.0 * s  # the zero gradient of a bound; NaN where s overflowed, as in eager
    if EPS != 0.0:
        slope = maths.div(slope, 1.0 + maths.div(tl.full([], EPS, u.dtype), s))
        s = s + EPS
    if MAP[8] > float("-inf") or MAP[9] < float("inf"):
        if KIND == SOFTPLUS:
            lost = tl.zeros_like(s)
        outside = (s < tl.full([], MAP[8], u.dtype)) | (s > tl.full([], MAP[9], u.dtype))
        slope = tl.where(outside, lost, slope)
        s = _bounded(s, MAP[8], MAP[9])
    if MAP[1] != 1.0:
        slope = slope * MAP[1]
    return s, slope
