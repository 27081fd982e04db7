"""Flows with the interface of torch.distributions, and of Pyro's."""

import functools
import math
import sys

import torch
from torch.distributions import Distribution, constraints

from fastflow import checks
from fastflow.flows.base import as_base
from fastflow.flows.transform import Compose, Inverse, data_shape, knows_data_shape

__all__ = ["FlowDistribution", "distribution_of"]


class FlowDistribution(Distribution):
    """A flow, under one context or (B, ...) contexts, with the interface of torch.distributions. :meth:`expand` gives
    it further batch dimensions, as Pyro's plates do."""

    arg_constraints = {}
    has_rsample = True

    def __init__(self, flow, context=None):
        self.flow = flow
        self.context = context
        batch_shape = torch.Size() if context is None else torch.Size([context.shape[0]])
        super().__init__(batch_shape, _event_shape(flow, context), validate_args=False)

    @property
    def support(self):
        """The domain of the scalar bijection that the data meet first, else all real numbers."""
        first, forward = self.flow.transform, True
        while isinstance(first, Inverse) or (isinstance(first, Compose) and len(first.transforms)):
            if isinstance(first, Inverse):
                first, forward = first.transform, not forward
            else:
                first = first.transforms[0 if forward else -1]
        low, high = getattr(first, "domain" if forward else "codomain", (-math.inf, math.inf))
        each = {(False, False): constraints.real, (True, False): constraints.greater_than(low),
                (False, True): constraints.less_than(high), (True, True): constraints.interval(low, high)}
        return constraints.independent(each[math.isfinite(low), math.isfinite(high)], len(self.event_shape))

    def expand(self, batch_shape, _instance=None):
        """The same law with ``batch_shape``, to which the present one broadcasts."""
        new = self._get_checked_instance(FlowDistribution, _instance)
        batch_shape = torch.Size(batch_shape)
        new.flow, new.context = self.flow, self.context
        if self.context is not None:
            new.context = self.context.expand(*batch_shape, *self.context.shape[len(self.batch_shape):])
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        return new

    def log_prob(self, value):
        """Log-density (*sample, *batch) of value (*sample, *batch, *event), in nats."""
        checks.tensor("value", value, floating=False)
        event_dims = len(self.event_shape)
        if value.dim() < event_dims or value.shape[value.dim() - event_dims:] != self.event_shape:
            raise ValueError(f"value: expected shape (*, {', '.join(map(str, self.event_shape))}), got "
                             f"{tuple(value.shape)}")
        try:
            lead = torch.broadcast_shapes(value.shape[:value.dim() - event_dims], self.batch_shape)
        except RuntimeError:
            raise ValueError(f"value: expected a shape that broadcasts with "
                             f"{tuple(self.batch_shape + self.event_shape)}, got {tuple(value.shape)}") from None
        context = self.context
        if context is not None:
            own = context.shape[len(self.batch_shape):]
            context = context.expand(*lead, *own).reshape(-1, *own)
        value = value.expand(lead + self.event_shape)
        return self.flow.log_prob(value.reshape(-1, *self.event_shape), context).reshape(lead)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape=()):
        shape, context = torch.Size(sample_shape), self.context
        if context is None:
            x = self.flow.rsample(math.prod(shape + self.batch_shape))
        else:
            x = self.flow.rsample(math.prod(shape), context.reshape(-1, *context.shape[len(self.batch_shape):]))
        return x.reshape(shape + self.batch_shape + self.event_shape)

    def __reduce__(self):  # a class made here has no name to be found by
        return _restored, (self.__dict__,)


def distribution_of(flow, context=None):
    """A :class:`FlowDistribution`; where Pyro is imported, one that is of Pyro's distributions as well."""
    return _kind()(flow, context)


def _event_shape(flow, context):
    """The shape of one x, from a sample in eval mode where the transform and the base do not tell it."""
    noise = torch.Size(as_base(flow.base).event_shape)
    # Of a law without dimensions, which may be that of every element, the base does not know how many there are.
    if (noise or not isinstance(flow.base, Distribution)) and knows_data_shape(flow.transform):
        return torch.Size(data_shape(flow.transform, noise))
    modes = [(module, module.training) for module in flow.modules()]
    flow.eval()
    try:
        with torch.random.fork_rng():
            sample = flow.sample(1, None if context is None else context[:1])
    finally:
        for module, training in modes:
            module.training = training
    return sample.shape[1 if context is None else 2:]


def _kind():
    pyro = sys.modules.get("pyro.distributions.torch_distribution")
    return FlowDistribution if pyro is None else _with(pyro.TorchDistributionMixin)


@functools.cache
def _with(mixin):
    return type(FlowDistribution.__name__, (FlowDistribution, mixin), {})


def _restored(state):
    kind = _kind()
    found = kind.__new__(kind)
    found.__dict__.update(state)
    return found
