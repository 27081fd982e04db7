"""Elementary functions for the kernels, float32 and float64, accurate to about 2 ulp.

They use only IEEE additions, multiplications, correctly rounded divisions, bit casts and fused multiply-adds where they
are written (layout.launch keeps the compiler from fusing others, and Triton's interpreter rounds these twice); none of
the GPU's approximate units. NaN goes in and comes out; comparisons are written so that no clamp drops it. Polynomials
are near-minimax fits, low-order coefficient first.
"""

import triton
import triton.language as tl


def _coefficients(*lowest_first):
    """(degree, coefficients with the highest first) of a polynomial."""
    return tl.constexpr((len(lowest_first) - 1, *lowest_first[::-1]))


# x / log(2) + 1.5*2^52 or 1.5*2^23: the addition rounds to an integer, which the low bits then hold.
ROUNDED_DOUBLE = _coefficients(6755399441055744.0, 1.4426950408889634)
ROUNDED = _coefficients(12582912.0, 1.4426950408889634)
EXP_DOUBLE = _coefficients(0.5, 0.16666666666666682, 0.04166666666666641, 0.008333333333318406, 0.0013888888889034138,
                           0.0001984126989365887, 2.4801587024602334e-05, 2.7557237126052946e-06, 2.755752633769534e-07,
                           2.511136404622323e-08, 2.0838614550920667e-09)
EXP = _coefficients(0.5, 0.1666666567325592, 0.041666459292173386, 0.00833358708769083, 0.0013935324968770146,
                    0.00019733213412109762)
LOG_DOUBLE = _coefficients(0.6666666666666666, 0.399999999999992, 0.285714285717034, 0.22222222176039108,
                           0.18181822566933334, 0.15384364411323728, 0.13342151152745754, 0.11579339042878495,
                           0.12641946677973448)
LOG = _coefficients(0.33333325386047363, -0.24999970197677612, 0.2000075876712799, -0.16669444739818573,
                    0.1426442414522171, -0.12412004917860031, 0.11293134838342667, -0.11106569319963455,
                    0.09506648778915405, -0.042166635394096375)
ATAN_DOUBLE = _coefficients(-0.33333333333333326, 0.1999999999999769, -0.14285714285390586, 0.11111111088340106,
                            -0.09090908150430978, 0.07692282892981459, -0.06666228751661067, 0.05877041419032631,
                            -0.05218531224000396, 0.045040671351029994, -0.033486552238691646, 0.015207478168289466)
ATAN = _coefficients(-0.33333316445350647, 0.19998487830162048, -0.14243824779987335, 0.10595833510160446,
                     -0.060830339789390564)
SINE = _coefficients(3.1415927410125732, -5.167712688446045, 2.5501625537872314, -0.5992020964622498,
                     0.08100184798240662)
COSINE = _coefficients(1.0, -4.934802055358887, 4.0587077140808105, -1.3350584506988525, 0.231429323554039)


@triton.jit
def polynomial(z, COEFFICIENTS: tl.constexpr):
    """c0 + z*(c1 + z*(...)), each step rounded once."""
    DEGREE: tl.constexpr = COEFFICIENTS[0]
    p = tl.full([], COEFFICIENTS[1], z.dtype)
    for i in tl.static_range(DEGREE):
        p = tl.fma(z, p, tl.full([], COEFFICIENTS[i + 2], z.dtype))
    return p


@triton.jit
def plus_multiple(c, a, FACTOR: tl.constexpr):
    """c + a*FACTOR, rounded once."""
    return tl.fma(a, tl.full([], FACTOR, a.dtype), c)


@triton.jit
def one_plus_multiple(a, FACTOR: tl.constexpr):
    """1 + a*FACTOR, rounded once."""
    return plus_multiple(tl.full([], 1.0, a.dtype), a, FACTOR)


@triton.jit
def div(a, b):
    """a / b, correctly rounded."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x):
    """Square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def power_of_two(n, dtype: tl.constexpr):
    """2**n for int32 n in the normal range of ``dtype``."""
    if dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_parts(x):
    """(n, r, q): exp(x) = 2**n * (1 + r + q) with |r| <= log(2)/2 and q = exp(r) - 1 - r; n is int32.

    The high part of n*log(2) is exact, fused or not, and so is its difference from x.
    """
    if x.dtype == tl.float64:
        shifted = polynomial(x, ROUNDED_DOUBLE)
        n = (shifted.to(tl.int64, bitcast=True) - 0x4338000000000000).to(tl.int32)
        k = shifted - 6755399441055744.0
        r = plus_multiple(plus_multiple(x, k, -6.93147180369123816490e-01), k, -1.90821492927058770002e-10)
        p = polynomial(r, EXP_DOUBLE)
    else:
        shifted = polynomial(x, ROUNDED)
        n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        k = shifted - 12582912.0
        r = plus_multiple(plus_multiple(x, k, -0.693359375), k, 2.12194440e-4)
        p = polynomial(r, EXP)
    return n, r, r * r * p


@triton.jit
def exp(x):
    """exp(x), with gradual underflow."""
    if x.dtype == tl.float64:
        n, r, q = exp_parts(tl.where(x < -750.0, -750.0, x))
        beyond = x > 710.0
    else:
        n, r, q = exp_parts(tl.where(x < -105.0, -105.0, x))
        beyond = x > 89.0
    half = n >> 1
    result = (1.0 + (r + q)) * power_of_two(half, x.dtype) * power_of_two(n - half, x.dtype)
    # Chosen, not left to the products: a GPU's multiplication may take a factor of 1/2 behind it before it overflows.
    return tl.where(beyond, float("inf"), result)


@triton.jit
def expm1_parts(x):
    """(n, r, q, p, e, tail): exp(x) = p * (1 + r + q) with p = 2**n, and exp(x) - 1 = e + tail where n <= 60."""
    if x.dtype == tl.float64:
        inner = tl.where(x > 710.0, 710.0, tl.where(x < -80.0, -80.0, x))
    else:
        inner = tl.where(x > 89.0, 89.0, tl.where(x < -40.0, -40.0, x))
    n, r, q = exp_parts(inner)
    half = n >> 1
    p = power_of_two(half, x.dtype) * power_of_two(n - half, x.dtype)
    # The three parts p - 1, p*r and p*q are added with the roundings kept.
    base = p - 1.0
    part = p * r
    partial = base + part
    rest = tl.fma(p, q, tl.where(n > 1, base - (partial - part), part - (partial - base)))
    e = partial + rest
    return n, r, q, p, e, rest - (e - partial)


@triton.jit
def expm1_and_excess(x):
    """(exp(x) - 1, exp(x) - 1 - x), the second without cancellation at small |x|."""
    n, r, q, p, e, _ = expm1_parts(x)
    # 2^128 overflows although half of it times 1 + r + q may not; from 2^60 on the 1 no longer counts.
    half = n >> 1
    large = (1.0 + (r + q)) * power_of_two(half, x.dtype) * power_of_two(n - half, x.dtype)
    result = tl.where(n > 60, large, e)
    return result, tl.where(n == 0, q, result - x)


@triton.jit
def expm1(x):
    """exp(x) - 1."""
    result, _ = expm1_and_excess(x)
    return result


@triton.jit
def log_parts(f, k):
    """log(1 + f) + k*log(2) for f in [-0.293, 0.5] and an integer-valued k of f's dtype."""
    if f.dtype == tl.float64:
        s = f / (2.0 + f)
        z = s * s
        p = polynomial(z, LOG_DOUBLE)
        square = 0.5 * f * f
        low = plus_multiple(s * tl.fma(z, p, square), k, 1.90821492927058770002e-10)
        return plus_multiple(f - (square - low), k, 6.93147180369123816490e-01)
    else:
        z = f * f
        p = polynomial(f, LOG)
        low = tl.fma(f * z, p, k * -2.12194440e-4)
        return plus_multiple(f + plus_multiple(low, z, -0.5), k, 0.693359375)


@triton.jit
def log(x):
    """log(x): -inf at 0, NaN below."""
    # The mantissa is brought to [sqrt(1/2), sqrt(2)) by shifting the bits of x by those of sqrt(1/2).
    if x.dtype == tl.float64:
        tiny = x < 2.2250738585072014e-308
        bits = tl.where(tiny, x * 18014398509481984.0, x).to(tl.int64, bitcast=True) + (
            0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
        k = ((bits >> 52) - 1023 - tl.where(tiny, 54, 0)).to(tl.float64)
        mantissa = ((bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).to(tl.float64, bitcast=True)
    else:
        tiny = x < 1.1754943508222875e-38
        bits = tl.where(tiny, x * 33554432.0, x).to(tl.int32, bitcast=True)
        bits = tl.add(bits, 0x3F800000 - 0x3F3504F3, sanitize_overflow=False)  # a NaN's may wrap: chosen away below
        k = ((bits >> 23) - 127 - tl.where(tiny, 25, 0)).to(tl.float32)
        mantissa = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    result = log_parts(mantissa - 1.0, k)
    result = tl.where(x > 0.0, result, tl.where(x == 0.0, float("-inf"), float("nan")))
    return tl.where(x == float("inf"), float("inf"), result)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [-0.5, 1]."""
    # log((1 + x)/2) + log 2 above 1/2 and log(2(1 + x)) - log 2 below -1/4: no rounding in forming the argument.
    high = x >= 0.5
    low = x < -0.25
    f = tl.where(high, 0.5 * (x - 1.0), tl.where(low, 1.0 + 2.0 * x, x))  # exact
    return log_parts(f, tl.where(high, 1.0, tl.where(low, -1.0, 0.0)).to(x.dtype))


@triton.jit
def sigmoid_parts(u):
    """(sigmoid(u), sigmoid(-u), log1p(exp(-|u|)))."""
    q = exp(-tl.abs(u))
    near = div(1.0, 1.0 + q)
    far = q * near
    positive = u >= 0.0
    return tl.where(positive, near, far), tl.where(positive, far, near), log1p(q)


@triton.jit
def logsigmoid(u):
    """log(sigmoid(u))."""
    return tl.where(u < 0.0, u, 0.0) - log1p(exp(-tl.abs(u)))


@triton.jit
def softplus(u):
    """log(1 + exp(u))."""
    return tl.where(u > 0.0, u, 0.0) + log1p(exp(-tl.abs(u)))


@triton.jit
def tanh_and_slope(x):
    """(tanh(x), 1 - tanh(x)^2), the second without cancellation."""
    _, _, _, _, e, tail = expm1_parts(-2.0 * tl.abs(x))
    denominator = 2.0 + e
    t = div(-e, denominator)
    # First-order corrections for the tail of e and the rounding of the denominator, whose inverse is w = (1 + t)/2.
    w = 0.5 + 0.5 * t
    t = tl.fma(-w, tl.fma(t, e - (denominator - 2.0), 2.0 * w * tail), t)
    ratio = div(1.0 + e, denominator)
    return tl.where(x < 0.0, -t, t), 4.0 * div(ratio, denominator)


@triton.jit
def atan(x):
    """atan(x)."""
    a = tl.abs(x)
    high = a > 2.414213562373095
    middle = a > 0.41421356237309503
    top = tl.where(high, -1.0, tl.where(middle, a - 1.0, a))
    bottom = tl.where(high, a, tl.where(middle, a + 1.0, 1.0)).to(x.dtype)
    v = div(top.to(x.dtype), bottom)
    z = v * v
    if x.dtype == tl.float64:
        p = polynomial(z, ATAN_DOUBLE)
        quarter = tl.full([], 0.7853981633974483, tl.float64)
        rest = tl.full([], 3.061616997868383e-17, tl.float64)
    else:
        p = polynomial(z, ATAN)
        quarter = tl.full([], 0.7853981852531433, tl.float32)
        rest = tl.full([], -2.185569414336896e-08, tl.float32)
    turns = tl.where(high, 2.0, tl.where(middle, 1.0, 0.0)).to(x.dtype)
    result = tl.fma(turns, quarter, v + tl.fma(v * z, p, turns * rest))
    return tl.where(x < 0.0, -result, result)


@triton.jit
def cos_sin_turns(k):
    """float32 (cos, sin) of 2*pi*(k + 1/2)*2^-24 for int32 k in [0, 2^24), reduced exactly in integers."""
    m = 2 * k + 1  # the angle in units of pi*2^-24
    quadrant = (m + 0x400000) >> 23
    theta = (m - (quadrant << 23)).to(tl.float32) * 5.9604644775390625e-08
    z = theta * theta
    s = theta * polynomial(z, SINE)
    c = polynomial(z, COSINE)
    odd = (quadrant & 1) == 1
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) == 2, -cosine, cosine)
    return cosine, tl.where((quadrant & 2) == 2, -sine, sine)
