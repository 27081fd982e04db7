"""torchflows: couplings, autoregressive and element-wise bijections, permutations, LU maps. Data to noise.

What a bijection does to an element is its transformer's affair: affine (either way round), shift, scale, or a
rational-quadratic spline. Log-determinants have the batch's shape.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchflows import flows
from torchflows.bijections.finite.autoregressive import layers, layers_base
from torchflows.bijections.finite.autoregressive.conditioning import context as contexts
from torchflows.bijections.finite.autoregressive.conditioning import transforms as conditioners
from torchflows.bijections.finite.autoregressive.transformers.linear import affine
from torchflows.bijections.finite.autoregressive.transformers.spline.rational_quadratic import RationalQuadratic
from torchflows.bijections.finite.matrix import decomposition, permutation
from torchflows.bijections.finite.multiscale import base as multiscale

from fastflow import functional
from fastflow.adapters import verify
from fastflow.adapters.layers import couple, fusable, order_of, overridden, plain, remembered, reorder
from fastflow.adapters.networks import fits_one_kernel, weights_of
from fastflow.adapters.swap import swap
from fastflow.autograd.mlp_flow import run_steps
from fastflow.functional import ScaleMap

EXAMPLES = {flows.Flow: lambda flow, x, context=None: flow.log_prob(x, context)}
LARGE = 1 << 20  # multiplications of a product with one factor of a linear map
WIDE = 1 << 16  # elements from which on a CPU an affine kernel gains on a few passes over data that a cache holds
DAMPING = 1000.0  # what the spline divides its raw heights and slopes by


@functools.lru_cache(64)
def _affine(gain, offset, least):
    """The dialect of alpha = exp(offset + gain r) + least, scale and shift of an element side by side."""
    return {"scale": ScaleMap("exp", gain=gain, offset=offset, eps=least), "layout": "interleave"}


@functools.lru_cache(64)
def _quadratic(bound, least_bin, least_derivative, offset):
    """The spline's options. The slope at its ends comes from the raw ``offset``, which is damped too."""
    end = least_derivative + math.log1p(math.exp(offset * (1.0 + 1.0 / DAMPING)))
    return {"tail_bound": bound, "min_width": least_bin, "min_height": least_bin, "min_derivative": least_derivative,
            "end_derivative": end}


class _Transform:
    """What a transformer does, on (B, n) data and (B, n P) or (1, n P) parameters as a network left them."""

    def __init__(self, transformer):
        kind = type(transformer)
        self.kind, self.flipped = kind, kind is affine.InverseAffine
        if kind in (affine.Affine, affine.InverseAffine, affine.SafeAffine):
            self.dialect = _affine(1.0 / transformer.const, transformer.identity_unconstrained_alpha, transformer.m)
        elif kind is affine.Shift:
            self.dialect = {"scale": "additive"}
        elif kind is RationalQuadratic:
            self.bins, self.offset = transformer.n_bins, transformer.boundary_u_delta
            self.dialect = _quadratic(transformer.max_input, transformer.min_bin_size, transformer.min_delta,
                                      self.offset)
        else:
            raise TypeError(f"{kind.__name__} has no kernel")

    def spline(self, x, params, inverse):
        """(y, log-determinant) of x (B, n): widths, heights and slopes from what the network says of them."""
        raw = params.unflatten(1, (x.shape[1], -1))
        widths, heights, slopes = raw.split([self.bins, self.bins, self.bins - 1], -1)
        raw = torch.cat([widths, torch.add(widths, heights, alpha=1.0 / DAMPING),
                         slopes / DAMPING + self.offset], -1).flatten(1)
        return functional.spline(x, raw.expand(x.shape[0], -1), inverse=inverse, **self.dialect)

    def __call__(self, x, params, inverse):
        if self.kind is RationalQuadratic:
            return self.spline(x, params, inverse)
        return functional.affine_coupling(x, params, inverse=inverse != self.flipped, **self.dialect)


def _fit(module, fix):
    transformer = module.transformer
    reason = overridden(module, "forward", "inverse")
    if reason is not None:
        return reason
    if type(transformer) is RationalQuadratic and not (
            transformer.max_input == -transformer.min_input == transformer.max_output == -transformer.min_output):
        return "the kernel's spline maps an interval around 0 onto itself"
    try:
        _Transform(transformer)
    except TypeError as error:
        return str(error)
    return None


def _fit_coupling(module, fix):
    if not torch.equal(module.coupling.target_mask, ~module.coupling.source_mask):
        return "some of its elements neither pass nor are transformed, or both"
    reason = _fit(module, fix)
    if reason is None:
        _order(module, next(module.parameters()).device)
    return reason


def _order(module, device):
    """order_of the coupling's flattened elements, on the device."""
    def compute(mask):
        flat = mask.flatten()
        kept, *orders = order_of(flat.nonzero()[:, 0], (~flat).nonzero()[:, 0])
        return kept, *(t if t is None else t.to(device) for t in orders)
    return remembered(module, f"order_{device}", compute, module.coupling.source_mask)


def _no_logdet(module, x):
    """torchflows' log-determinant of a shift: zeros in the default dtype, whatever the data's."""
    return torch.zeros(x.shape[:x.dim() - len(module.event_shape)], device=x.device)


def _own(module):
    """Whether the module's transformer does what its class says."""
    return plain(module.transformer, type(module.transformer))


class _Coupling:
    """Some elements pass, and a network of them and the context says how the others are transformed."""

    def forward(self, x, context=None):
        if not fusable(x) or not _own(self):
            return super().forward(x, context)
        return self._fastflow_couple(x, context, False)

    def inverse(self, z, context=None):
        if not fusable(z) or not _own(self):
            return super().inverse(z, context)
        return self._fastflow_couple(z, context, True)

    def _fastflow_couple(self, x, context, inverse):
        batch, transform = x.shape[:x.dim() - len(self.event_shape)], _Transform(self.transformer)
        kept, order, back = _order(self, x.device)
        rows = x.reshape(-1, self.n_dim)
        rows = rows if order is None else reorder(rows, order, back)

        def condition(passive):
            h = self.conditioner_transform(passive.reshape(*batch, *self.coupling.constant_shape), context=context)
            return h.reshape(len(rows), -1).to(rows.dtype)

        step = self._fastflow_step(rows, context, transform, kept) if len(batch) == 1 else None
        if step is not None:
            y, logdet = run_steps(rows, (step,), context if context is None else context.flatten(1),
                                  inverse != transform.flipped)
        elif transform.kind is RationalQuadratic:
            parts = rows.split([kept, self.n_dim - kept] if kept >= 0 else [self.n_dim + kept, -kept], 1)
            passive, active = parts if kept >= 0 else parts[::-1]
            y, logdet = transform(active, condition(passive), inverse)
            y = torch.cat([passive, y] if kept >= 0 else [y, passive], 1)
        else:
            y, logdet = couple(rows, kept, condition, inverse != transform.flipped, **transform.dialect)
        y = (y if order is None else reorder(y, back, order)).view(x.shape)
        return y, _no_logdet(self, x) if transform.kind is affine.Shift else logdet.view(batch)

    def _fastflow_step(self, rows, context, transform, kept):
        """The coupling with its network as the step of one kernel, or None."""
        net = self.conditioner_transform
        if (transform.kind is RationalQuadratic or kept != self.n_dim // 2
                or not (plain(net, conditioners.FeedForward) or plain(net, conditioners.Linear))
                or net.n_global_parameters
                or (net.output_lower_bound, net.output_upper_bound) != (-math.inf, math.inf)
                or not plain(net.context_combiner, contexts.Concatenation)
                or not plain(net.sequential, nn.Sequential) or not plain(net.sequential[-1], nn.Unflatten)
                or not fits_one_kernel(rows, context if context is None else context.flatten(1))):
            return None
        found = weights_of(net.sequential[:-1])  # the last one only shapes the output
        if found is None:
            return None
        weights, biases, activation = found
        if not fusable(rows, *weights, *biases, *([] if context is None else [context])):
            return None
        return functional.MLPCoupling(weights, biases, activation=activation, **transform.dialect)


def _elementwise(module, x, h, inverse):
    """(y, log-determinant) of the module's transformer under the parameters h, (*batch, *event, P) or (*event, P)."""
    transformer = module.transformer
    kind = type(transformer)
    gains = kind is RationalQuadratic or kind is not affine.Shift and (
        x.numel() >= WIDE or x.device.type != "cpu" or verify.running())
    if not gains or not fusable(x, h) or not _own(module):
        return transformer.inverse(x, h) if inverse else transformer.forward(x, h)
    rows, params = x.reshape(-1, module.n_dim), h.reshape(-1, math.prod(transformer.parameter_shape))
    y, logdet = _Transform(transformer)(rows, params.expand(len(rows), -1), inverse)
    return y.view(x.shape), logdet.view(x.shape[:x.dim() - len(module.event_shape)])


class _Masked:
    """Every element is transformed as the elements before it say; the other direction goes element by element."""

    def apply_conditioner_transformer(self, inputs, context, forward=True):
        h = self.conditioner_transform(inputs, context)
        return _elementwise(self, inputs, h, not forward)


class _Elementwise:
    """A transform per element, the same for all samples or as the context says."""

    def forward(self, x, context=None):
        if self.training and getattr(self, "first_training_batch_pass", False):  # of an ActNorm
            return super().forward(x, context)
        return self._fastflow_apply(x, context, False, super().forward)

    def inverse(self, z, context=None):
        return self._fastflow_apply(z, context, True, super().inverse)

    def _fastflow_apply(self, x, context, inverse, original):
        batch = x.shape[:x.dim() - len(self.event_shape)]
        if not self.use_global_parameters:
            return _elementwise(self, x, self.prepare_h(context, batch), inverse)
        kind, value = type(self.transformer), self.value
        if not fusable(x, value) or not _own(self):
            return original(x, context)
        if kind is RationalQuadratic:
            return _elementwise(self, x, value, inverse)
        if kind is affine.Shift:
            return torch.sub(x, value[..., 0]) if inverse else x + value[..., 0], _no_logdet(self, x)
        # One scale for all samples, where torchflows repeats its parameters for each.
        scale, shift = self.transformer.constrain_scale(value[..., 0]), value[..., 1]
        logdet = torch.log(scale).sum()
        if inverse == (kind is affine.InverseAffine):
            return torch.addcmul(shift, x, scale), logdet.repeat(batch)
        return (x - shift) / scale, (-logdet).repeat(batch)


@swap(decomposition.LUMatrix, methods=("project_flat",), opposite=lambda *call: None)
class LUMatrix(decomposition.LUMatrix):
    """L U x, the two factors as one matrix where two products cost more than making it."""

    def project_flat(self, x_flat, context_flat=None):
        lower, upper = self.lower.compute_matrix(), self.upper.compute_matrix()
        large = x_flat.numel() * self.n_dim >= LARGE or x_flat.device.type != "cpu" or verify.running()
        if not large or not fusable(x_flat, lower, upper):
            return super().project_flat(x_flat, context_flat)
        return F.linear(x_flat, lower @ upper)


def _opposite_reversal(method, args, kwargs, result):
    return {"project_flat": "solve_flat", "solve_flat": "project_flat"}[method], (result, *args[1:]), kwargs


@swap(permutation.ReversePermutationMatrix, methods=("project_flat", "solve_flat"), opposite=_opposite_reversal)
class ReversePermutationMatrix(permutation.ReversePermutationMatrix):
    """Elements in reverse, without an index, whose gradient would be added place by place."""

    def project_flat(self, x_flat, context_flat=None):
        return x_flat.flip(-1)

    def solve_flat(self, b_flat, context=None):
        return b_flat.flip(-1)


def _register(mixin, *hosts, **options):
    """A subclass of every host under this module's name, in which the mixin comes first."""
    for host in hosts:
        body = {"__module__": __name__, "__doc__": mixin.__doc__}
        globals()[host.__name__] = swap(host, **options)(type(host.__name__, (mixin, host), body))


_register(_Coupling, layers_base.CouplingBijection, layers.AffineCoupling, layers.InverseAffineCoupling,
          layers.ShiftCoupling, layers.RQSCoupling, layers.LinearAffineCoupling, layers.LinearShiftCoupling,
          layers.LinearRQSCoupling, multiscale.CheckerboardCoupling, multiscale.ChannelWiseCoupling, fit=_fit_coupling)
_register(_Masked, layers_base.MaskedAutoregressiveBijection, layers_base.InverseMaskedAutoregressiveBijection,
          layers.AffineForwardMaskedAutoregressive, layers.AffineInverseMaskedAutoregressive,
          layers.RQSForwardMaskedAutoregressive, layers.RQSInverseMaskedAutoregressive, fit=_fit)
_register(_Elementwise, layers_base.ElementwiseBijection, layers.ElementwiseAffine, layers.ElementwiseInverseAffine,
          layers.ElementwiseShift, layers.ElementwiseRQSpline, layers.ActNorm, fit=_fit)
