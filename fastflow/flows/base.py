"""Base distributions: the noise that a flow maps data to."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn
from torch.distributions import Distribution, constraints, transform_to

from fastflow import checks
from fastflow.draws import drawn
from fastflow.flows.logdets import sum_event

__all__ = ["Anchored", "Base", "StandardLogistic", "StandardNormal", "as_base", "centred", "seeded", "to_support"]


HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def centred(u):
    """Numbers of torch.rand, uniform on (-1/2, 1/2), symmetric and never at an end: of the values k/n, 0 <= k < n, that
    torch.rand takes, the least is an end."""
    return (u - 0.5) + 0.25 * torch.finfo(u.dtype).eps  # 1/(2n), exact in this order alone


class Base(nn.Module):
    """What the bases share."""

    conditional = False

    def __init__(self, event_shape):
        super().__init__()
        sizes = event_shape if hasattr(event_shape, "__iter__") else [event_shape]
        self.event_shape = torch.Size(checks.counts("event_shape", sizes))

    def forward(self, z):
        return self.log_prob(z)

    def extra_repr(self):
        return str(tuple(self.event_shape))

    def _checked(self, z):
        checks.tensor("z", z)
        checks.events("z", z, self.event_shape)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def _noise(self, n, like, generator, draw=torch.randn):
        return drawn(draw, (n, *self.event_shape), like, generator, torch.promote_types(like.dtype, torch.float32))

    def _refuse_temperature(self, temperature):
        if temperature != 1.0:
            raise ValueError(f"temperature: expected 1 for a base of type {type(self).__name__}, got {temperature}")


class Anchored(nn.Module):
    """A model with parts whose dtype and device are those of a buffer ``anchor``, a constant that no state dict holds:
    where ``load_state_dict(assign=True)`` puts other tensors in the place of its parameters, the anchors follow."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        if not metadata.get("assign_to_params_buffers", False):
            return
        given = [state_dict[prefix + name] for name, _ in self.named_parameters() if prefix + name in state_dict]
        if not given:
            return
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else given[0].dtype
        for module in self.modules():
            for name in module._non_persistent_buffers_set & {"anchor", "_anchor"}:
                setattr(module, name, torch.zeros((), dtype=dtype, device=given[0].device))


class StandardNormal(Base):
    """N(0, I) over tensors of ``event_shape``.

    Samples have the dtype and device that the module was moved to, so that they follow the flow's ``.double()`` and
    ``.to()``.
    """

    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def log_prob(self, z, temperature=1.0):
        """(B,) nats of z (B, *event_shape) under N(0, temperature^2 I)."""
        z = self._checked(z)
        if temperature != 1.0:
            z = z / temperature
        constant = math.prod(self.event_shape) * (HALF_LOG_TWO_PI + math.log(temperature))
        return -0.5 * sum_event(z * z) - constant

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, *event_shape) with standard deviation ``temperature``."""
        z = self._noise(n, self.anchor, generator)
        return z if temperature == 1.0 else temperature * z


class StandardLogistic(Base):
    """Independent logistics of location 0 and scale 1 over tensors of ``event_shape``; samples follow the module's
    dtype and device, as those of StandardNormal do."""

    def __init__(self, event_shape):
        super().__init__(event_shape)
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def log_prob(self, z, temperature=1.0):
        """(B,) nats of z (B, *event_shape) under logistics of scale ``temperature``."""
        z = self._checked(z) / temperature
        constant = math.prod(self.event_shape) * math.log(temperature)
        return sum_event(F.logsigmoid(z) + F.logsigmoid(-z)) - constant

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, *event_shape) of scale ``temperature``."""
        u = centred(self._noise(n, self.anchor, generator, torch.rand))
        return 2.0 * temperature * torch.atanh(2.0 * u)  # the logit of u + 1/2


def support_of(law):
    """The support of the torch.distributions object; all real numbers for one that tells none."""
    try:
        return law.support
    except NotImplementedError:
        return constraints.independent(constraints.real, len(law.event_shape))


def to_support(support):
    """torch.distributions.transform_to(support), and for a mixture, which torch leaves out, that of its first
    component."""
    if not isinstance(support, constraints.MixtureSameFamilyConstraint):
        return transform_to(support)
    component, dim = to_support(support.base_constraint), -1 - support.event_dim
    return lambda u: component(u.unsqueeze(dim)).select(dim, 0)


def unchecked(law, double=False, known=None):
    """The torch.distributions object, which does not look at the values that it is called with, for the host would wait
    for the answer; its floating parameters in float64 if ``double``. ``known`` are the parts that are made already, by
    id."""
    known = {} if known is None else known
    if isinstance(law, torch.Tensor):
        return law.double() if double and law.is_floating_point() else law
    if type(law) in (list, tuple):
        return type(law)(unchecked(part, double, known) for part in law)
    if not isinstance(law, (Distribution, D.Transform)):
        return law
    if id(law) not in known:  # a transform and its inverse know each other
        new = known[id(law)] = object.__new__(type(law))
        vars(new).update({name: unchecked(part, double, known) for name, part in vars(law).items()})
        if isinstance(law, Distribution):
            new._validate_args = False
    return known[id(law)]


def tempered(law, temperature):
    """The torch.distributions object with deviations ``temperature`` times as large, None if it is no Gaussian."""
    if isinstance(law, D.Independent):
        base = tempered(law.base_dist, temperature)
        return None if base is None else D.Independent(base, law.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(law, D.Normal):  # not validated, as a scale may be 0
        return D.Normal(law.loc, temperature * law.scale, validate_args=False)
    if isinstance(law, D.MultivariateNormal):
        return D.MultivariateNormal(law.loc, scale_tril=temperature * law.scale_tril, validate_args=False)
    return None


class _DistributionBase:
    """A torch.distributions object as a base; batch dimensions count as dimensions of the event.

    Args:
        anchor: tensor of the dtype that samples have if their own is not wider, or None.
    """

    def __init__(self, distribution, anchor=None):
        self.distribution, self.anchor = distribution, anchor
        self.event_shape = distribution.batch_shape + distribution.event_shape

    def log_prob(self, z, temperature=1.0):
        checks.tensor("z", z)
        if self.event_shape:  # else it is the law of every element
            checks.events("z", z, self.event_shape)
        distribution = unchecked(self._tempered(temperature), z.dtype == torch.float64)
        if z.numel() == 0:
            return z.flatten(1).sum(1) if z.dim() > 1 else z.clone()
        support = support_of(distribution)
        missing, infinite = torch.isnan(z), torch.isinf(z)
        if support.event_dim:
            missing, infinite = (t.flatten(-support.event_dim).any(-1) for t in (missing, infinite))
        inside = spread = support.check(z) & ~infinite
        if support.event_dim:
            spread = inside.view(inside.shape + (1,) * support.event_dim)
        # A point of the support stands in where z has left it, so that neither value nor gradient become NaN.
        safe = torch.where(spread, z, to_support(support)(torch.zeros_like(z)))
        value = torch.where(inside, distribution.log_prob(safe), -torch.inf)
        value = torch.where(missing, torch.nan, value)
        if value.dim() < 2:
            return value
        # Beside an element that has left the support, an infinite density of another counts nothing.
        without = (~inside).flatten(1).any(1) & ~missing.flatten(1).any(1)
        return torch.where(without, -torch.inf, value.flatten(1).sum(1))

    def sample(self, n, *, generator=None, temperature=1.0):
        distribution = self._tempered(temperature)
        if self.anchor is not None and self.anchor.dtype == torch.float64:
            distribution = unchecked(distribution, double=True)
        draw = distribution.rsample if distribution.has_rsample else distribution.sample
        with seeded(generator):
            return draw((n,))

    def _tempered(self, temperature):
        law = self.distribution if temperature == 1.0 else tempered(self.distribution, temperature)
        if law is None:
            raise ValueError(f"temperature: expected 1 for a base of type {type(self.distribution).__name__}, "
                             f"got {temperature}")
        return law


@contextlib.contextmanager
def seeded(generator):
    """Torch's own generators, seeded from ``generator`` and set back afterwards, for what takes none, such as
    torch.distributions; None leaves them as they are."""
    if generator is None:
        yield
        return
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, generator=generator, device=generator.device).item()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def as_base(base, anchor=None):
    """``base`` as an object with event_shape, log_prob(z, temperature) and sample(n, generator=, temperature=); samples
    of a torch.distributions object are float64 where the tensor ``anchor`` is."""
    if isinstance(base, _DistributionBase):
        base = base.distribution
    if isinstance(base, Distribution):
        return _DistributionBase(base, anchor)
    if hasattr(base, "log_prob") and hasattr(base, "sample") and hasattr(base, "event_shape"):
        return base
    raise TypeError(f"base: expected a base distribution or a torch.distributions object, got {type(base).__name__}")
