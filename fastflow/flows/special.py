"""Special functions whose large terms cancel in closed form, not in rounded arithmetic."""

import math

import torch

__all__ = ["STIRLING_FROM", "log1p_ratio", "log_gamma_half_step", "log_ndtri", "stirling_tail"]

STIRLING_FROM = 64.0  # where the terms that Stirling's series is cut to have float64's precision


def log1p_ratio(t):
    """log(1 + t) / t for t >= 0."""
    near = t < 1e-5
    far = torch.where(near, 1.0, t)
    return torch.where(near, 1.0 - t * (0.5 - t / 3.0), torch.log1p(far) / far)


def stirling_tail(inverse):
    """log Gamma(a) - (a - 1/2) log a + a - log(2 pi)/2 of 1/a, for a of STIRLING_FROM or more."""
    square = inverse * inverse
    return inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square / 1260.0))


def log_gamma_half_step(log_a):
    """log of Gamma(a + 1/2) / (Gamma(a) sqrt(a)) of log a; it goes to 0 as a grows."""
    large = log_a > math.log(STIRLING_FROM)
    near = torch.where(large, 0.0, log_a)
    a = torch.exp(near)
    exact = torch.lgamma(a + 0.5) - torch.lgamma(a) - 0.5 * near
    inverse = torch.exp(-torch.where(large, log_a, math.log(STIRLING_FROM)))
    half = 0.5 * inverse
    series = 0.5 * (log1p_ratio(half) - 1.0) + stirling_tail(inverse / (1.0 + half)) - stirling_tail(inverse)
    return torch.where(large, series, exact)


def log_ndtri(log_p):
    """The standard normal's quantile of p, from log p in float64: also where p itself would underflow."""
    near = log_p > -600.0
    safe = torch.where(near, -600.0, log_p)
    with torch.no_grad():
        x = torch.sqrt(-2.0 * safe)
        x = -torch.sqrt(-2.0 * safe - math.log(2.0 * math.pi) - 2.0 * torch.log(x))
    # Newton's steps; of the last ones each makes one more derivative that of the implicit function.
    for differentiated in (False, False, True, True):
        with torch.set_grad_enabled(differentiated and torch.is_grad_enabled()):
            log_mass = torch.special.log_ndtr(x)
            slope = torch.exp(-0.5 * x * x - 0.5 * math.log(2.0 * math.pi) - log_mass)
            x = x - (log_mass - safe) / slope
    return torch.where(near, torch.special.ndtri(torch.exp(torch.where(near, log_p, -1.0))), x)
