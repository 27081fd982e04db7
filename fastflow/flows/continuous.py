"""Continuous flows: the noise flows along a velocity field to the data; FFJORD and flow matching."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.autograd.differentiable import detached, leaf_of, outside_inference_mode, uncompiled
from fastflow.draws import drawn
from fastflow.flows.base import StandardNormal, as_base
from fastflow.flows.contexts import has_room, takes_context
from fastflow.flows.flow import Flow
from fastflow.flows.tabular import FEATURES
from fastflow.flows.transform import Compose
from fastflow.nn import MLP

__all__ = ["CONFIGS", "FFJORD", "ContinuousTransform", "VelocityMLP", "flow_matching_loss"]


FIXED_STEPS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "fixed_adams")
EXACT_IN_TRAINING = 8  # elements up to which "auto" takes the exact trace in training, too


class VelocityMLP(nn.Module):
    """A velocity field (B, features) by a fully connected network of x, the time and the context; zero at first.

    Args:
        features: D.
        hidden: sizes of the hidden layers.
        context_features: size of the context (B, context_features), or None.
        activation: constructor of the activation module; a smooth one, for the solver's sake.
    """

    def __init__(self, features, hidden=(64, 64), *, context_features=None, activation=nn.Tanh):
        super().__init__()
        features = checks.count("features", features, 1)
        self.event_shape = (features,)
        self.network = MLP(features + 1, features, hidden, context_features=context_features, activation=activation)

    def forward(self, t, x, context=None):
        """dx/dt at x (B, features) and time t, 0-d or (B,)."""
        t = t.to(x.dtype).expand(x.shape[0])[:, None]
        return self.network(torch.cat([x, t], 1), context)


class ContinuousTransform(nn.Module):
    """dx/dt = field(t, x) from the noise z at t = 0 to the data at t = 1; log|det dx/dz| is the integral of
    tr(d field/dx) over t.

    Both directions integrate x and the log-determinant together with torchdiffeq, and are inverse to each other up to
    its tolerances. With the exact trace the density is exact up to the solver; Hutchinson's trace v'Jv, with one
    Rademacher v per sample for a whole solve, makes the log-determinant random, without bias. A sample that is not
    finite gives NaN, and leaves the others alone.

    Args:
        field: module, called as field(t, x) or field(t, x, context) with t 0-d, (B,) in training by flow matching;
            returns the velocity, like x. Its attribute ``event_shape``, if there is one, is held against x.
        trace: "exact" (D backward passes per evaluation), "hutchinson" (one), or "auto": exact in eval mode and for
            events of up to 8 elements, else Hutchinson's in training.
        method, rtol, atol, options: of torchdiffeq.odeint. Adaptive steps are chosen for the batch as a whole.
        adjoint: gradients by integrating the adjoint equation backwards, in memory that doesn't grow with the steps, to
            the tolerances; else by differentiating the solver's steps, which also has second derivatives.

    Raises:
        ImportError: torchdiffeq is missing.

    References:
        Chen et al., "Neural ordinary differential equations", 2018, arXiv:1806.07366.
        Grathwohl et al., "FFJORD", 2019, arXiv:1810.01367.
    """

    uncapturable = "its solver reads the times of its steps on the host"  # why a CUDA graph can't hold it

    def __init__(self, field, *, trace="auto", method="dopri5", rtol=1e-5, atol=1e-5, options=None, adjoint=False):
        super().__init__()
        _torchdiffeq()
        if not callable(field):
            raise TypeError(f"field: expected a module, got {type(field).__name__}")
        checks.choice("trace", trace, ("exact", "hutchinson", "auto"))
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        self.field, self.trace, self.method, self.options = field, trace, method, options
        self.rtol, self.atol, self.adjoint = rtol, atol, bool(adjoint)

    @property
    def adaptive(self):
        """Whether the steps that are differentiated depend on the values."""
        return not self.adjoint and self.method not in FIXED_STEPS

    @property
    def estimates(self):
        """Whether the log-determinant of training depends on random numbers, or may, where the events' size is not
        known."""
        shape = getattr(self.field, "event_shape", None)
        return self.trace != "exact" and (self.trace == "hutchinson" or shape is None
                                          or math.prod(shape) > EXACT_IN_TRAINING)

    @property
    def takes_context(self):
        """Whether the field does."""
        return takes_context(self.field, 1) if isinstance(self.field, nn.Module) else has_room(self.field, 1)

    @uncompiled
    @outside_inference_mode
    def forward(self, x, context=None):
        """(z, logdet) of x (B, *event), logdet (B,) in nats."""
        return self._integrate("x", x, context, 1.0, 0.0)

    @uncompiled
    @outside_inference_mode
    def inverse(self, z, context=None):
        """(x, logdet) of z."""
        return self._integrate("z", z, context, 0.0, 1.0)

    def velocity(self, t, x, context=None):
        """field(t, x), or field(t, x, context) if there is one."""
        v = self.field(t, x) if context is None else self.field(t, x, context)
        if v.shape != x.shape:
            raise ValueError(f"field: expected a velocity like x, {tuple(x.shape)}, got {tuple(v.shape)}")
        return v

    def extra_repr(self):
        return f"trace={self.trace!r}, method={self.method!r}, rtol={self.rtol}, atol={self.atol}"

    def _integrate(self, name, x, context, start, end):
        checks.tensor(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name}: expected shape (B, *event), got {tuple(x.shape)}")
        if hasattr(self.field, "event_shape"):
            checks.events(name, x, self.field.event_shape)
        parameters = tuple(self.field.parameters()) if isinstance(self.field, nn.Module) else ()
        for parameter in parameters[:1]:
            checks.goes_with(name, x, "weight", parameter)
        if x.numel() == 0:
            nothing = self.velocity(x.new_tensor(start), x, context).flatten(1).sum(1) if len(x) == 0 else 0.0
            return x.clone(), x.new_zeros(x.shape[0]) + nothing
        finite = torch.isfinite(x).flatten(1).all(1)
        spread = finite.view(-1, *(1,) * (x.dim() - 1))
        state = (torch.where(spread, x, 0.0), x.new_zeros(x.shape[0]))
        few = not self.training or math.prod(x.shape[1:]) <= EXACT_IN_TRAINING
        exact = self.trace == "exact" or (self.trace == "auto" and few)
        probe = None if exact else torch.empty_like(x).bernoulli_(0.5).mul_(2.0).sub_(1.0).detach()

        def rate(t, state):
            return self._rate(t, state[0], context, probe)

        times = torch.tensor([start, end], dtype=x.dtype, device=x.device)
        solver = {"rtol": self.rtol, "atol": self.atol, "method": self.method, "options": self.options}
        if self.adjoint and torch.is_grad_enabled():
            moving = tuple(p for p in (*parameters, context) if p is not None and p.requires_grad)
            x, logdet = _torchdiffeq().odeint_adjoint(rate, state, times, adjoint_params=moving, **solver)
        else:
            x, logdet = _torchdiffeq().odeint(rate, state, times, **solver)
        return torch.where(spread, x[1], torch.nan), torch.where(finite, logdet[1], torch.nan)

    def _rate(self, t, x, context, probe):
        """The velocity and the trace of its derivative in x."""
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            x = leaf_of(x if differentiable else detached(x))
            v = self.velocity(t, x, context)
            if not v.requires_grad:
                trace = x.new_zeros(x.shape[0])
            elif probe is not None:
                trace = (_pull(v, x, probe, differentiable) * probe).flatten(1).sum(1)
            else:
                trace = sum(_pull(column.sum(), x, None, differentiable).flatten(1)[:, i]
                            for i, column in enumerate(v.flatten(1).unbind(1)))
        return (v, trace) if differentiable else (detached(v), detached(trace))


def _pull(v, x, cotangent, create_graph):
    return torch.autograd.grad(v, x, cotangent, create_graph=create_graph, retain_graph=True, materialize_grads=True)[0]


def _torchdiffeq():
    try:
        # Its solvers hold tensors that are made on import: not on the meta device on which a model may be built.
        with torch.device("cpu"):
            import torchdiffeq
    except ImportError as error:
        raise ImportError("continuous flows need torchdiffeq: pip install 'fastflow[continuous]'") from error
    return torchdiffeq


def flow_matching_loss(flow, x, context=None, *, sigma_min=0.0, noise=None, t=None, generator=None):
    """Conditional flow matching: |field(t, x_t) - (x - (1 - sigma_min) noise)|^2 per sample, without solving anything.

    x_t = (1 - (1 - sigma_min) t) noise + t x runs straight from noise to data. The field that minimises the expectation
    carries the noise's distribution at t = 0 to that of the data (blurred by sigma_min) at t = 1.

    Args:
        flow: a ContinuousTransform, whose noise is N(0, I), or a Flow of one, whose noise is its base's.
        x: data (B, *event).
        context: (B, ...) or None, handed to the field and to a conditional base.
        sigma_min: >= 0.
        noise: like x, None to draw it.
        t: times (B,), None to draw them from [0, 1].
        generator: torch.Generator of both.

    Returns:
        (B,), to be averaged.

    References:
        Lipman et al., "Flow matching for generative modeling", 2023, arXiv:2210.02747.
    """
    transform = flow.transform if isinstance(flow, Flow) else flow
    if not isinstance(transform, ContinuousTransform):
        raise TypeError(f"flow: expected a ContinuousTransform or a Flow of one, got {type(transform).__name__}")
    checks.tensor("x", x)
    if not sigma_min >= 0:
        raise ValueError(f"sigma_min: expected a non-negative number, got {sigma_min!r}")
    if noise is None:
        options = {} if generator is None else {"generator": generator}
        if isinstance(flow, Flow):
            base, options = as_base(flow.base), {**options, **flow.context_of_base(context)}
        else:
            base = StandardNormal(x.shape[1:]).to(x.device, x.dtype)
        noise = base.sample(x.shape[0], **options).to(x.dtype)
    checks.shape("noise", noise, x.shape)
    if t is None:
        t = drawn(torch.rand, (x.shape[0],), x, generator)
    checks.shape("t", t, (x.shape[0],))
    time = t.view(-1, *(1,) * (x.dim() - 1))
    position = (1.0 - (1.0 - sigma_min) * time) * noise + time * x
    if isinstance(flow, Flow):
        context = flow.context_of_transform(context)
    error = transform.velocity(t, position, context) - (x - (1.0 - sigma_min) * noise)
    return error.square().flatten(1).sum(1)


CONFIGS = {name: {"features": FEATURES[name], "n_layers": n_layers, "hidden": (factor * FEATURES[name],) * depth,
                  "activation": activation}
           for name, activation, depth, factor, n_layers in (
               ("power", nn.Tanh, 3, 10, 5), ("gas", nn.Tanh, 3, 20, 5), ("hepmass", nn.Softplus, 2, 10, 10),
               ("miniboone", nn.Softplus, 2, 20, 1), ("bsds300", nn.Softplus, 3, 20, 2))}
"""The tabular models of the paper's appendix B by name, for :meth:`FFJORD.from_config`."""


class FFJORD(Flow):
    """Free-form continuous flow: a :class:`VelocityMLP` integrated from N(0, I) to the data.

    Trained by its likelihood, whose trace is exact in eval mode and for few features, or by :func:`flow_matching_loss`.
    It starts as the identity.

    Args:
        features: D >= 1.
        n_layers: number of fields one after the other; flow matching takes one.
        hidden: sizes of each field's hidden layers.
        context_features: size of the context (B, context_features) that conditions the density, or None.
        activation: constructor of the activation module.
        options: of the :class:`ContinuousTransform`: trace, method, rtol, atol, adjoint, options.

    References:
        Grathwohl et al., "FFJORD: free-form continuous dynamics for scalable reversible generative models", 2019,
        arXiv:1810.01367.
    """

    configs = CONFIGS

    def __init__(self, features, *, n_layers=1, hidden=(64, 64), context_features=None, activation=nn.Tanh, **options):
        n_layers = checks.count("n_layers", n_layers, 1)
        layers = [ContinuousTransform(VelocityMLP(features, hidden, context_features=context_features,
                                                  activation=activation), **options) for _ in range(n_layers)]
        super().__init__(layers[0] if n_layers == 1 else Compose(*layers), StandardNormal((features,)))
        self.features = features
