"""Base distributions with parameters: Gaussians of every kind, mixtures, bounded and heavy-tailed laws.

Each has ``event_shape``, ``log_prob(z, temperature=1.0)`` (B,) in nats, and ``sample(n, generator=, temperature=)``
(n, *event_shape), reparameterised: gradients reach loc and scale through samples. Temperature scales the spread around
loc where that stays in the family, and is refused elsewhere. Those with ``conditional = True`` also take ``context=``,
one for each z, which a Flow hands on.
"""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.draws import choose
from fastflow.flows.base import HALF_LOG_TWO_PI, Base, as_base
from fastflow.flows.labels import check_labels
from fastflow.flows.logdets import sum_event
from fastflow.flows.special import log1p_ratio, log_gamma_half_step, log_ndtri

__all__ = ["ClassConditionalNormal", "ConditionalNormal", "DiagonalNormal", "FullNormal", "Mixture", "StudentT",
           "TruncatedNormal", "Uniform"]


def _shared(event_shape, per_channel):
    """The shape of the parameters."""
    return (event_shape[0], *(1 for _ in event_shape[1:])) if per_channel else tuple(event_shape)


def _whole(parameter):
    """A parameter in float32 at least."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _normal_log_prob(z, loc, log_scale, temperature):
    standard = (z - loc) * torch.exp(-log_scale) / temperature
    return sum_event(-0.5 * standard.square() - log_scale - HALF_LOG_TWO_PI - math.log(temperature))


class DiagonalNormal(Base):
    """N(loc, diag(exp(2 log_scale))), both learned, N(0, I) at first.

    Args:
        event_shape: of one z.
        per_channel: whether all positions of a channel, along dim 1 of z (B, C, *S), share them: the prior that Glow
            learns for its last latents.
    """

    def __init__(self, event_shape, *, per_channel=False):
        super().__init__(event_shape)
        shape = _shared(self.event_shape, per_channel)
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def log_prob(self, z, temperature=1.0):
        return _normal_log_prob(self._checked(z), self.loc, self.log_scale, temperature)

    def sample(self, n, *, generator=None, temperature=1.0):
        return self.loc + temperature * torch.exp(self.log_scale) * self._noise(n, self.loc, generator)


class FullNormal(Base):
    """N(loc, L L') over (B, D), L lower triangular with diagonal exp(log_diagonal); N(0, I) at first."""

    def __init__(self, features):
        features = checks.count("features", features, 1)
        super().__init__(features)
        self.loc = nn.Parameter(torch.zeros(features))
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.log_diagonal = nn.Parameter(torch.zeros(features))

    @property
    def scale_tril(self):
        return torch.tril(self.lower, -1) + torch.diag(torch.exp(self.log_diagonal))

    def covariance(self):
        return self.scale_tril @ self.scale_tril.mT

    def log_prob(self, z, temperature=1.0):
        z = self._checked(z)
        infinite = torch.isinf(z)  # of which the solution would make NaN
        centred = (torch.where(infinite, 0.0, z) - self.loc) / temperature
        standard = torch.linalg.solve_triangular(self.scale_tril.to(centred.dtype), centred.mT, upper=False)
        constant = self.log_diagonal.sum() + len(self.loc) * (HALF_LOG_TWO_PI + math.log(temperature))
        value = -0.5 * standard.square().sum(0) - constant
        return torch.where(infinite.any(1) & ~torch.isnan(value), -math.inf, value)

    def sample(self, n, *, generator=None, temperature=1.0):
        noise = self._noise(n, self.loc, generator)
        return self.loc + temperature * noise @ self.scale_tril.mT.to(noise.dtype)


class ConditionalNormal(Base):
    """N(mean(context), diag(sigma(context)^2)): ``network`` maps the context to mean and r packed along dim 1, mean
    first, and log sigma = 5 tanh(r / 5).

    Args:
        event_shape: of one z, (D, *S).
        network: module from (B, ...) to (B, 2D, *S).
    """

    conditional = True

    def __init__(self, event_shape, network):
        super().__init__(event_shape)
        self.network = network

    def _moments(self, context):
        if context is None:
            raise ValueError(f"context: expected a tensor for a base of type {type(self).__name__}, got None")
        params = self.network(context)
        checks.shape("network output", params, (len(context), 2 * self.event_shape[0], *self.event_shape[1:]))
        mean, raw = params.chunk(2, 1)
        return mean, 5.0 * torch.tanh(raw / 5.0)

    def log_prob(self, z, temperature=1.0, *, context=None):
        return _normal_log_prob(self._checked(z), *self._moments(context), temperature)

    def sample(self, n, *, generator=None, temperature=1.0, context=None):
        mean, log_scale = self._moments(context)
        return mean + temperature * torch.exp(log_scale) * self._noise(n, mean, generator)


class ClassConditionalNormal(Base):
    """A DiagonalNormal for each class; the context is the classes (B,) int64.

    Args:
        event_shape: of one z.
        n_classes: number of classes.
        per_channel: as of :class:`DiagonalNormal`; the prior of a class-conditional Glow.
    """

    conditional = True

    def __init__(self, event_shape, n_classes, *, per_channel=False):
        super().__init__(event_shape)
        if n_classes < 1:
            raise ValueError(f"n_classes: expected a positive int, got {n_classes!r}")
        shape = _shared(self.event_shape, per_channel)
        self.loc = nn.Parameter(torch.zeros(n_classes, *shape))
        self.log_scale = nn.Parameter(torch.zeros(n_classes, *shape))

    def _moments(self, context):
        if not isinstance(context, torch.Tensor) or context.dtype != torch.int64 or context.dim() != 1:
            raise ValueError("context: expected the classes (B,) int64, got "
                             + (f"{context.dtype} {tuple(context.shape)}" if isinstance(context, torch.Tensor)
                                else type(context).__name__))
        check_labels("context", context, len(self.loc), "n_classes", 0)
        return self.loc[context], self.log_scale[context]

    def log_prob(self, z, temperature=1.0, *, context=None):
        return _normal_log_prob(self._checked(z), *self._moments(context), temperature)

    def sample(self, n, *, generator=None, temperature=1.0, context=None):
        loc, log_scale = self._moments(context)
        return loc + temperature * torch.exp(log_scale) * self._noise(n, loc, generator)


class Mixture(Base):
    """sum_k w_k p_k(z) with learned weights, softmax(logits), equal at first; with conditional components or weights
    sum_k w_k(context) p_k(z | context), the law of a mixture density network.

    Samples are reparameterised within a component; the choice of one carries no gradient, so none reaches the weights
    through samples.

    Args:
        components: bases of one event shape, conditional or not; modules among them become submodules.
        weights: network from the context (B, ...) to logits (B, K) of the K components; None for the learned logits.

    References:
        Bishop, "Mixture density networks", 1994, NCRG/94/004.
    """

    def __init__(self, components, weights=None):
        bases = [as_base(c) for c in components]
        if not bases:
            raise ValueError("components: expected at least one base")
        shapes = {tuple(b.event_shape) for b in bases}
        if len(shapes) > 1:
            raise ValueError(f"components: expected one event shape, got {sorted(shapes)}")
        super().__init__(bases[0].event_shape)
        self.components = bases
        self.modules_of_components = nn.ModuleList(b for b in bases if isinstance(b, nn.Module))
        self.weights = weights
        self.logits = nn.Parameter(torch.zeros(len(bases))) if weights is None else None
        self.conditional = weights is not None or any(getattr(b, "conditional", False) for b in bases)

    def log_prob(self, z, temperature=1.0, *, context=None):
        weights = torch.log_softmax(self._logits(context), -1)
        each = torch.stack([b.log_prob(self._checked(z), temperature, **_context_of(b, context))
                            for b in self.components])
        outside = torch.isneginf(each).all(0)  # of all components, where a logsumexp has NaN for a gradient
        weights = weights[:, None] if weights.dim() == 1 else weights.mT
        total = torch.logsumexp(weights + torch.where(outside, 0.0, each), 0)
        return torch.where(outside, -torch.inf, total)

    def sample(self, n, *, generator=None, temperature=1.0, context=None):
        if context is not None and len(context) != n:
            raise ValueError(f"context: expected {n} of them, one for each sample, got {len(context)}")
        logits = self._logits(context)
        weights = torch.softmax(logits, -1)
        chosen = choose(weights, n, generator) if logits.dim() == 1 else choose(weights, 1, generator)[:, 0]
        parts = []
        for k, base in enumerate(self.components):
            own = {} if context is None else _context_of(base, context[chosen == k])
            parts.append(as_base(base, logits).sample(int((chosen == k).sum()), generator=generator,
                                                      temperature=temperature, **own))
        order = torch.argsort(torch.argsort(chosen, stable=True))
        return torch.cat(parts)[order.to(parts[0].device)]

    def _logits(self, context):
        """(K,), or (B, K) where the context makes them."""
        if self.conditional and context is None:
            raise ValueError(f"context: expected a tensor for a base of type {type(self).__name__}, got None")
        if not self.conditional and context is not None:
            raise ValueError(f"context: expected None, because neither components nor weights are conditional, got "
                             f"shape {tuple(context.shape)}")
        if self.weights is None:
            return self.logits
        logits = self.weights(context)
        checks.shape("weights output", logits, (len(context), len(self.components)))
        return _whole(logits)


def _context_of(base, context):
    """The keyword arguments with which a component gets the context."""
    return {"context": context} if getattr(base, "conditional", False) else {}


class Uniform(Base):
    """Uniform on the box low <= z < high.

    Args:
        low, high: numbers or tensors that broadcast to event_shape, fixed. A number has its digits in whatever dtype
            the module is moved to.
        event_shape: of one z; default that of low and high.
    """

    def __init__(self, low, high, event_shape=None):
        self._numbers = {name: end for name, end in (("low", low), ("high", high)) if isinstance(end, (int, float))}
        low, high = torch.broadcast_tensors(*(torch.as_tensor(t, dtype=torch.get_default_dtype())
                                              if not isinstance(t, torch.Tensor) else t for t in (low, high)))
        super().__init__(low.shape if event_shape is None else event_shape)
        self.register_buffer("low", low.expand(self.event_shape).clone())
        self.register_buffer("high", high.expand(self.event_shape).clone())
        if not bool((self.low < self.high).all()):
            raise ValueError("low: expected values below high")

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self._numbers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new, number = getattr(self, name), self._numbers[name]
            if new.dtype != old.dtype and not old.is_meta and bool((old == torch.full_like(old, number)).all()):
                new.fill_(number)
        return self

    def log_prob(self, z, temperature=1.0):
        self._refuse_temperature(temperature)
        z = self._checked(z)
        inside = (z >= self.low) & (z < self.high)
        value = torch.where(inside, -torch.log(_whole(self.high) - _whole(self.low)), -math.inf)
        return sum_event(torch.where(torch.isnan(z), math.nan, value))

    def sample(self, n, *, generator=None, temperature=1.0):
        self._refuse_temperature(temperature)
        z = self.low + (self.high - self.low) * self._noise(n, self.low, generator, torch.rand)
        return torch.minimum(z, torch.nextafter(self.high.to(z), self.low.to(z)))  # rounding may carry it to the end


class TruncatedNormal(Base):
    """N(loc, scale^2) cut to [low, high] in every dimension and renormalised, loc and log_scale learned.

    Args:
        low, high: numbers, low < high; infinities for one open side.
        event_shape: of one z.
    """

    def __init__(self, low, high, event_shape):
        super().__init__(event_shape)
        if not low < high:
            raise ValueError(f"low: expected a number below high {high!r}, got {low!r}")
        self.low, self.high = float(low), float(high)
        start = min(max(0.0, self.low), self.high)
        self.loc = nn.Parameter(torch.full(self.event_shape, start))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def _edges(self, scale):
        # An open side is a constant: its difference to loc would have NaN gradients.
        low, high = ((edge - self.loc) / scale if math.isfinite(edge) else torch.full_like(scale, edge)
                     for edge in (self.low, self.high))
        # Mirrored where the interval lies above loc: log Phi is accurate in the lower tail alone.
        mirrored = low > 0
        return torch.where(mirrored, -high, low), torch.where(mirrored, -low, high), mirrored

    @staticmethod
    def _log_mass(low, high):
        above, below = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        return above, above + torch.log1p(-torch.exp(below - above))

    def log_prob(self, z, temperature=1.0):
        z, scale = self._checked(z), torch.exp(_whole(self.log_scale)) * temperature
        narrow = self._narrow(scale)
        wide = scale if narrow is None else torch.where(narrow, self.high - self.low, scale)
        low, high, _ = self._edges(wide)
        value = -0.5 * ((z - self.loc) / wide).square() - HALF_LOG_TWO_PI - torch.log(wide)
        value = value - self._log_mass(low, high)[1]
        if narrow is not None:
            value = torch.where(narrow, self._log_prob_of_narrow(z, scale, narrow), value)
        return sum_event(torch.where((z < self.low) | (z > self.high), -math.inf, value))

    def _narrow(self, scale):
        """Where the density is nearly that of a uniform law, its mass the difference of nearly equal numbers; None
        where a side is open."""
        if math.isinf(self.high - self.low):
            return None
        half, centre = 0.5 * (self.high - self.low) / scale, 0.5 * (self.high + self.low)
        return (half < 0.05) & (half * ((centre - self.loc) / scale).abs() < 0.05)

    def _log_prob_of_narrow(self, z, scale, narrow):
        """With c the interval's centre and h its half width, both standardised: log of exp(-(z^2 - c^2)/2), less the
        log of its mean over the interval, a series in h^2 and (c h)^2."""
        width, centre = self.high - self.low, 0.5 * (self.high + self.low)
        scale = torch.where(narrow, scale, 16.0 * width)
        loc = torch.where(narrow, self.loc, centre)
        h2, c2 = (0.5 * width / scale).square(), ((centre - loc) / scale).square()
        mean = h2 / 3.0 * 0.5 * (c2 - 1.0) + h2.square() / 5.0 * (c2 * (c2 / 24.0 - 0.25) + 0.125) + h2**3 / 7.0 * (
            c2 * (c2 * (c2 / 720.0 - 1.0 / 48.0) + 0.0625) - 1.0 / 48.0)
        tilt = 0.5 * ((z - centre) / scale) * ((z + centre - 2.0 * loc) / scale)
        return -tilt - math.log(width) - torch.log1p(mean)

    def sample(self, n, *, generator=None, temperature=1.0):
        if temperature == 0.0:  # where an end at loc would be 0/0 of scales away
            return _whole(self.loc).clamp(self.low, self.high).repeat(n, *[1] * self.loc.dim())
        scale = torch.exp(_whole(self.log_scale)) * temperature
        low, high, mirrored = self._edges(scale)
        u = self._noise(n, self.loc, generator, torch.rand).double() + 2.0**-25  # never 0, whose quantile may be -inf
        low, high = low.double(), high.double()
        above, below = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
        standard = log_ndtri(above + torch.log1p((1.0 - u) * torch.expm1(below - above)))
        standard = torch.minimum(torch.maximum(standard, low), high)
        z = self.loc + scale * torch.where(mirrored, -standard, standard).to(scale.dtype)
        return z.clamp(self.low, self.high)


class StudentT(Base):
    """Student's t with learned degrees of freedom, loc and scale in every dimension: heavier tails than a Gaussian's.

    Args:
        event_shape: of one z.
        df: degrees of freedom at first, positive.
    """

    def __init__(self, event_shape, df=5.0):
        super().__init__(event_shape)
        if not 0.0 < df < math.inf:
            raise ValueError(f"df: expected a finite positive number, got {df!r}")
        self.log_df = nn.Parameter(torch.full(self.event_shape, math.log(df)))
        self.loc = nn.Parameter(torch.zeros(self.event_shape))
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def log_prob(self, z, temperature=1.0):
        log_scale, log_df = self.log_scale + math.log(temperature), _whole(self.log_df)
        square = ((self._checked(z) - self.loc) * torch.exp(-log_scale)).square()
        ratio = square * torch.exp(-log_df)
        growth, near = torch.log1p(ratio), ratio < 1.0
        # df log(1 + square/df), as a square times a number near 1 where that is small: df itself may overflow.
        tail = torch.where(near, torch.where(near, square, 0.0) * log1p_ratio(torch.where(near, ratio, 0.0)),
                           torch.exp(torch.where(near, 0.0, log_df)) * growth)
        constant = log_gamma_half_step(log_df - math.log(2.0)) - HALF_LOG_TWO_PI
        return sum_event(constant - log_scale - 0.5 * (tail + growth))

    def sample(self, n, *, generator=None, temperature=1.0):
        normal = self._noise(n, self.loc, generator)
        df = torch.exp(_whole(self.log_df).clamp_max(30.0)).expand(normal.shape)  # from there on it is a normal law
        seed = torch.randint(0, 2**63 - 1, (), generator=generator, device=None if generator is None
                             else generator.device).item()
        # The gamma law takes no generator.
        with torch.random.fork_rng(devices=[normal.device] if normal.is_cuda else []):
            torch.manual_seed(seed)
            gamma = torch.distributions.Gamma(0.5 * df, torch.full_like(df, 0.5)).rsample()
        return self.loc + temperature * torch.exp(self.log_scale) * normal * torch.sqrt(df / gamma)
