"""Residual flows: x + g(x) with a contractive g, its log-determinant by a power series, its inverse by iteration."""

import math

import torch
from torch import nn

from fastflow import checks, functional
from fastflow.autograd.differentiable import detached, leaf_of, outside_inference_mode, uncompiled
from fastflow.flows.base import StandardNormal
from fastflow.flows.flow import Flow
from fastflow.flows.jacobian import jacobian
from fastflow.flows.lipschitz import LipschitzMLP, LipSwish
from fastflow.flows.transform import Compose
from fastflow.functional import full_precision
from fastflow.nn import ActNorm
from fastflow.nn.outputs import in_format_of

__all__ = ["CONFIGS", "InvertibleResidual", "ResidualFlow"]

CONFIGS = {"checkerboard-2d": {"features": 2, "n_layers": 100, "hidden": (128, 128, 128)}}
"""The density model of the paper's section 5.1 by name, for :meth:`ResidualFlow.from_config`."""

MAX_TERMS = 2000  # of the Neumann series of an implicit gradient: L = 0.98 to float64's rounding


class InvertibleResidual(nn.Module):
    """z = x + g(x), invertible because g is a contraction: |g(x) - g(y)| <= L |x - y| with L < 1.

    log|det(I + J)| = sum_k (-1)^(k+1) tr(J^k) / k. In training it can be estimated without bias: the trace by
    Hutchinson's v'J^k v, the sum by Russian roulette, which goes on after ``n_exact_terms`` with probability
    1 - ``stop`` and divides each later term by the probability of being reached. The gradient is
    v' (sum_k (-1)^k J^k) dJ v, estimated in the same way: only one product with J enters the graph, so that memory
    doesn't grow with the terms.

    It is exact, the determinant of the Jacobian, for events of up to ``exact_features`` elements D in eval mode and of
    up to ``exact_training_features`` in training, which takes D backward passes where an estimate takes six on average.
    Above, eval mode takes the series of ``n_eval_terms`` terms under the probes, short by at most
    :meth:`truncation_bound` in expectation.

    The inverse iterates x <- z - g(x), which gains a factor L each time; its first and second derivatives are those of
    the implicit function.

    Args:
        net: module g, called as net(x) or net(x, context), such as :class:`LipschitzMLP` or
            :class:`LipschitzConvNet`; one with a method ``bind(context)`` gives a function of x that is used throughout
            a call. Its attributes ``bound`` and ``event_shape``, if there are any, are taken for L and the shape of x.
        exact_features, exact_training_features: up to how many elements the determinant is taken in eval mode and in
            training.
        n_exact_terms: terms that are always evaluated in training.
        stop: probability of stopping after each further term. The variance is finite where L^2 < 1 - stop, and may be
            elsewhere.
        n_probes: Rademacher probes of each trace.
        n_eval_terms: terms in eval mode above ``exact_features``.
        tolerance: the inverse stops where its step is within tolerance * (1 + |x|) in every element; None for 1e-6
            in float32 and 1e-12 in float64. The error is then within L / (1 - L) of that.
        max_iterations: of the inverse.

    Raises:
        RuntimeError: on an inverse call, no convergence in ``max_iterations``: g is no contraction, or nearly none.

    References:
        Behrmann et al., "Invertible residual networks", 2019, arXiv:1811.00995.
        Chen et al., "Residual flows for invertible generative modeling", 2019, arXiv:1906.02735.
    """

    def __init__(self, net, *, exact_features=64, exact_training_features=8, n_exact_terms=4, stop=0.5, n_probes=1,
                 n_eval_terms=40, tolerance=None, max_iterations=2000):
        super().__init__()
        if not callable(net):
            raise TypeError(f"net: expected a module, got {type(net).__name__}")
        for name, value, least in (("exact_features", exact_features, 0),
                                   ("exact_training_features", exact_training_features, 0),
                                   ("n_exact_terms", n_exact_terms, 0),
                                   ("n_probes", n_probes, 1), ("n_eval_terms", n_eval_terms, 1),
                                   ("max_iterations", max_iterations, 1)):
            checks.count(name, value, least)
        if not 0.0 < stop < 1.0:
            raise ValueError(f"stop: expected a probability between 0 and 1, got {stop!r}")
        if tolerance is not None and not tolerance > 0:
            raise ValueError(f"tolerance: expected a positive number or None, got {tolerance!r}")
        if getattr(net, "bound", 0.0) >= 1.0:
            raise ValueError(f"net: expected a Lipschitz bound below 1, got {net.bound!r}")
        self.net, self.n_exact_terms, self.stop = net, n_exact_terms, stop
        self.exact_features, self.exact_training_features = exact_features, exact_training_features
        self.n_probes, self.n_eval_terms = n_probes, n_eval_terms
        self.tolerance, self.max_iterations = tolerance, max_iterations

    @property
    def estimates(self):
        """Whether the log-determinant of training depends on random numbers, or may, where the events' size is not
        known."""
        shape = getattr(self.net, "event_shape", None)
        return shape is None or math.prod(shape) > self.exact_training_features

    @property
    def uncapturable(self):
        """Why a CUDA graph can't hold a pass of training, or None."""
        return "it draws on the host how many terms its estimate takes" if self.estimates else None

    @uncompiled
    @outside_inference_mode
    def forward(self, x, context=None):
        """(z, logdet) of x (B, *event), logdet (B,) in nats."""
        self._check("x", x)
        z, logdet = self._evaluate(x, self._function(context))
        return in_format_of(x, z), logdet

    @uncompiled
    @outside_inference_mode
    def inverse(self, z, context=None):
        """(x, logdet) of z."""
        self._check("z", z)
        with full_precision(z.device.type):  # lowered by autocast, g is too coarse to come to rest
            function = self._function(context)
            x = self._iterate(z, function)
            return in_format_of(z, x), -self._evaluate(x, function)[1]

    def truncation_bound(self, features, n_terms=None):
        """What a series of that many terms (``n_eval_terms``) lacks at most, D L^(n+1) / ((n+1)(1-L)), in nats."""
        n = self.n_eval_terms if n_terms is None else n_terms
        return features * self.net.bound ** (n + 1) / ((n + 1) * (1.0 - self.net.bound))

    def extra_repr(self):
        return f"exact_features={self.exact_features}, n_exact_terms={self.n_exact_terms}, stop={self.stop}"

    def _check(self, name, x):
        checks.tensor(name, x)
        if x.dim() < 2:
            raise ValueError(f"{name}: expected shape (B, *event), got {tuple(x.shape)}")
        parameter = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        if parameter is not None:
            checks.goes_with(name, x, "weight", parameter)
        if parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"weight: expected float32 or float64, in which the inverse comes to rest, got "
                            f"{parameter.dtype}")
        if hasattr(self.net, "event_shape"):
            checks.events(name, x, self.net.event_shape)

    def _function(self, context):
        if hasattr(self.net, "bind"):
            return self.net.bind(context)
        return self.net if context is None else lambda x: self.net(x, context)

    def _evaluate(self, x, function):
        if math.prod(x.shape[1:]) <= (self.exact_training_features if self.training else self.exact_features):
            z, matrix = jacobian(lambda t: t + function(t), x)
            return z, functional.slogdet(matrix)[1]
        return self._estimate(x, function)

    def _estimate(self, x, function):
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = leaf_of(x)
            y = function(leaf)
        weights = self._weights()
        value, surrogate = 0.0, 0.0
        for _ in range(self.n_probes):
            v = torch.empty_like(x).bernoulli_(0.5).mul_(2.0).sub_(1.0).detach()
            u = series = v
            for k, weight in enumerate(weights, 1):
                (u,) = torch.autograd.grad(y, leaf, u, retain_graph=True)
                sign = -1.0 if k % 2 else 1.0
                value = value - sign * weight / k * (u * v).flatten(1).sum(1)
                series = series + sign * weight * u
            if differentiable:
                (pulled,) = torch.autograd.grad(y, leaf, series, create_graph=True)
                surrogate = surrogate + (pulled * v).flatten(1).sum(1)
        value, surrogate = value / self.n_probes, surrogate / self.n_probes
        if not weights:
            value = x.new_zeros(x.shape[0])
        if not differentiable:
            return x + detached(y), value
        return x + y, value + (surrogate - surrogate.detach())

    def _weights(self):
        """One over the probability of being reached, of each term that is evaluated."""
        if not self.training:
            return [1.0] * self.n_eval_terms
        further = int(torch.empty(()).geometric_(self.stop)) - 1
        return [1.0] * self.n_exact_terms + [(1.0 - self.stop) ** -(j + 1) for j in range(further)]

    def _iterate(self, z, function):
        tolerance = self.tolerance or (1e-12 if z.dtype == torch.float64 else 1e-6)
        with torch.no_grad():
            x = z - function(z)
            for _ in range(self.max_iterations):
                x, before = z - function(x), x
                # Written so that a NaN, which never gets better, counts as done.
                if not bool(((x - before).abs() > tolerance * (1.0 + x.abs())).any()):
                    break
            else:
                step = (x - before).abs().max().item()
                raise RuntimeError(f"inverse: the iteration x = z - g(x) did not converge in {self.max_iterations} "
                                   f"steps (the last one moved by {step:.1e}); g is not contractive enough")
        if not torch.is_grad_enabled():
            return x
        # Newton's steps with a constant derivative: x is solved for, so they don't move it, but each makes one more
        # order of its derivatives in z, the context and the parameters right.
        solved = x
        for _ in range(2):
            x = x - _Step.apply(x + function(x) - z, function, solved)
        return x


class _Step(torch.autograd.Function):
    """(I + J)^-1 v at x, for a residual v that is 0 up to rounding and stands for its own value."""

    @staticmethod
    def forward(ctx, v, function, x):
        ctx.at = (function, x)
        return v.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _Solve.apply(gradient, *ctx.at, True), None, None


class _Solve(torch.autograd.Function):
    """(I + J)^-1 v at x, or (I + J')^-1 v, by the Neumann series; differentiable in v."""

    @staticmethod
    def forward(ctx, v, function, x, transposed):
        ctx.at = (function, x, transposed)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            if not transposed:
                dummy = torch.zeros_like(y, requires_grad=True)
                (pulled,) = torch.autograd.grad(y, leaf, dummy, create_graph=True)
        out, of = (y, leaf) if transposed else (pulled, dummy)
        tolerance = 8.0 * torch.finfo(v.dtype).eps
        u = v
        for _ in range(MAX_TERMS):
            (product,) = torch.autograd.grad(out, of, u, retain_graph=True)
            u, before = v - product, u
            if not bool(((u - before).abs() > tolerance * u.abs().amax()).any()):
                break
        return u.clone()

    @staticmethod
    def backward(ctx, gradient):
        function, x, transposed = ctx.at
        return _Solve.apply(gradient, function, x, not transposed), None, None, None


class ResidualFlow(Flow):
    """Invertible residual blocks of fully connected networks, each behind an ActNorm, and one more at the end.

    Densities of few features are exact, those of more are estimated without bias in training, see
    :class:`InvertibleResidual`; the base is N(0, I).

    Args:
        features: D >= 1.
        n_layers: number of blocks.
        hidden: sizes of each network's hidden layers.
        context_features: size of the context (B, context_features) that conditions the density, or None.
        bound: Lipschitz constant of each network, below 1.
        activation: constructor of an activation module with slopes within [-1, 1].
        actnorm: whether there are ActNorms.
        options: of each InvertibleResidual.

    References:
        Chen et al., "Residual flows for invertible generative modeling", 2019, arXiv:1906.02735.
    """

    configs = CONFIGS

    def __init__(self, features, *, n_layers=8, hidden=(64, 64), context_features=None, bound=0.97,
                 activation=LipSwish, actnorm=True, **options):
        n_layers = checks.count("n_layers", n_layers)
        features = checks.count("features", features, 1)
        layers = []
        for _ in range(n_layers):
            net = LipschitzMLP(features, hidden, bound=bound, context_features=context_features, activation=activation)
            layers += [*([ActNorm(features)] if actnorm else []), InvertibleResidual(net, **options)]
        transform = Compose(*layers, *([ActNorm(features)] if actnorm else []), event_shape=(features,))
        super().__init__(transform, StandardNormal((features,)))
        self.features = features
