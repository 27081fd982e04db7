"""Scalar bijections, applied to every element: exact log|f'|, domain and codomain, and -inf outside the support."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.flows.logdets import sum_event
from fastflow.nn.outputs import in_format_of
from fastflow.reference.rounding import just_below

__all__ = ["Affine", "Atan", "Exp", "LeakyReLU", "Log", "Logit", "Power", "ScalarTransform", "Sigmoid", "Softplus",
           "Tanh"]

INF = math.inf


def strictly_inside(values, low, high):
    """``values`` of the open interval (low, high) that rounding has carried to a finite end, back inside it.

    A sigmoid of 20 is 1 in float32, where neither an inverse nor a density has a finite value.
    """
    if math.isinf(low) and math.isinf(high):
        return values
    return values.clamp(None if math.isinf(low) else -just_below(-low, values.dtype),
                        None if math.isinf(high) else just_below(high, values.dtype))


class ScalarTransform(nn.Module):
    """z = f(x) element by element, for x (B, *event); named by its forward map f.

    Subclasses give ``f(x) -> (z, log|dz/dx|)`` and ``f_inverse(z) -> (x, log|dx/dz|)``, both on the inside of their
    intervals, in float32 or better. Outside the domain the log-determinant is -inf, so that log_prob is, with zero
    gradient; z is then the image of ``inner``. Images that round to a finite end of their interval stay just inside it.
    NaN passes through.

    Attributes:
        domain, codomain: (low, high), the open intervals that f maps onto each other.
        inner: a point of the domain whose image is none that a density may be infinite at, as 0 and 1 are for some.
    """

    domain = codomain = (-INF, INF)
    inner = 0.0

    def f(self, x):
        raise NotImplementedError

    def f_inverse(self, z):
        raise NotImplementedError

    def forward(self, x, context=None):
        """(z, logdet) of x (B, *event), logdet (B,) in nats; ``context`` is ignored."""
        return self._run("x", x, self.f, self.domain, self.codomain, lambda: self.inner)

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, *event)."""
        return self._run("z", z, self.f_inverse, self.codomain, self.domain, self._inner_image)

    @torch.no_grad()
    def _inner_image(self):
        return self.f(torch.tensor(self.inner, dtype=torch.float64))[0].item()

    @staticmethod
    def _run(name, x, function, interval, image, inner):
        checks.tensor(name, x)
        if x.dim() == 0:
            raise ValueError(f"{name}: expected shape (B, *event), got ()")
        (low, high), dtype = interval, x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        if (low, high) == (-INF, INF):
            y, slope = function(x)
        else:
            outside = (x <= low) | (x >= high)  # false for NaN, which passes through
            # A point inside stands in where x has left the domain, so that neither value nor gradient become NaN.
            y, slope = function(torch.where(outside, inner(), x))
            slope = torch.where(outside, -INF, slope)
        return in_format_of(x, strictly_inside(y.to(dtype), *image)), sum_event(slope)


def _number(name, value, *, positive=False):
    """A float parameter, finite and not zero, or positive."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value == 0 or (positive and value < 0):
        raise ValueError(f"{name}: expected a finite {'positive' if positive else 'non-zero'} number, got {value!r}")
    return float(value)


class Affine(ScalarTransform):
    """z = shift + scale * x.

    Args:
        shift, scale: numbers or tensors that broadcast against x.shape[1:]; scale without zeros. Kept as buffers; a
            Parameter stays a parameter.
    """

    def __init__(self, shift=0.0, scale=1.0):
        super().__init__()
        for name, value in (("shift", shift), ("scale", scale)):
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            else:
                self.register_buffer(name, torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor)
                                                           else torch.float64))
        if not self.scale.is_meta and bool((self.scale == 0).any()):
            raise ValueError("scale: expected values other than 0")

    def f(self, x):
        shift, scale = self._operands("x", x)
        return shift + scale * x, torch.log(scale.abs())

    def f_inverse(self, z):
        shift, scale = self._operands("z", z)
        return (z - shift) / scale, -torch.log(scale.abs())

    def _operands(self, name, x):
        try:
            return [t.to(x).expand(x.shape[1:]).expand(x.shape) for t in (self.shift, self.scale)]
        except RuntimeError as error:
            raise ValueError(f"{name}: expected shape (B, *event) that shift {tuple(self.shift.shape)} and scale "
                             f"{tuple(self.scale.shape)} broadcast against, got {tuple(x.shape)}") from error


class Log(ScalarTransform):
    """z = log(x) on (0, inf); Flow(Log(), base) is the law of x = exp(z), such as a log-normal."""

    domain, inner = (0.0, INF), 2.0

    def f(self, x):
        z = torch.log(x)
        return z, -z

    def f_inverse(self, z):
        return torch.exp(z), _finite_slope(z)


class Exp(ScalarTransform):
    """z = exp(x) onto (0, inf); Flow(Exp(), base) is the law of x = log(z) for a positive z."""

    codomain, inner = (0.0, INF), 0.3

    def f(self, x):
        return torch.exp(x), _finite_slope(x)

    def f_inverse(self, z):
        x = torch.log(z)
        return x, -x


def _finite_slope(x):
    """x, the log of exp's slope, where that is finite: an infinite one would make NaN of a zero density."""
    return torch.where(x == INF, -INF, x)


class Softplus(ScalarTransform):
    """z = log(1 + exp(x)) onto (0, inf), with log f' = logsigmoid(x)."""

    codomain, inner = (0.0, INF), 0.3

    def f(self, x):
        return -F.logsigmoid(-x), F.logsigmoid(x)  # softplus itself is cut off at 20

    def f_inverse(self, z):
        log_slope = torch.log(-torch.expm1(-z))
        return z + log_slope, -log_slope


class Sigmoid(ScalarTransform):
    """z = 1/(1 + exp(-x)) onto (0, 1), with log f' = logsigmoid(x) + logsigmoid(-x)."""

    codomain, inner = (0.0, 1.0), 0.3

    def f(self, x):
        return torch.sigmoid(x), F.logsigmoid(x) + F.logsigmoid(-x)

    def f_inverse(self, z):
        low, high = torch.log(z), torch.log1p(-z)
        return low - high, -(low + high)


class Logit(ScalarTransform):
    """z = logit(alpha + (1 - 2 alpha) x), from (0, 1), with alpha > 0 from a little more, onto the real line.

    Args:
        alpha: 0 <= alpha < 1/2; RealNVP's 0.05 keeps pixels in [0, 1] away from the infinities.

    References:
        Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803, section 4.1.
    """

    inner = 0.6

    def __init__(self, alpha=0.0):
        super().__init__()
        if not 0.0 <= alpha < 0.5:
            raise ValueError(f"alpha: expected 0 <= alpha < 0.5, got {alpha!r}")
        self.alpha = float(alpha)
        margin = self.alpha / (1.0 - 2.0 * self.alpha)
        self.domain = (-margin, 1.0 + margin)

    def f(self, x):
        y = self.alpha + (1.0 - 2.0 * self.alpha) * x
        low, high = torch.log(y), torch.log1p(-y)
        return low - high, math.log(1.0 - 2.0 * self.alpha) - low - high

    def f_inverse(self, z):
        x = (torch.sigmoid(z) - self.alpha) / (1.0 - 2.0 * self.alpha)
        return x, F.logsigmoid(z) + F.logsigmoid(-z) - math.log(1.0 - 2.0 * self.alpha)

    def extra_repr(self):
        return f"alpha={self.alpha}"


class Tanh(ScalarTransform):
    """z = tanh(x) onto (-1, 1), with log f' = 2 (log 2 - |x| - log1p(exp(-2 |x|)))."""

    codomain, inner = (-1.0, 1.0), 0.3

    def f(self, x):
        size = x.abs()
        return torch.tanh(x), 2.0 * (math.log(2.0) - size - torch.log1p(torch.exp(-2.0 * size)))

    def f_inverse(self, z):
        low, high = torch.log1p(z), torch.log1p(-z)
        return 0.5 * (low - high), -(low + high)


class Atan(ScalarTransform):
    """z = atan(x) onto (-pi/2, pi/2), with log f' = -log(1 + x^2)."""

    codomain, inner = (-math.pi / 2, math.pi / 2), 0.3

    def f(self, x):
        return torch.atan(x), -_log_one_plus_square(x)

    def f_inverse(self, z):
        x = torch.tan(z)
        return x, _log_one_plus_square(x)


def _log_one_plus_square(x):
    """log(1 + x^2) without overflow."""
    large = x.abs() > 1.0
    near, far = torch.where(large, 0.0, x), torch.where(large, x, 1.0)
    return torch.where(large, 2.0 * torch.log(far.abs()) + torch.log1p(far**-2), torch.log1p(near * near))


class Power(ScalarTransform):
    """z = x^exponent on (0, inf), with log f' = log|exponent| + (exponent - 1) log x.

    Args:
        exponent: finite and not 0.
    """

    domain = codomain = (0.0, INF)
    inner = 0.7

    def __init__(self, exponent):
        super().__init__()
        self.exponent = _number("exponent", exponent)

    def f(self, x):
        return x**self.exponent, math.log(abs(self.exponent)) + (self.exponent - 1.0) * torch.log(x)

    def f_inverse(self, z):
        power = 1.0 / self.exponent
        return z**power, math.log(abs(power)) + (power - 1.0) * torch.log(z)

    def extra_repr(self):
        return f"exponent={self.exponent}"


class LeakyReLU(ScalarTransform):
    """z = x above zero, negative_slope * x below.

    Args:
        negative_slope: positive.
    """

    def __init__(self, negative_slope=0.01):
        super().__init__()
        self.negative_slope = _number("negative_slope", negative_slope, positive=True)

    def f(self, x):
        return self._bend(x, self.negative_slope)

    def f_inverse(self, z):
        return self._bend(z, 1.0 / self.negative_slope)

    @staticmethod
    def _bend(x, slope):
        below = x < 0
        return torch.where(below, slope * x, x), torch.where(below, math.log(slope), torch.zeros_like(x))

    def extra_repr(self):
        return f"negative_slope={self.negative_slope}"
