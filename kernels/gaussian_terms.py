"""What one element contributes: sigma and its logarithm, their slopes, and the noise."""

import triton
import triton.language as tl

from . import maths, philox

LOGVAR, LOGSTD, STD, SOFTPLUS, SOFT_TANH = (tl.constexpr(i) for i in range(5))
FLOOR = tl.constexpr(1e-4)  # sigma = softplus(r) + FLOOR
RANGE = tl.constexpr(5.0)  # log sigma = RANGE * tanh(r / RANGE)


@triton.jit
def _soft_tanh(r):
    """(RANGE * tanh(r / RANGE), its slope). The KL divergence takes exp of twice that, so that near RANGE it must be
    better than a tanh to 2 ulp: RANGE * (1 - 2w/(1 + w)), w = exp(-2 |r| / RANGE)."""
    a = maths.div(tl.abs(r), tl.full([], RANGE, r.dtype))
    _, remainder, q, p, e, _ = maths.expm1_parts(-2.0 * a)
    w = p * (1.0 + (remainder + q))
    small = a < 0.55
    denominator = 2.0 + e
    quotient = maths.div(tl.where(small, -e, 2.0 * w), denominator)
    near = maths.plus_multiple(tl.full([], RANGE, r.dtype), quotient, -RANGE)
    magnitude = tl.where(small, RANGE * quotient, near)
    return tl.where(r < 0.0, -magnitude, magnitude), maths.div(4.0 * w, denominator * denominator)


@triton.jit
def sigma_and_log(r, SCALE: tl.constexpr):
    """(sigma, log sigma) of a raw scale parameter."""
    if SCALE == STD:
        return r, maths.log(r)
    elif SCALE == SOFTPLUS:
        sigma = maths.softplus(r) + FLOOR
        return sigma, maths.log(sigma)
    else:
        if SCALE == LOGVAR:
            log_sigma = 0.5 * r
        elif SCALE == LOGSTD:
            log_sigma = r
        else:
            log_sigma, _ = _soft_tanh(r)
        return maths.exp(log_sigma), log_sigma


@triton.jit
def with_slopes(r, SCALE: tl.constexpr):
    """(sigma, log sigma, d sigma / dr, d log sigma / dr)."""
    if SCALE == STD:
        one = tl.zeros_like(r) + 1.0
        return r, maths.log(r), one, maths.div(one, r)
    elif SCALE == SOFTPLUS:
        slope, _, tail = maths.sigmoid_parts(r)
        sigma = tl.where(r > 0.0, r, 0.0) + tail + FLOOR
        return sigma, maths.log(sigma), slope, maths.div(slope, sigma)
    else:
        if SCALE == LOGVAR:
            log_sigma = 0.5 * r
            slope = tl.zeros_like(r) + 0.5
        elif SCALE == LOGSTD:
            log_sigma = r
            slope = tl.zeros_like(r) + 1.0
        else:
            log_sigma, slope = _soft_tanh(r)
        sigma = maths.exp(log_sigma)
        return sigma, log_sigma, sigma * slope, slope


@triton.jit
def noise(row, start, n, offset, seed, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """float32 normals of elements start .. start + BLOCK of the rows ``row`` [R, 1] of n elements each: [R, BLOCK].

    ALIGNED: n is a multiple of 4, and so four neighbours share a counter.
    """
    if ALIGNED:
        block = row * (n // 4) + start // 4 + tl.arange(0, BLOCK // 4)[None, :]
        return philox.normals_of_blocks(block + offset, seed)
    else:
        return philox.normals_of_elements(row * n + start + tl.arange(0, BLOCK)[None, :], offset, seed)
