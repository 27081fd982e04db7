"""Cumulative distribution functions as transforms: any torch.distributions law to the unit interval and back."""

import math

import torch
from torch import nn
from torch.distributions import Distribution, MixtureSameFamily, transform_to

from fastflow import checks
from fastflow.flows.base import to_support, unchecked
from fastflow.flows.logdets import sum_event
from fastflow.flows.scalar import strictly_inside

__all__ = ["CDF", "Quantile"]


class CDF(nn.Module):
    """z = F(x), element by element, with log F' = log p: the law of ``distribution`` becomes uniform on (0, 1).

    The inverse is the distribution's icdf where it has one; else F(x) = z is solved by bisection, and differentiated by
    the implicit function theorem. Outside the support, or for z outside (0, 1), the log-determinant is -inf.

    Args:
        distribution: a continuous torch.distributions object over scalars, with a cdf; its batch shape broadcasts
            against x.shape[1:]. Its parameters may require gradients.

    Raises:
        TypeError: not such a distribution.
    """

    def __init__(self, distribution):
        super().__init__()
        if not isinstance(distribution, Distribution) or distribution.event_shape or distribution.support.is_discrete:
            raise TypeError(f"distribution: expected a continuous torch.distributions object over scalars, got "
                            f"{distribution!r}")
        if isinstance(distribution, MixtureSameFamily):
            ends = distribution.mixture_distribution.probs.new_ones(distribution.component_distribution.batch_shape)
            values = transform_to(distribution.support.base_constraint)(torch.stack([-ends, ends]))
            if not (values == values[..., :1]).all():
                raise TypeError(f"distribution: expected a mixture whose components share one support, got "
                                f"{distribution!r}")
        try:
            with torch.no_grad():
                self._sample = distribution.sample()  # for its dtype and dimensions
                distribution.cdf(self._sample)
        except NotImplementedError as error:
            raise TypeError(f"distribution: expected one with a cdf, got {distribution!r}") from error
        self.distribution = distribution

    def forward(self, x, context=None):
        """(z, logdet) of x (B, *event), logdet (B,) in nats; ``context`` is ignored."""
        checks.tensor("x", x)
        x, law = x.to(torch.promote_types(x.dtype, torch.float32)), unchecked(self.distribution)
        outside = ~(law.support.check(x) | torch.isnan(x)) | torch.isinf(x)
        safe = torch.where(outside, self._inner(x), x)
        missing = torch.isnan(safe)
        safe = torch.where(missing, self._inner(x), safe)
        z, slope = strictly_inside(law.cdf(safe), 0.0, 1.0), law.log_prob(safe)
        slope = torch.where(outside, -math.inf, slope)
        total = sum_event(torch.where(missing, math.nan, slope))
        if x.dim() > 1:  # beside an element outside an infinite density of another counts nothing
            total = torch.where(outside.flatten(1).any(1) & ~missing.flatten(1).any(1), -math.inf, total)
        return torch.where(missing, math.nan, z), total

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, *event)."""
        checks.tensor("z", z)
        law = unchecked(self.distribution)
        dtype = torch.promote_types(torch.result_type(z, self._sample), torch.float32)
        missing, outside = torch.isnan(z), (z <= 0.0) | (z >= 1.0)
        safe = torch.where(outside | missing, 0.4, z).to(dtype)  # not the median, at which a density may be infinite
        try:
            # In float64, because near 0 torch's icdf of a normal law has no digits in float32.
            with torch.no_grad():  # where it has no finite value even so, z is as good as at its end
                outside = outside | ~torch.isfinite(law.icdf(safe.double()).to(dtype))
            x = law.icdf(torch.where(outside, 0.4, safe).double()).to(dtype)
        except NotImplementedError:
            x = _solve(law, safe)
        slope = torch.where(outside, -math.inf, -law.log_prob(x))
        return torch.where(missing, math.nan, x), sum_event(torch.where(missing, math.nan, slope))

    def _inner(self, like):
        return to_support(self.distribution.support)(torch.zeros_like(like))


def _solve(law, z):
    """x with F(x) = z."""
    value_of = to_support(law.support)
    with torch.no_grad():
        # In the unconstrained u, of which x is a monotone function, for every support alike; without asking the device.
        low, high = torch.full_like(z, -1.0), torch.full_like(z, 1.0)
        sign = torch.where((value_of(high) > value_of(low)).all(), 1.0, -1.0)
        for _ in range(12):
            low = torch.where(law.cdf(value_of(sign * low)) > z, 2.0 * low, low)
            high = torch.where(law.cdf(value_of(sign * high)) < z, 2.0 * high, high)
        for _ in range(64 if z.dtype == torch.float64 else 40):
            middle = 0.5 * (low + high)
            above = law.cdf(value_of(sign * middle)) > z
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        x = value_of(sign * (0.5 * (low + high)))
    # Newton's steps don't move x any more, but each makes one more order of its derivatives those of the implicit
    # function.
    for _ in range(2):
        x = x - (law.cdf(x) - z) / torch.exp(law.log_prob(x))
    return x


class Quantile(nn.Module):
    """z = F^-1(x), the inverse of :class:`CDF`: uniform x on (0, 1) become a sample of ``distribution``."""

    def __init__(self, distribution):
        super().__init__()
        self.cdf = CDF(distribution)

    def forward(self, x, context=None):
        """(z, logdet) of x (B, *event) with values in (0, 1)."""
        return self.cdf.inverse(x)

    def inverse(self, z, context=None):
        """(x, logdet) of z (B, *event)."""
        return self.cdf(z)
