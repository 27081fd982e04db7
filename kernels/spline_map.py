"""A bin of a monotonic spline: where a point lies in it, its slope there, and the derivatives of both. Counterpart of
csrc/common/spline_map.h.

A bin is (left, width, bottom, height, d0, d1), d0 and d1 the slopes at its ends; a point in it is (theta, s, bend,
denominator, numerator, slope), theta its place as a share of the width.
"""

import functools

import triton
import triton.language as tl

from . import maths

RATIONAL_QUADRATIC, LINEAR = tl.constexpr(0), tl.constexpr(1)


@functools.lru_cache(maxsize=256)
def constants(kind, inverse, bins, bound, min_width, min_height, min_derivative, gain, clamp, end_derivative):
    """The tuple MAP that a kernel is specialised for: [0] kind, [1] inverse, [2] bins, [3] bound, [4] least width,
    [5] what widths share beyond that, [6] least height, [7] the same of heights, [8] least derivative, [9] gain,
    [10] one over the clamp, 0 without one, [11] derivative at the ends."""
    size = 2.0 * bound
    return (kind, inverse, bins, bound, size * min_width, size * (1.0 - bins * min_width), size * min_height,
            size * (1.0 - bins * min_height), min_derivative, gain, 1.0 / clamp if clamp != 0.0 else 0.0,
            end_derivative)


@triton.jit
def exp_share(x):
    """exp(x) for x <= 0 or NaN; 0 where it would be subnormal."""
    LOW: tl.constexpr = -709.0 if x.dtype == tl.float64 else -88.0  # 2^n is 0 there
    n, r, q = maths.exp_parts(tl.where(x < LOW, LOW, x))
    return (1.0 + (r + q)) * maths.power_of_two(n, x.dtype)


@triton.jit
def knot(position, inverse_sum, before, SPAN: tl.constexpr, LEAST: tl.constexpr, BOUND: tl.constexpr):
    """Where bin ``position`` begins: ``before`` is the sum of the exponentials of those before it."""
    start = tl.fma(position, tl.full([], LEAST, position.dtype), tl.full([], -BOUND, position.dtype))
    return tl.fma(SPAN * inverse_sum, before, start)


@triton.jit
def bounded_size(raw, MAP: tl.constexpr):
    """A raw width or height as softmax takes it."""
    if MAP[9] != 1.0:
        raw = raw * MAP[9]
    if MAP[10] != 0.0:
        raw = maths.div(raw, maths.one_plus_multiple(tl.abs(raw), 2.0 * MAP[10]))
    return raw


@triton.jit
def bounded_size_slope(raw, MAP: tl.constexpr):
    """d bounded_size / d raw."""
    slope = tl.full(raw.shape, MAP[9], raw.dtype)
    if MAP[10] != 0.0:
        inverse = maths.div(tl.full(raw.shape, 1.0, raw.dtype),
                            maths.one_plus_multiple(tl.abs(raw * MAP[9]), 2.0 * MAP[10]))
        slope = slope * inverse * inverse
    return slope


@triton.jit
def derivative_of(raw, MAP: tl.constexpr):
    """The slope at a knot of this raw slope."""
    if MAP[10] != 0.0:
        return MAP[8] + maths.exp(maths.div(raw, maths.one_plus_multiple(tl.abs(raw), MAP[10])))
    else:
        return MAP[8] + maths.softplus(raw)


@triton.jit
def derivative_slope(raw, MAP: tl.constexpr):
    """d derivative_of / d raw."""
    if MAP[10] != 0.0:
        inverse = maths.div(tl.full(raw.shape, 1.0, raw.dtype), maths.one_plus_multiple(tl.abs(raw), MAP[10]))
        return maths.exp(raw * inverse) * inverse * inverse
    else:
        near, _, _ = maths.sigmoid_parts(raw)
        return near


@triton.jit
def point_at(theta, left, width, bottom, height, d0, d1):
    s = maths.div(height, width)
    bend = maths.plus_multiple(d0 + d1, s, -2.0)
    rest = 1.0 - theta
    both = theta * rest
    denominator = tl.fma(bend, both, s)
    numerator = tl.fma(d1 * theta, theta, tl.fma(2.0 * s, both, d0 * rest * rest))
    ratio = maths.div(s, denominator)
    return theta, s, bend, denominator, numerator, numerator * ratio * ratio


@triton.jit
def share_at(theta, s, denominator, d0):
    """f within its bin as a share of the height."""
    return maths.div(tl.fma(s * theta, theta, d0 * (theta * (1.0 - theta))), denominator)


@triton.jit
def theta_of_y(y, left, width, bottom, height, d0, d1):
    """Where f takes the value y."""
    eta = maths.div(y - bottom, height)
    s = maths.div(height, width)
    bend = maths.plus_multiple(d0 + d1, s, -2.0)
    b = tl.fma(-eta, bend, d0)
    square = tl.fma(b, b, 4.0 * tl.fma(eta, bend, s - d0) * s * eta)
    # Not negative but by rounding; NaN stays.
    return maths.div(2.0 * s * eta, b + maths.sqrt(tl.where(square < 0.0, 0.0, square)))


@triton.jit
def confined(value, BOUND: tl.constexpr):
    """A result within the interval, where rounding may have carried it out; NaN stays."""
    bound = tl.full([], BOUND, value.dtype)
    return tl.where(value < -bound, -bound, tl.where(value > bound, bound, value))


@triton.jit
def rational_quadratic_gradient(place, point, incoming, incoming_log, INVERSE: tl.constexpr):
    """Gradients by (operand, left, width, bottom, height, d0, d1) of a result and of the log-slope of f, whatever the
    direction. For the inverse x of y, 0 = f(x) - y gives dx = (dy - df)/f', df what the parameters do to f at a fixed
    x."""
    left, width, bottom, height, d0, d1 = place
    t, s, bend, denominator, numerator, slope = point
    u = 1.0 - t
    a = t * u
    one = tl.full(t.shape, 1.0, t.dtype)
    per_denominator = maths.div(one, denominator)
    per_numerator = maths.div(one, numerator)
    per_width = maths.div(one, width)
    middle = 1.0 - 2.0 * t  # d a / d t
    log_theta = 2.0 * (tl.fma(d1, t, tl.fma(s, middle, -d0 * u)) * per_numerator - bend * middle * per_denominator)
    if INVERSE:
        operand = maths.div(tl.fma(incoming_log, log_theta * per_width, incoming), slope)
        of_f = -operand
        of_theta = -incoming * width
    else:
        of_f = incoming
        of_theta = tl.fma(incoming * slope, width, incoming_log * log_theta)
        operand = of_theta * per_width
    of_share = of_f * height * per_denominator * per_denominator
    log_both = 2.0 * a * per_denominator
    log_s = maths.div(2.0, s) + 2.0 * (a * per_numerator - (1.0 - 2.0 * a) * per_denominator)
    of_s = tl.fma(of_share * a, d1 * t * t - d0 * u * u, incoming_log * log_s)
    # Numerator and denominator side by side, so that infinite slopes give the NaN that they are.
    of_d0 = tl.fma(of_share * a, tl.fma(s * u, u, d1 * a),
                   incoming_log * (tl.fma(-log_both, numerator, u * u) * per_numerator))
    of_d1 = tl.fma(-of_share * a, tl.fma(s * t, t, d0 * a),
                   incoming_log * (tl.fma(-log_both, numerator, t * t) * per_numerator))
    of_width = -tl.fma(of_theta, t, of_s * s) * per_width
    of_height = tl.fma(of_f, share_at(t, s, denominator, d0), of_s * per_width)
    return operand, -of_theta * per_width, of_width, of_f, of_height, of_d0, of_d1
