"""nflows: couplings, autoregressive transforms, linear maps, ActNorm. Data to noise; log-determinants (B,)."""

import torch
from nflows.flows import Flow
from nflows.nn.nets import resnet
from nflows.transforms import autoregressive, base, conv, coupling, lu, made, nonlinearities, normalization
from nflows.transforms import permutations as orders
from torch import nn

from fastflow import backends
from fastflow.adapters import lu as lu_maps
from fastflow.adapters import splines
from fastflow.adapters.layers import (
    autocasts,
    couple,
    fusable,
    joins,
    order,
    overridden,
    remembered,
    reorder,
    worthwhile,
)
from fastflow.adapters.networks import NETWORKS, AffineAutoregressive, covered, fit_affine, residual_weights
from fastflow.adapters.swap import swap, swap_of
from fastflow.autograd import chain, mlp
from fastflow.functional import ScaleMap
from fastflow.nn.channel_affine import channel_affine
from fastflow.nn.hooks import is_hooked

EXAMPLES = {Flow: lambda flow, inputs, context=None: flow.log_prob(inputs, context)}


def _residual_net(network, context):
    return None if context is not None else residual_weights(network, resnet.ResidualBlock, torch.nn.Linear)


def _made(network, context):
    if context is not None or not network.use_residual_blocks:
        return None
    return residual_weights(network, made.MaskedResidualBlock, made.MaskedLinear)


NETWORKS |= {resnet.ResidualNet: _residual_net, made.MADE: _made}


def _own_transform(module):
    """Why a coupling does something else to a feature than its class, or None."""
    return overridden(module, "_scale_and_shift", "_coupling_transform_forward", "_coupling_transform_inverse")


def _fit_coupling(module, fix):
    if module.unconditional_transform is not None:
        return "it transforms the passive features too"
    reason = _own_transform(module)
    if reason is not None:
        return reason
    order(module, module.identity_features, module.transform_features)
    return None


class _Coupling:
    """A coupling in the DIALECT of functional.affine_coupling."""

    def forward(self, inputs, context=None):
        found = self._fastflow_couple(inputs, context, False)
        return super().forward(inputs, context) if found is None else found

    def inverse(self, inputs, context=None):
        found = self._fastflow_couple(inputs, context, True)
        return super().inverse(inputs, context) if found is None else found

    def _fastflow_couple(self, inputs, context, inverse):
        """(outputs, logabsdet), or None where that is better left to the host, which refuses what it can't take."""
        if (inputs.dim() not in (2, 4) or inputs.shape[1] != self.features or not fusable(inputs)
                or self.unconditional_transform is not None or _own_transform(self) is not None):
            return None
        network = self.transform_net
        kernel = covered(network, inputs, context)
        if kernel is None and not worthwhile(inputs):
            return None
        kept, indices, back = order(self, self.identity_features, self.transform_features)
        x = inputs if indices is None else reorder(inputs, indices, back)
        y, logdet = couple(x, kept, (lambda passive: network(passive, context)) if kernel is None else
                           (lambda passive: mlp.run(passive, *kernel)), inverse, **self.DIALECT)
        return (y if indices is None else reorder(y, back, indices)), logdet


@swap(coupling.AffineCouplingTransform, fit=_fit_coupling)
class AffineCouplingTransform(_Coupling, coupling.AffineCouplingTransform):
    """y = x * (sigmoid(r + 2) + 1e-3) + t of the features that its mask selects."""

    DIALECT = {"scale": ScaleMap.nflows(), "order": "shift_scale"}


@swap(coupling.AdditiveCouplingTransform, fit=_fit_coupling)
class AdditiveCouplingTransform(_Coupling, coupling.AdditiveCouplingTransform):
    """y = x + t of the features that its mask selects."""

    DIALECT = {"scale": ScaleMap("additive")}


@swap(coupling.PiecewiseRationalQuadraticCouplingTransform, fit=splines.fit_coupling)
class PiecewiseRationalQuadraticCouplingTransform(splines.SplineCoupling,
                                                  coupling.PiecewiseRationalQuadraticCouplingTransform):
    """A rational-quadratic spline with linear tails of the features that its mask selects."""


@swap(nonlinearities.PiecewiseRationalQuadraticCDF, fit=splines.fit)
class PiecewiseRationalQuadraticCDF(splines.SplineCDF, nonlinearities.PiecewiseRationalQuadraticCDF):
    """A rational-quadratic spline with linear tails per feature."""


@swap(autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, fit=splines.fit)
class MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        splines.SplineAutoregressive, autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform):
    """A rational-quadratic spline with linear tails per feature, given the features before it."""


EPSILON = 1e-3  # what nflows adds to the scales


def _fit_affine(module, fix):
    if module._epsilon != EPSILON:
        return f"the kernel adds {EPSILON} to its scales, not {module._epsilon}"
    return fit_affine(module, fix)


@swap(autoregressive.MaskedAffineAutoregressiveTransform, fit=_fit_affine)
class MaskedAffineAutoregressiveTransform(AffineAutoregressive, autoregressive.MaskedAffineAutoregressiveTransform):
    """y = x * (softplus(r) + 1e-3) + t per feature, given the features before it."""

    DIALECT = {"scale": ScaleMap("softplus", eps=EPSILON), "layout": "interleave"}
    FIT = staticmethod(_fit_affine)


@swap(lu.LULinear, fit=lu_maps.fit)
class LULinear(lu_maps.LULinear, lu.LULinear):
    """y = L U x + b, the two factors as one matrix."""


def _placed(matrix, dim, module):
    """The matrix times a convolution's permutation matrix P from the right (dim 1), or P^T times it (dim 0)."""
    return torch.empty_like(matrix).index_copy(dim, module.permutation._permutation, matrix)


PERMUTATIONS = (orders.RandomPermutation, orders.Permutation, orders.ReversePermutation)


def _permutes(permutation):
    """Whether a convolution's permutation is one of nflows' own, of channels."""
    return type(permutation) in PERMUTATIONS and permutation._dim == 1


def _fit_conv(module, fix):
    if not _permutes(module.permutation):
        return "its permutation is not nflows' own, of channels"
    lu_maps.remember(module)
    return None


@swap(conv.OneByOneConvolution, fit=_fit_conv)
class OneByOneConvolution(conv.OneByOneConvolution):
    """y = L U P x + b at every position, the three factors as one matrix."""

    def forward(self, inputs, context=None):
        if not self._fastflow_fits(inputs):
            return super().forward(inputs, context)
        weight, logabsdet = lu_maps.weight(self)
        weight = _placed(weight, 1, self)
        outputs = channel_affine(inputs, weight, self.bias)
        return outputs, (inputs.shape[2] * inputs.shape[3] * logabsdet).repeat(inputs.shape[0])

    def inverse(self, inputs, context=None):
        if not self._fastflow_fits(inputs) or autocasts(inputs):  # nflows solves in float32
            return super().inverse(inputs, context)
        size, (_, _, height, width) = self.features, inputs.shape
        identity = torch.eye(size, dtype=inputs.dtype, device=inputs.device)
        matrix, logabsdet = lu_maps.solve(self, identity + self.bias)
        matrix = _placed(matrix.mT, 0, self)
        outputs = channel_affine(inputs, matrix, -(matrix @ self.bias))
        return outputs, (-height * width * logabsdet).repeat(inputs.shape[0])

    def _fastflow_fits(self, inputs):
        permutation = self.permutation
        return (inputs.dim() == 4 and not (self.using_cache and not self.training) and fusable(inputs, self.bias)
                and _permutes(permutation) and not is_hooked(permutation))


def _ready(norm):
    """Whether an ActNorm had its first batch."""
    return remembered(norm, "ready", bool, norm.initialized)


def _fit_norm(module, fix):
    _ready(module)


@swap(normalization.ActNorm, fit=_fit_norm)
class ActNorm(normalization.ActNorm):
    """y = x * exp(log_scale) + shift per channel."""

    def forward(self, inputs, context=None):
        if self.training and not _ready(self) or not self._fastflow_fits(inputs):
            return super().forward(inputs, context)
        scale, shift = self._broadcastable_scale_shift(inputs)
        return torch.addcmul(shift, inputs, scale), self._fastflow_logabsdet(inputs)

    def inverse(self, inputs, context=None):
        if not self._fastflow_fits(inputs):
            return super().inverse(inputs, context)
        scale, shift = self._broadcastable_scale_shift(inputs)
        return (inputs - shift) / scale, -self._fastflow_logabsdet(inputs)

    def _fastflow_fits(self, inputs):
        return inputs.dim() in (2, 4) and fusable(inputs, self.log_scale)

    def _fastflow_logabsdet(self, inputs):
        positions = inputs.shape[2] * inputs.shape[3] if inputs.dim() == 4 else 1
        return (positions * self.log_scale.sum()).repeat(inputs.shape[0])


CHAINED = (coupling.PiecewiseRationalQuadraticCouplingTransform,
           autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform, lu.LULinear)


def _fit_composite(module, fix):
    known = [isinstance(transform, CHAINED) for transform in module._transforms]
    pairs = any(a and b for a, b in zip(known, known[1:], strict=False))
    return None if pairs else "no two of its layers in a row go through one node of autograd"


@swap(base.CompositeTransform, fit=_fit_composite)
class CompositeTransform(base.CompositeTransform):
    """Splines and linear maps in a row as one node of autograd; the others one by one."""

    def forward(self, inputs, context=None):
        if (torch.compiler.is_compiling() or autocasts(inputs)
                or nn.modules.module._has_any_global_hook() or backends.needs_reference((inputs,)) is not None):
            return super().forward(inputs, context)
        outputs, total, steps = inputs, inputs.new_zeros(len(inputs)), []
        for transform in (*self._transforms, None):
            step = None if transform is None else self._fastflow_step(transform, outputs, context)
            if step is not None:
                steps.append(step)
                continue
            if steps:
                outputs, logabsdet = chain.run(outputs, steps)
                total += logabsdet
                steps = []
            if transform is not None:
                outputs, logabsdet = transform(outputs, context)
                total += logabsdet
        return outputs, total

    def _fastflow_step(self, transform, inputs, context):
        known = swap_of(transform)
        if known is None or known.host not in CHAINED or not joins(transform):
            return None
        return transform._fastflow_step(inputs, context)
