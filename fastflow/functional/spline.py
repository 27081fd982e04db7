"""Monotonic splines: the public operation."""

import math

from fastflow import backends, checks, reference
from fastflow.autograd import spline as _spline
from fastflow.autograd.differentiable import apply, distinct, needs_grad

__all__ = ["check_spline_constants", "spline", "spline_params"]


def spline(x, params, *, kind="rq", tail_bound=3.0, tails="linear", min_width=1e-3, min_height=1e-3,
           min_derivative=1e-3, gain=1.0, clamp=None, end_derivative=1.0, inverse=False, logdet=None):
    """A monotonic spline per element, its parameters from a conditioner, and its log-determinant in one pass.

    On [-B, B], B = tail_bound, f runs through K + 1 knots, the first (-B, -B), the last (B, B). With linear tails it is
    the identity outside, with log-slope 0. "circular" ones make x an angle of period 2B, wrapped into [-B, B) first.
    Without tails, None, f is a map of the interval alone: outside its log-slope is -inf. With raw widths u, heights v
    and slopes d of an element, the bins are

        w = 2B (min_width + (1 - K min_width) softmax(gain u))        wide,
        h = 2B (min_height + (1 - K min_height) softmax(gain v))      high,

    and for "rq" the slopes at inner knots min_derivative + softplus(d). At both ends they are end_derivative with
    linear tails, else learned like those between: on a circle one for both, as B and -B are one point, without tails
    one each, so that a density may be anything at the edge of a box. Within a bin from (x0, y0) with slopes d0 and d1,
    s = h/w and t = (x - x0)/w,

        "rq"      f = y0 + h (s t^2 + d0 t (1 - t)) / (s + (d0 + d1 - 2s) t (1 - t)),
        "linear"  f = y0 + s (x - x0), all bins 2B/K wide.

    ``inverse`` undoes exactly that. With ``clamp`` c, raws are softly bounded first, widths and heights as
    r/(1 + 2|r|/c) after the gain, slopes as r/(1 + |r|/c), and inner slopes are min_derivative + exp of the latter:
    zuko's form, with c = -log(1e-3), B = 5 and all minima 0. nflows' is gain = 1/sqrt(hidden features) where its layers
    scale so. Pyro's end_derivative is 0.999; other than 1 it leaves kinks at -B and B.

    Args:
        x: (B, C, *S), any strides, S possibly empty.
        params: (B, C*P, *S) straight from the conditioner; those of channel c are channels c*P ... c*P + P - 1: K raw
            widths, K raw heights, K - 1 raw slopes for "rq" (P = 3K - 1), K raw heights for "linear" (P = K).
            Circular: K raw slopes, the first that of both ends (P = 3K). Without tails: K + 1, from end to end
            (P = 3K + 1).
        kind: "rq" or "linear".
        tail_bound: B > 0.
        tails: "linear", "circular" or None, the last two for "rq" alone, whose slopes are continuous. They have no
            kernels: every backend leaves them to the reference.
        min_width, min_height: least size of a bin as a share of 2B, 0 <= min < 1/K.
        min_derivative: least slope at a knot, >= 0.
        gain, clamp: see above; clamp None or positive.
        end_derivative: slope at -B and B from inside, > 0; 1 where the tails are not linear.
        inverse: compute the inverse map.
        logdet: (B,) running log-determinant in nats, added to the result, differentiable, never written in place.

    Returns:
        y: (B, C, *S) in x's dtype, float32 if any operand is, in x's memory format.
        logdet: (B,) in nats, float64 for float64 operands, else float32.
        NaN counts as inside the interval, infinities as outside; as angles they are NaN. Where the tails are not
        linear y is strictly inside, in [-B, B) even for what rounds to B; without tails that of an x outside is f(0)
        of raw zeros, its gradient 0.

    Raises:
        ValueError: a shape, device or option does not fit; the message names the argument.
        RuntimeError: use_backend asks for a kernel and the tails are not linear.
        TypeError: not a tensor, a dtype that is not floating, or float64 mixed with a lower dtype.

    References:
        Durkan et al., "Neural spline flows", 2019, arXiv:1906.04032 (rational-quadratic, after Gregory and Delbourgo,
        1982).
        Mueller et al., "Neural importance sampling", 2019, arXiv:1808.03856 (linear).
        Rezende et al., "Normalizing flows on tori and spheres", 2020, arXiv:2002.02428 (circles).
    """
    checks.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, *S), got {tuple(x.shape)}")
    _check_tails(kind, tails)
    checks.tensor("params", params)
    n_bins = _check_spline_params(x, params, kind, tails)
    checks.same_device("params", params, "x", x)
    check_spline_constants(n_bins, kind, tail_bound, min_width, min_height, min_derivative, gain, clamp,
                           end_derivative, tails)
    named = [("x", x), ("params", params)]
    logdet = checks.with_running_logdet(named, logdet, x)

    backend = backends.choose("spline", x, params, logdet, tails=tails)
    if backend == "reference":
        return reference.spline(x, params, kind=kind, tail_bound=tail_bound, tails=tails, min_width=min_width,
                                min_height=min_height, min_derivative=min_derivative, gain=gain, clamp=clamp,
                                end_derivative=end_derivative, inverse=inverse, logdet=logdet)
    consts = (reference.SPLINES.index(kind), bool(inverse), float(tail_bound), float(min_width), float(min_height),
              float(min_derivative), float(gain), _spline.NO_CLAMP if clamp is None else float(clamp),
              float(end_derivative))
    if needs_grad(x, params, logdet):
        return apply(_spline.SplineFunction, *distinct(x, params, logdet), backend, consts)
    return _spline.forward(backend, x, params, logdet, consts)


def _check_tails(kind, tails):
    checks.choice("kind", kind, reference.SPLINES)
    checks.choice("tails", tails, reference.TAILS)
    if kind != "rq" and tails != "linear":
        raise ValueError(f"tails: expected 'linear' for kind {kind!r}, which has no slopes at its knots, got {tails!r}")


def _check_spline_params(x, params, kind, tails):
    """The number of bins that the params stand for."""
    channels = x.shape[1]
    per_element, rest = (
        (params.shape[1] // channels, params.shape[1] % channels) if channels and params.dim() > 1 else (0, 0))
    n_bins = reference.spline_bins(kind, per_element, tails) if channels else 1
    wanted = (x.shape[0], params.shape[1] if params.dim() > 1 else 0, *x.shape[2:])
    if n_bins is None or rest or tuple(params.shape) != wanted or not channels and wanted[1]:
        per = {"linear": "3K - 1", "circular": "3K", None: "3K + 1"}[tails] if kind == "rq" else "K"
        raise ValueError(f"params: expected shape {(x.shape[0], f'{channels}*({per})', *x.shape[2:])} for x of shape "
                         f"{tuple(x.shape)}, kind {kind!r} and tails {tails!r}, got {tuple(params.shape)}")
    return n_bins


def spline_params(kind, n_bins, tails="linear"):
    """The raw parameters of one element for :func:`spline`: 3*n_bins - 1 for "rq", with circular tails 3*n_bins,
    without tails 3*n_bins + 1; n_bins for "linear".

    Raises:
        ValueError: unknown kind or tails, tails that the kind has not, or ``n_bins`` is not a positive int.
    """
    _check_tails(kind, tails)
    n_bins = checks.count("n_bins", n_bins, 1)
    return reference.spline_params(kind, n_bins, tails)


def check_spline_constants(n_bins, kind, tail_bound, min_width, min_height, min_derivative, gain, clamp,
                           end_derivative=1.0, tails="linear"):
    """ValueError that names the constant of :func:`spline` that does not fit."""
    _check_tails(kind, tails)
    for name, value, fits, wanted in (
            ("tail_bound", tail_bound, lambda v: v > 0, "a positive number"),
            ("min_width", min_width, lambda v: v >= 0 and v * n_bins < 1, f"at least 0 and below 1/{n_bins}"),
            ("min_height", min_height, lambda v: v >= 0 and v * n_bins < 1, f"at least 0 and below 1/{n_bins}"),
            ("min_derivative", min_derivative, lambda v: v >= 0, "a non-negative number"),
            ("gain", gain, lambda v: True, "a finite number"),
            ("clamp", 1.0 if clamp is None else clamp, lambda v: v > 0, "None or a positive number"),
            ("end_derivative", end_derivative, lambda v: v > 0, "a positive number")):
        checks.number(name, value)
        if not (abs(value) < math.inf and fits(value)):
            raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    if tails != "linear" and end_derivative != 1.0:
        raise ValueError(f"end_derivative: expected 1, because with tails {tails!r} the slopes at the ends are params, "
                         f"got {end_derivative!r}")
