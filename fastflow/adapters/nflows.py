"""nflows: couplings, autoregressive transforms, linear maps, ActNorm. Data to noise; log-determinants (B,)."""

import torch
import torch.nn.functional as F
from nflows.flows import Flow
from nflows.nn.nets import resnet
from nflows.transforms import autoregressive, conv, coupling, lu, made, nonlinearities, normalization

from fastflow import functional
from fastflow.adapters import splines, verify
from fastflow.adapters.layers import couple, fusable, order_of, remembered, reorder, worthwhile
from fastflow.adapters.networks import NETWORKS, AffineAutoregressive, covered, residual_weights
from fastflow.adapters.swap import swap
from fastflow.autograd import mlp
from fastflow.functional import ScaleMap
from fastflow.nn.channel_affine import channel_affine

EXAMPLES = {Flow: lambda flow, inputs, context=None: flow.log_prob(inputs, context)}
LARGE = 1 << 20  # multiplications of a product with one factor of a linear map


def _residual_net(network, context):
    return None if context is not None else residual_weights(network, resnet.ResidualBlock, torch.nn.Linear)


def _made(network, context):
    if context is not None or not network.use_residual_blocks:
        return None
    return residual_weights(network, made.MaskedResidualBlock, made.MaskedLinear)


NETWORKS |= {resnet.ResidualNet: _residual_net, made.MADE: _made}


def _fit_coupling(module, fix):
    if module.unconditional_transform is not None:
        return "it transforms the passive features too"
    remembered(module, "order", order_of, module.identity_features, module.transform_features)
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
        if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features or not fusable(inputs):
            return None
        network = self.transform_net
        kernel = covered(network, inputs, context)
        if kernel is None and not worthwhile(inputs):
            return None
        kept, order, back = remembered(self, "order", order_of, self.identity_features, self.transform_features)
        x = inputs if order is None else reorder(inputs, order, back)
        y, logdet = couple(x, kept, (lambda passive: network(passive, context)) if kernel is None else
                           (lambda passive: mlp.run(passive, *kernel)), inverse, **self.DIALECT)
        return (y if order is None else reorder(y, back, order)), logdet


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


@swap(autoregressive.MaskedAffineAutoregressiveTransform)
class MaskedAffineAutoregressiveTransform(AffineAutoregressive, autoregressive.MaskedAffineAutoregressiveTransform):
    """y = x * (softplus(r) + 1e-3) + t per feature, given the features before it."""

    DIALECT = {"scale": ScaleMap("softplus", eps=1e-3), "layout": "interleave"}


def _triangles(module):
    """_places on the module's device, remembered."""
    device = module.bias.device
    return remembered(module, f"places_{device}", lambda: _places(module.features, device))


def _fit_linear(module, fix):
    _triangles(module)


def _fit_conv(module, fix):
    _triangles(module)
    _back(module)


def _places(features, device):
    """Where the entries below and above the diagonal, one after the other, lie in a flat matrix; 0 ... features - 1."""
    lower = torch.tril_indices(features, features, -1, device=device)
    upper = torch.triu_indices(features, features, 1, device=device)
    both = torch.cat([lower, upper], 1)
    return both[0] * features + both[1], torch.arange(features, device=device)[None]


def _factors(module):
    """(the entries of L and U off the diagonal in one matrix, U's diagonal)."""
    size, diagonal = module.features, module.upper_diag
    where, _ = _triangles(module)
    entries = torch.cat([module.lower_entries, module.upper_entries])
    return entries.new_zeros(size * size).index_copy(0, where, entries).view(size, size), diagonal


def _weight(module):
    """(L U, log|det|)."""
    matrix, diagonal = _factors(module)
    log_diagonal = torch.log(diagonal)
    _, identity = _triangles(module)
    weight = functional.plu_weight(matrix[None], matrix[None], log_diagonal[None], torch.ones_like(diagonal)[None],
                                   identity)
    return weight[0], log_diagonal.sum()


def _solve(module, rows):
    """(x with L U x = rows - bias along the last dim, log|det L U|)."""
    matrix, diagonal = _factors(module)
    upper = torch.triu(matrix, 1) + torch.diag(diagonal)
    half = torch.linalg.solve_triangular(matrix, (rows - module.bias).mT, upper=False, unitriangular=True)
    return torch.linalg.solve_triangular(upper, half, upper=True).mT, torch.log(diagonal).sum()


def _fits_linear(module, inputs, dims):
    """Whether a call of a linear map takes one matrix: on a CPU that gains where two products cost more than making
    it."""
    large = inputs.numel() * module.features >= LARGE or inputs.device.type != "cpu" or verify.running()
    return (large and inputs.dim() == dims and not (module.using_cache and not module.training)
            and fusable(inputs, module.bias))


@swap(lu.LULinear, fit=_fit_linear)
class LULinear(lu.LULinear):
    """y = L U x + b, the two factors as one matrix."""

    def forward(self, inputs, context=None):
        if not _fits_linear(self, inputs, 2):
            return super().forward(inputs, context)
        weight, logabsdet = _weight(self)
        return F.linear(inputs, weight, self.bias), logabsdet.repeat(inputs.shape[0])

    def inverse(self, inputs, context=None):
        if not _fits_linear(self, inputs, 2):
            return super().inverse(inputs, context)
        outputs, logabsdet = _solve(self, inputs)
        return outputs, (-logabsdet).repeat(inputs.shape[0])


def _back(module):
    """The inverse of a convolution's permutation."""
    return remembered(module, "back", torch.argsort, module.permutation._permutation)


@swap(conv.OneByOneConvolution, fit=_fit_conv)
class OneByOneConvolution(conv.OneByOneConvolution):
    """y = L U P x + b at every position, the three factors as one matrix."""

    def forward(self, inputs, context=None):
        if not _fits_linear(self, inputs, 4):
            return super().forward(inputs, context)
        weight, logabsdet = _weight(self)
        weight = reorder(weight, _back(self), self.permutation._permutation)
        outputs = channel_affine(inputs, weight, self.bias)
        return outputs, (inputs.shape[2] * inputs.shape[3] * logabsdet).repeat(inputs.shape[0])

    def inverse(self, inputs, context=None):
        if not _fits_linear(self, inputs, 4):
            return super().inverse(inputs, context)
        size, (_, _, height, width) = self.features, inputs.shape
        identity = torch.eye(size, dtype=inputs.dtype, device=inputs.device)
        matrix, logabsdet = _solve(self, identity + self.bias)
        matrix = matrix.mT.index_select(0, _back(self))
        outputs = channel_affine(inputs, matrix, -(matrix @ self.bias))
        return outputs, (-height * width * logabsdet).repeat(inputs.shape[0])


def _ready(norm):
    """Whether an ActNorm had its first batch."""
    return remembered(norm, "ready", bool, norm.initialized)


def _fit_norm(module, fix):
    _ready(module)


@swap(normalization.ActNorm, fit=_fit_norm)
class ActNorm(normalization.ActNorm):
    """y = x * exp(log_scale) + shift per channel."""

    def forward(self, inputs, context=None):
        if self.training and not _ready(self) or inputs.dim() not in (2, 4):
            return super().forward(inputs, context)
        scale, shift = self._broadcastable_scale_shift(inputs)
        return torch.addcmul(shift, inputs, scale), self._fastflow_logabsdet(inputs)

    def inverse(self, inputs, context=None):
        if inputs.dim() not in (2, 4):
            return super().inverse(inputs, context)
        scale, shift = self._broadcastable_scale_shift(inputs)
        return (inputs - shift) / scale, -self._fastflow_logabsdet(inputs)

    def _fastflow_logabsdet(self, inputs):
        positions = inputs.shape[2] * inputs.shape[3] if inputs.dim() == 4 else 1
        return (positions * self.log_scale.sum()).repeat(inputs.shape[0])
