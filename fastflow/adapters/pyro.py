"""Pyro: affine couplings, quadratic splines and the invertible 1x1 convolution among its transforms. Noise to data.

Spline couplings and autoregressive splines consist of Spline and ConditionalSpline, which are what is swapped. Those of
order "linear", Pyro's default, are ratios of lines: they have no kernel and stay as they are.
"""

import functools
import math

import torch
from pyro.distributions import transforms
from pyro.distributions.transforms.spline import ConditionedSpline
from pyro.distributions.transforms.utils import clamp_preserve_gradients

from fastflow import functional
from fastflow.adapters.layers import fusable, worthwhile
from fastflow.adapters.swap import swap, swap_of


def _opposite(method, args, kwargs, result):
    return {"_call": "_inverse", "_inverse": "_call"}[method], (result,), {}


def _logdet(module):
    """The log-determinant that the last call left, of noise to data."""
    known = None if swap_of(module) is None else module._fastflow_logdet  # an original has that of an earlier call
    return module._cached_log_scale.flatten(module.dim).sum(-1) if known is None else known


@swap(transforms.AffineCoupling, methods=("_call", "_inverse"), opposite=_opposite,
      observe=lambda module, result, args: [result, _logdet(module)])
class AffineCoupling(transforms.AffineCoupling):
    """y = x exp(s) + t, (s, t) from a network of the first channels; gradients pass the clamp of s."""

    def _call(self, x):
        return self._fastflow_couple(x, False)

    def _inverse(self, y):
        return self._fastflow_couple(y, True)

    def _fastflow_couple(self, x, inverse):
        self._fastflow_logdet = None
        if not fusable(x) or not worthwhile(x):
            return (super()._inverse if inverse else super()._call)(x)
        batch, event = x.shape[:self.dim], x.shape[self.dim:]
        passive, active = x.split([self.split_dim, event[0] - self.split_dim], self.dim)
        shift, log_scale = self.nn(passive.reshape(*batch, -1))
        log_scale = clamp_preserve_gradients(log_scale.reshape(active.shape), self.log_scale_min_clip,
                                             self.log_scale_max_clip)
        passive, active, *params = (t.reshape(-1, *t.shape[self.dim:]) for t in (
            passive, active, log_scale, shift.reshape(active.shape)))
        y, logdet = functional.affine_coupling(active, tuple(params), passive=passive, inverse=inverse)
        self._cached_log_scale, logdet = log_scale, logdet.view(batch)
        self._fastflow_logdet = -logdet if inverse else logdet
        return y.view(x.shape)

    def log_abs_det_jacobian(self, x, y):
        known = self.__dict__.get("_fastflow_logdet")
        x_old, y_old = self._cached_x_y
        return known if known is not None and x is x_old and y is y_old else super().log_abs_det_jacobian(x, y)


def _observe_condition(module, result, args):
    """What the transform under this context makes of some x, both ways."""
    context = args[0]
    batch = context.shape[:-1]
    with torch.no_grad():
        active = result.nn(context.new_zeros(*batch, module.split_dim))[0].shape[-1]
    shape = (*batch, module.split_dim + active)
    x = 2.0 * torch.cos(1.3 * torch.arange(math.prod(shape), device=context.device)).to(context.dtype).view(shape)
    y = result(x)
    return [y, result.log_abs_det_jacobian(x, y), result._inverse(x)]


@swap(transforms.ConditionalAffineCoupling, methods=("condition",), opposite=lambda *call: None,
      observe=_observe_condition, fit=lambda module, fix: "the kernel's coupling under a context has dim=-1"
      if module.kwargs.get("dim", -1) != -1 else None)
class ConditionalAffineCoupling(transforms.ConditionalAffineCoupling):
    """The affine coupling under a context."""

    def condition(self, context):
        coupling = super().condition(context)
        coupling.__class__ = AffineCoupling
        return coupling


@swap(transforms.GeneralizedChannelPermute, methods=("_call", "_inverse"), opposite=_opposite)
class GeneralizedChannelPermute(transforms.GeneralizedChannelPermute):
    """y = P L U x over the channels: one matrix product, where Pyro multiplies out C x C x H x W."""

    def _call(self, x):
        if not fusable(x, self.LU):
            return super()._call(x)
        return torch.matmul(self.permutation @ self.L @ self.U, x.flatten(-2)).view(x.shape)

    def _inverse(self, y):
        if not fusable(y, self.LU):
            return super()._inverse(y)
        x = torch.linalg.solve_triangular(self.L, torch.matmul(self.permutation.mT, y.flatten(-2)), upper=False)
        return torch.linalg.solve_triangular(self.U, x, upper=True).reshape(y.shape)


END_DERIVATIVE = 1.0 - 1e-3  # Pyro's slope at the ends of the interval, outside of which it is 1


def _fit_spline(module, fix):
    return None if module.order == "quadratic" else f"a rational spline of order {module.order!r} has no kernel"


def _spline(x, raw, bound, inverse):
    """(y, log-slope) of every element of x (*, D) under its own raw widths, heights and slopes (*, D, 3K - 1)."""
    params = raw.to(x.dtype).expand(*x.shape, raw.shape[-1]).reshape(-1, raw.shape[-1])
    y, log_slope = functional.spline(x.reshape(-1, 1), params, tail_bound=bound, end_derivative=END_DERIVATIVE,
                                     inverse=inverse)
    return y.view(x.shape), log_slope.view(x.shape)


@swap(transforms.Spline, methods=("_call", "_inverse"), opposite=_opposite, fit=_fit_spline,
      observe=lambda module, result, args: [result, module._cache_log_detJ])
class Spline(transforms.Spline):
    """A rational-quadratic spline per feature, the same for all samples."""

    def spline_op(self, x, inverse=False):
        if not fusable(x, self.unnormalized_widths):
            return super().spline_op(x, inverse=inverse)
        raw = torch.cat([self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives], -1)
        return _spline(x, raw, self.bound, inverse)


class _Conditioned(ConditionedSpline):
    def spline_op(self, x, inverse=False):
        if not fusable(x):
            return super().spline_op(x, inverse=inverse)
        return _spline(x, self._fastflow_raw(), self.bound, inverse)


def _observe_spline(module, result, args):
    """What the spline under this context makes of some x, both ways."""
    context = args[0]
    shape = (*context.shape[:-1], module.input_dim)
    x = 2.0 * torch.cos(1.3 * torch.arange(math.prod(shape), device=context.device)).to(context.dtype).view(shape)
    y = result(x)
    return [y, result._cache_log_detJ, result._inverse(x), result._cache_log_detJ]


@swap(transforms.ConditionalSpline, methods=("condition",), opposite=lambda *call: None, observe=_observe_spline,
      fit=_fit_spline)
class ConditionalSpline(transforms.ConditionalSpline):
    """A rational-quadratic spline per feature, from a network of the context."""

    def condition(self, context):
        spline = super().condition(context)
        spline.__class__, spline._fastflow_raw = _Conditioned, functools.partial(self._fastflow_raws, context)
        return spline

    def _fastflow_raws(self, context):
        """Raw widths, heights and slopes (*, D, 3K - 1); an AutoRegressiveNN puts the features last."""
        raws = self.nn(context)
        if raws[0].shape[-1] == self.input_dim:
            return torch.cat([raw.transpose(-1, -2) for raw in raws], -1)
        return torch.cat([raw.unflatten(-1, (self.input_dim, -1)) for raw in raws], -1)
