"""normflows: couplings, masked and Glow blocks, 1x1 convolutions, ActNorm, splines. ``forward`` is noise to data."""

import torch
from normflows import ConditionalNormalizingFlow, MultiscaleFlow, NormalizingFlow, nets
from normflows.flows import mixing, normalization
from normflows.flows.affine import autoregressive, coupling, glow
from normflows.flows.neural_spline import autoregressive as spline_autoregressive
from normflows.flows.neural_spline import coupling as spline_coupling
from normflows.nets import made, resnet
from torch import nn

from fastflow import backends, functional
from fastflow.adapters import lu, splines
from fastflow.adapters.layers import autocasts, couple, fusable, plain, remembered, worthwhile
from fastflow.adapters.networks import (
    NETWORKS,
    AffineAutoregressive,
    fit_affine,
    fits_one_kernel,
    residual_weights,
    weights_of,
)
from fastflow.adapters.swap import PREFIX, swap, swap_of
from fastflow.autograd.mlp_flow import run_steps
from fastflow.functional import ScaleMap
from fastflow.nn.channel_affine import channel_affine

EXAMPLES = {kind: lambda flow, *example: flow.log_prob(*example)
            for kind in (NormalizingFlow, ConditionalNormalizingFlow, MultiscaleFlow)}
DIALECTS = {kind: {"scale": ScaleMap.normflows(kind), "layout": "interleave", "order": "shift_scale"}
            for kind in ("exp", "sigmoid", "sigmoid_inv")}
ADDITIVE = {"scale": ScaleMap("additive")}


def _residual_net(network, context):
    if context is not None or network.preprocessing is not None:
        return None
    return residual_weights(network, resnet.ResidualBlock, nn.Linear)


def _made(network, context):
    if context is not None or not plain(network.preprocessing, nn.Identity):
        return None
    return residual_weights(network, made.MaskedResidualBlock, made.MaskedLinear)


NETWORKS |= {resnet.ResidualNet: _residual_net, made.MADE: _made}


def _dialect(module):
    return DIALECTS[module.scale_map] if module.scale else ADDITIVE


def _fit_affine(module, fix):
    if module.scale and module.scale_map not in DIALECTS:
        return f"an unknown scale_map {module.scale_map!r}"
    return {PREFIX + "fix": fix}


@swap(coupling.AffineCoupling, fit=_fit_affine)
class AffineCoupling(coupling.AffineCoupling):
    """[z1, z2 * s(z1) + t(z1)] of a list [z1, z2]. normflows takes the logarithm of a sigmoid, infinite where that
    underflows; the kernel does not, and with ``fix=True`` small calls go to it too."""

    _fastflow_fix = False  # of layers that the class made itself

    def forward(self, z):
        return self._fastflow_couple(z, False)

    def inverse(self, z):
        return self._fastflow_couple(z, True)

    def _fastflow_couple(self, z, inverse):
        z1, z2 = z
        if not ((self._fastflow_fix or worthwhile(z2)) and fusable(z2, z1)):
            return (super().inverse if inverse else super().forward)(z)
        z2, log_det = functional.affine_coupling(z2, self.param_map(z1), inverse=inverse, **_dialect(self))
        return [z1, z2], log_det


def _inner(block):
    """The coupling of an AffineCouplingBlock whose split is by channels, where nothing hangs on the three layers that
    the block is made of; else None."""
    parts = list(block._modules["flows"]._modules.values())
    if len(parts) != 3 or nn.modules.module._has_any_global_hook():
        return None
    split, inner, merge = parts
    if (split.mode in ("channel", "channel_inv") and split.mode == merge.mode and plain(split, coupling.Split)
            and plain(merge, coupling.Merge)
            and (plain(inner, AffineCoupling) or plain(inner, AffineCoupling.Checked))):
        return inner
    return None


def _fit_block(module, fix):
    parts = list(module.flows)
    if [type(part) for part in parts[::2]] != [coupling.Split, coupling.Merge] or len(parts) != 3:
        return "its split and merge are not normflows' own"
    return None


def _couple(block, z, inverse):
    """(z, log_det) of a coupling block, or None where that is better left to the host."""
    inner = _inner(block)
    if inner is None or not fusable(z):
        return None
    channels = z.shape[1]
    kept = (channels + 1) // 2
    if block.flows[0].mode == "channel_inv":
        kept -= channels
    net = inner.param_map
    if channels % 2 == 0 and plain(net, nets.MLP) and fits_one_kernel(z):
        found = weights_of(net.net)
        if found is not None and fusable(z, *found[0], *found[1]):
            weights, biases, activation = found
            step = functional.MLPCoupling(weights, biases, flip=kept < 0, activation=activation, **_dialect(inner))
            return run_steps(z, (step,), None, inverse)
    if not worthwhile(z):
        return None
    return couple(z, kept, inner.param_map, inverse, **_dialect(inner))


@swap(coupling.AffineCouplingBlock, fit=_fit_block)
class AffineCouplingBlock(coupling.AffineCouplingBlock):
    """Split by channels, affine coupling and merge in one pass."""

    def forward(self, z):
        found = _couple(self, z, False)
        return super().forward(z) if found is None else found

    def inverse(self, z):
        found = _couple(self, z, True)
        return super().inverse(z) if found is None else found


def _binary(b):
    """Whether a mask is of zeros and ones."""
    return torch.equal(b, (b != 0).to(b.dtype))


def _is_binary(module):
    return remembered(module, "binary", _binary, module.b, maybe=True)


def _fit_masked(module, fix):
    if module.b.dtype is torch.bool:
        return "its mask is of torch.bool, which can't be subtracted from 1"
    return None if _is_binary(module) else "its mask has other values than 0 and 1"


@swap(coupling.MaskedAffineFlow, fit=_fit_masked)
class MaskedAffineFlow(coupling.MaskedAffineFlow):
    """b*z + (1 - b)*(z*exp(s(b*z)) + t(b*z)) with a mask b of zeros and ones."""

    def forward(self, z):
        return self._fastflow_couple(z, False)

    def inverse(self, z):
        return self._fastflow_couple(z, True)

    def _fastflow_couple(self, z, inverse):
        if not fusable(z, self.b) or not _is_binary(self):
            return (super().inverse if inverse else super().forward)(z)
        masked, active = self.b * z, 1 - self.b
        # A raw scale and a shift of 0 leave a passive element alone and add nothing to the log-determinant.
        return functional.affine_coupling(z, (active * self.s(masked), active * self.t(masked)), inverse=inverse)


def _weight(conv):
    """(W, log|det W|): data to noise."""
    if not conv.use_lu:
        return conv.W, functional.slogdet(conv.W)[1]
    perm = conv.P.argmax(1)  # (P A)[i] = A[perm[i]]
    weight = functional.plu_weight(conv.L[None], conv.U[None], conv.log_S[None], conv.sign_S[None], perm[None])[0]
    return weight, conv.log_S.sum()


def _inverse_weight(conv):
    """(W^-1, log|det W^-1|): noise to data."""
    if not conv.use_lu:
        _, logabsdet, inverse = functional.slogdet_inverse(conv.W)
        return inverse, -logabsdet
    weight, logabsdet = _weight(conv)
    return functional.slogdet_inverse(weight)[2], -logabsdet


def _anchor(conv):
    return conv.log_S if conv.use_lu else conv.W


@swap(mixing.Invertible1x1Conv)
class Invertible1x1Conv(mixing.Invertible1x1Conv):
    """W^-1 z at every position, W free or P L U."""

    def forward(self, z):
        if not fusable(z, _anchor(self)):
            return super().forward(z)
        weight, log_det = _inverse_weight(self)
        return channel_affine(z, weight, None), log_det * (z.shape[2] * z.shape[3])

    def inverse(self, z):
        if not fusable(z, _anchor(self)):
            return super().inverse(z)
        weight, log_det = _weight(self)
        return channel_affine(z, weight, None), log_det * (z.shape[2] * z.shape[3])


@swap(mixing._LULinear, fit=lu.fit)
class LULinear(lu.LULinear, mixing._LULinear):
    """y = L U x + b, the two factors as one matrix: part of LULinearPermute."""


def _ready(norm):
    """Whether an ActNorm had its first batch."""
    return remembered(norm, "ready", bool, norm.data_dep_init_done)


def _fit_norm(module, fix):
    _ready(module)


@swap(normalization.ActNorm, fit=_fit_norm)
class ActNorm(normalization.ActNorm):
    """z * exp(s) + t per channel."""

    def forward(self, z):
        if not _ready(self):
            return super().forward(z)
        return torch.addcmul(self.t, z, torch.exp(self.s)), self._fastflow_positions(z) * self.s.sum()

    def inverse(self, z):
        if not _ready(self):
            return super().inverse(z)
        return (z - self.t) * torch.exp(-self.s), -self._fastflow_positions(z) * self.s.sum()

    def _fastflow_positions(self, z):
        positions = 1
        for dim in self.batch_dims[1:]:
            positions *= z.shape[dim]
        return positions


def _fit_glow(module, fix):
    kinds = [type(part) if swap_of(part) is None else swap_of(part).host for part in module.flows]
    known = [coupling.AffineCouplingBlock, mixing.Invertible1x1Conv, normalization.ActNorm]
    return None if kinds == known or kinds == known[::2] else "its layers are not normflows' own"


@swap(glow.GlowBlock, fit=_fit_glow)
class GlowBlock(glow.GlowBlock):
    """Coupling, 1x1 convolution and ActNorm, the latter two as one matrix."""

    def forward(self, z):
        parts = self._fastflow_parts(z)
        if parts is None:
            return super().forward(z)
        block, conv, norm = parts
        z, log_det = _couple(block, z, False)
        weight, of_conv = _inverse_weight(conv)
        s, t = norm.s.view(-1), norm.t.view(-1)
        z = channel_affine(z, torch.exp(s)[:, None] * weight, t)
        return z, log_det + (of_conv + s.sum()) * (z.shape[2] * z.shape[3])

    def inverse(self, z):
        parts = self._fastflow_parts(z)
        if parts is None:
            return super().inverse(z)
        block, conv, norm = parts
        weight, of_conv = _weight(conv)
        s, t = norm.s.view(-1), norm.t.view(-1)
        weight = weight * torch.exp(-s)
        z = channel_affine(z, weight, -(weight @ t))
        total = (of_conv - s.sum()) * (z.shape[2] * z.shape[3])
        z, log_det = _couple(block, z, True)
        return z, log_det + total

    def _fastflow_parts(self, z):
        """(coupling block, convolution, ActNorm), or None where they are to be called one by one, as under autocast,
        which makes the convolution's output bfloat16 and ActNorm's float32."""
        parts = list(self._modules["flows"]._modules.values())
        if len(parts) != 3 or z.dim() != 4 or not worthwhile(z) or autocasts(z):
            return None
        block, conv, norm = parts
        if not all(plain(part, kind) or plain(part, kind.Checked) for part, kind in (
                (block, AffineCouplingBlock), (conv, Invertible1x1Conv), (norm, ActNorm))):
            return None
        if _inner(block) is None or not fusable(z, _anchor(conv), norm.s) or not _ready(norm):
            return None
        return block, conv, norm


CONVS = tuple(((size, size), (1, 1), (size // 2, size // 2), (1, 1), 1, "zeros") for size in (3, 1, 3))


def _fit_net(module, fix):
    layers = list(module.net)
    kinds = [type(layer) for layer in layers]
    if kinds != [nn.Conv2d, nn.LeakyReLU, nn.Conv2d, nn.LeakyReLU, nn.Conv2d]:
        return "it is not three convolutions with LeakyReLU between"
    if not _convolves(layers):
        return "its convolutions are not 3x3, 1x1, 3x3 with biases, each as large as its input"
    slopes = {layer.negative_slope for layer in layers[1::2]}
    return None if len(slopes) == 1 and min(slopes) >= 0 else "its LeakyReLUs differ"


def _options(conv):
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def _convolves(layers):
    """Whether the convolutions among five layers are those that the kernel has."""
    first, _, second, _, third = layers
    return (_options(first) == CONVS[0] and _options(second) == CONVS[1] and _options(third) == CONVS[2]
            and first._parameters.get("bias") is not None and second._parameters.get("bias") is not None
            and third._parameters.get("bias") is not None)


def _is_conv_net(layers):
    """Whether layers, exchanged or changed as they may have been since they were swapped, are those of the kernel."""
    return (len(layers) == 5 and all(plain(layer, nn.Conv2d if index % 2 == 0 else nn.LeakyReLU)
                                     for index, layer in enumerate(layers))
            and layers[1].negative_slope == layers[3].negative_slope and _convolves(layers))


@swap(nets.ConvNet2d, methods=("forward",), fit=_fit_net)
class ConvNet2d(nets.ConvNet2d):
    """Glow's conditioner, three convolutions as one kernel where there is one."""

    def forward(self, x):
        layers = list(self._modules["net"]._modules.values())
        if x.dim() == 4 and plain(self.net, nn.Sequential) and _is_conv_net(layers):
            operands = (x, *(p for layer in layers[::2] for p in (layer.weight, layer.bias)))
            if fusable(*operands) and backends.serves("conv_net", *operands):
                return functional.conv_net(*operands, negative_slope=layers[1].negative_slope)
        return super().forward(x)


@swap(spline_coupling.PiecewiseRationalQuadraticCoupling, fit=splines.fit_coupling)
class PiecewiseRationalQuadraticCoupling(splines.SplineCoupling, spline_coupling.PiecewiseRationalQuadraticCoupling):
    """A rational-quadratic spline with linear tails of the features that its mask selects."""


@swap(spline_coupling.PiecewiseRationalQuadraticCDF, fit=splines.fit)
class PiecewiseRationalQuadraticCDF(splines.SplineCDF, spline_coupling.PiecewiseRationalQuadraticCDF):
    """A rational-quadratic spline with linear tails per feature."""


@swap(spline_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive, fit=splines.fit)
class MaskedPiecewiseRationalQuadraticAutoregressive(
        splines.SplineAutoregressive, spline_autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive):
    """A rational-quadratic spline with linear tails per feature, given the features before it."""


@swap(autoregressive.MaskedAffineAutoregressive, fit=fit_affine)
class MaskedAffineAutoregressive(AffineAutoregressive, autoregressive.MaskedAffineAutoregressive):
    """z * (sigmoid(r + 2) + 1e-3) + t per feature, given the features before it."""

    DIALECT = {"scale": ScaleMap.nflows(), "layout": "interleave"}
