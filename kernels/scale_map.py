"""The scale maps of an affine coupling: s and log s of a raw conditioner output, and their slopes. Counterpart of
csrc/common/scale_map.h.
"""

import functools
import math

import triton
import triton.language as tl

from . import maths

EXP, SIGMOID, TANH, ATAN, SOFTPLUS, RATIONAL, ADDITIVE = (tl.constexpr(i) for i in range(7))


@functools.lru_cache(maxsize=256)
def constants(kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
    """The tuple MAP that a kernel is specialised for: the map's parameters, the logarithms that they need, [13] whether
    there are hard bounds, [14] whether ds/dr may differ from s * d log s/dr: with these, and for softplus where s or
    d log s leaves the range."""
    log_gain = math.log(out_gain) if out_gain > 0 else 0.0
    log_eps = math.log(eps) if eps > 0 else 0.0
    log_min = math.log(hard_min) if hard_min > 0 else -math.inf
    log_max = math.log(hard_max) if 0 < hard_max < math.inf else math.inf
    has_bounds = hard_min > -math.inf or hard_max < math.inf
    return (kind, gain, offset, out_gain, log_gain, clamp, eps, log_eps, hard_min, hard_max, log_min, log_max,
            shift_gain, has_bounds, has_bounds or kind == SOFTPLUS.value)


@triton.jit
def shift_of(t, MAP: tl.constexpr):
    if MAP[12] != 1.0:
        t = t * MAP[12]
    return t


@triton.jit
def _argument(r, MAP: tl.constexpr):
    if MAP[1] != 1.0 or MAP[2] != 0.0:
        r = tl.fma(r, tl.full([], MAP[1], r.dtype), tl.full([], MAP[2], r.dtype))
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
    if MAP[13]:
        s = _bounded(s, MAP[8], MAP[9])
        log_s = _bounded(log_s, MAP[10], MAP[11])
    return s, log_s


@triton.jit
def scale_and_slopes(r, MAP: tl.constexpr):
    """(s, ds/dr, d log s / dr, inside): the slopes are those before the hard bounds, ``inside`` says whether the bounds
    let gradients through. Non-finite values come out where differentiating step by step gives them."""
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
        own_slope, _, tail = maths.sigmoid_parts(u)
        s = tl.where(u > 0.0, u, 0.0) + tail
        slope = tl.where(u < -20.0, 1.0 - 0.5 * s, maths.div(own_slope, s))
        if MAP[1] != 1.0:
            own_slope = own_slope * MAP[1]
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
                one = tl.full([], 1.0, u.dtype)
                slope = maths.div(one, tl.fma(v, v, one))
            slope = slope * OUT_GAIN
            log_s = log_s * (CLAMP * OUT_GAIN)
        s = maths.exp(log_s)
    if MAP[1] != 1.0:
        slope = slope * MAP[1]
    if KIND != SOFTPLUS:
        own_slope = s * slope
    if EPS != 0.0:
        share = maths.div(s, s + EPS)
        slope = slope * tl.where(s == float("inf"), 1.0, share)
        s = s + EPS
    inside = s == s
    if MAP[13]:
        inside = ((s < tl.full([], MAP[8], u.dtype)) | (s > tl.full([], MAP[9], u.dtype))) == 0
        s = _bounded(s, MAP[8], MAP[9])
    return s, own_slope, slope, inside


@triton.jit
def gradient_of_both(to_s, to_log, own_slope, slope, inside, MAP: tl.constexpr):
    """The gradient of r from those of s and of log s where MAP[14]."""
    if MAP[13]:
        to_s = tl.where(inside, to_s, 0.0)
        to_log = tl.where(inside, to_log, 0.0)
    return tl.fma(to_s, own_slope, to_log * slope)
