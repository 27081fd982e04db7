"""Weights of Glow from four programs, folded into fastflow's own form of it."""

import re

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.flows.bases import DiagonalNormal
from fastflow.flows.glow import Glow
from fastflow.flows.weights.nflows import read_nflows
from fastflow.flows.weights.parts import ActNormWeights, GlowWeights, LevelWeights, NetWeights, PLUWeights, StepWeights
from fastflow.flows.weights.state import State, copy
from fastflow.functional import ScaleMap
from fastflow.nn import InvertibleConv1x1

__all__ = ["OnesPaddedConv", "load_glow"]


class OnesPaddedConv(nn.Conv2d):
    """A 3x3 convolution of an image framed by ones, as rosinality/glow-pytorch has it behind the conditioners."""

    def __init__(self, in_channels, out_channels):
        super().__init__(in_channels, out_channels, 3)

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), value=1.0))


def load_glow(state_dict, source, *, image_shape=None):
    """A :class:`Glow` with the weights that another program's state dict holds; its density is the same.

    What the originals have beside a plain Glow is folded into the weights: learned scales and activation
    normalisation of the conditioners, negative scales, interleaved parameters, biases behind 1x1 convolutions. A
    learned prior of the last latents becomes a DiagonalNormal.

    - "rosinality" (rosinality/glow-pytorch): ``blocks.i.flows.j.{actnorm, invconv, coupling}`` and
      ``blocks.i.prior``, 1x1 weights plain or as P L U, couplings affine or additive; convolutions padded with ones
      stay so.
    - "y0ast" (y0ast/Glow-PyTorch): ``flow.layers.i.{actnorm, invconv, block}``, ``flow.layers.i.conv`` of a split,
      ``learn_top_fn``, ``prior_h``, without class conditions.
    - "normflows": a MultiscaleFlow of GlowBlocks with their default options (``scale`` on or off, ``use_lu`` too),
      each level ending in Squeeze, with plain Merges and DiagGaussian or GlowBase bases without classes.
    - "nflows": a Flow of a MultiscaleCompositeTransform, each level a CompositeTransform of SqueezeTransform and steps
      of ActNorm, OneByOneConvolution and an affine or additive coupling whose network is three convolutions, 3x3, 1x1
      and 3x3 with ReLU; the half that stays at the split must be the couplings' passive one.

    Args:
        state_dict: {key: tensor}; keys may all begin with "module.".
        source: "rosinality", "y0ast", "normflows" or "nflows".
        image_shape: (C, H, W). y0ast's keys tell it, and normflows' with DiagGaussian bases.

    Returns:
        Glow in float32, in float64 if the weights are. Rebuild it from the original state dict, or keep it whole.

    Raises:
        ValueError: a missing or an unexpected key, or a shape that does not fit; the message names it.
    """
    checks.choice("source", source, tuple(READERS))
    state = State(state_dict)
    weights = READERS[source](state, image_shape)
    state.finish()
    if image_shape is not None and tuple(image_shape) != tuple(weights.image_shape):
        raise ValueError(f"image_shape: expected {tuple(weights.image_shape)}, as in the state dict, got "
                         f"{tuple(image_shape)}")
    return _build(weights).to(state.dtype)


def _build(weights):
    first = weights.levels[0].steps[0]
    steps = len(weights.levels[0].steps)
    additive = first.net[2].weight.shape[0] == first.norm.bias.shape[0] // 2
    learned = weights.levels[0].prior is not None
    model = Glow(weights.image_shape, len(weights.levels), steps, first.net[0].weight.shape[0],
                 scale="additive" if additive else weights.scale, shift_first=weights.shift_first,
                 learn_prior=learned).double()
    for level, own in zip(model.transform.levels, weights.levels, strict=True):
        for step, values in zip(level.steps, own.steps, strict=True):
            _set_step(step, values, weights.ones_padded)
        if own.prior is not None:
            level.split.scale = ScaleMap("exp")
            if weights.ones_padded:
                level.split.prior = _ones_padded(level.split.prior)
            _set_layer(level.split.prior, own.prior)
    if weights.base is not None:
        model.base = DiagonalNormal(weights.base[0].shape).double()
        copy(model.base.loc, weights.base[0])
        copy(model.base.log_scale, weights.base[1])
    return model


def _set_step(step, values, ones_padded):
    norm = step.conv.actnorm
    copy(norm.bias, values.norm.bias)
    copy(norm.log_scale, values.norm.log_scale)
    norm.initialized.fill_(values.norm.initialized)
    if isinstance(values.conv, PLUWeights):
        step.conv = InvertibleConv1x1(norm.channels, "plu", actnorm=norm, dtype=torch.float64)
        for name, value in values.conv._asdict().items():
            copy(getattr(step.conv, name), value)
    else:
        copy(step.conv.weight, values.conv)
    net = step.coupling.conditioner
    if ones_padded:
        net.conv3 = _ones_padded(net.conv3)
    for layer, weights in zip((net.conv1, net.conv2, net.conv3), values.net, strict=True):
        _set_layer(layer, weights)


def _ones_padded(conv):
    return OnesPaddedConv(conv.in_channels, conv.out_channels).double()


def _set_layer(layer, values):
    for name, value in values._asdict().items():
        target = getattr(layer, name)
        if target.shape != value.shape:
            raise ValueError(f"state_dict: expected shape {tuple(target.shape)} of a convolution's {name}, got "
                             f"{tuple(value.shape)}")
        copy(target, value)


def _scaled(weight, bias, scale):
    """(weight, bias) of a convolution whose outputs are multiplied per channel."""
    return NetWeights(weight * scale.view(-1, 1, 1, 1), bias * scale.flatten())


def _order(net, order):
    """The convolution with its outputs in another order."""
    return NetWeights(net.weight[order], net.bias[order])


def _plain(state, key):
    return NetWeights(state.take(key + ".weight", (None,) * 4), state.take(key + ".bias", (None,)))


def _permutation(state, key, channels):
    matrix = state.take(key, (channels, channels))
    perm = matrix.argmax(1)
    if not torch.equal(matrix, F.one_hot(perm, channels).to(matrix)) or len(perm.unique()) < channels:
        raise ValueError(f"state_dict: expected a permutation matrix in {key!r}, got another one")
    return perm


def _rosinality(state, image_shape):
    levels, steps = state.count(r"blocks\.(\d+)\."), state.count(r"blocks\.0\.flows\.(\d+)\.")
    image_shape = _given(state, image_shape, state.size("blocks.0.flows.0.actnorm.loc", 1))
    found = []
    for level in range(levels):
        found.append([])
        for step in range(steps):
            key = f"blocks.{level}.flows.{step}."
            channels = state.size(key + "actnorm.loc", 1)
            loc = state.take(key + "actnorm.loc", (1, channels, 1, 1)).flatten()
            scale = state.take(key + "actnorm.scale", (1, channels, 1, 1)).flatten()
            norm = ActNormWeights(loc, scale.abs().log(), bool(state.take(key + "actnorm.initialized")))
            signs = torch.where(scale < 0, -1.0, 1.0).to(scale)  # ours is positive: its sign goes into the convolution
            if key + "invconv.weight" in state.left:
                conv = state.take(key + "invconv.weight", (channels, channels, 1, 1))[:, :, 0, 0] * signs
            else:
                square = channels, channels
                upper, sign = state.take(key + "invconv.w_u", square), state.take(key + "invconv.s_sign", (channels,))
                conv = PLUWeights(state.take(key + "invconv.w_l", square).tril(-1), upper.triu(1) * signs,
                                  state.take(key + "invconv.w_s", (channels,)), sign * signs,
                                  _permutation(state, key + "invconv.w_p", channels))
                state.discard(*(key + f"invconv.{name}" for name in ("u_mask", "l_mask", "l_eye")))
            last = _ones_conv(state, key + "coupling.net.4")
            if len(last.bias) == channels:  # the scale comes first there
                last = _order(last, torch.arange(channels).roll(channels // 2))
            net = _plain(state, key + "coupling.net.0"), _plain(state, key + "coupling.net.2"), last
            found[-1].append(StepWeights(norm, conv, net))
    priors = [_ones_conv(state, f"blocks.{level}.prior") for level in range(levels)]
    shape = _latent(image_shape, levels)
    framed = F.pad(torch.zeros(1, *shape, dtype=torch.float64), (1, 1, 1, 1), value=1.0)
    return GlowWeights(image_shape, [*map(LevelWeights, found, [*priors[:-1], None])],
                       _last_base(F.conv2d(framed, *priors[-1])[0], image_shape), ones_padded=True)


def _ones_conv(state, key):
    conv = _plain(state, key + ".conv")
    return _scaled(*conv, torch.exp(3.0 * state.take(key + ".scale", (1, len(conv.bias), 1, 1))))


def _y0ast(state, image_shape):
    total = state.count(r"flow\.layers\.(\d+)\.")
    splits = sorted(int(found[1]) for found in (re.match(r"flow\.layers\.(\d+)\.conv\.logs", key)
                                                for key in state.left) if found)
    levels = len(splits) + 1
    steps = (splits[0] if splits else total) - 1
    channels, rows, columns = (state.size("prior_h", dim) for dim in (1, 2, 3))
    image_shape = channels // (4 * 2**levels), rows * 2**levels, columns * 2**levels
    found = []
    for level in range(levels):
        start, read = level * (steps + 2), []
        for step in range(start + 1, start + 1 + steps):
            key = f"flow.layers.{step}."
            size = state.size(key + "actnorm.bias", 1)
            norm = ActNormWeights(state.take(key + "actnorm.bias", (1, size, 1, 1)).flatten(),
                                  state.take(key + "actnorm.logs", (1, size, 1, 1)).flatten(), True)
            last = _zeros_conv(state, key + "block.4")
            last = _order(last, _even_odd(size)) if len(last.bias) == size else last
            net = _normed(state, key + "block.0"), _normed(state, key + "block.2"), last
            read.append(StepWeights(norm, _y0ast_conv(state, key + "invconv.", size), net))
        prior = None
        if level < levels - 1:
            prior = _zeros_conv(state, f"flow.layers.{start + 1 + steps}.conv")
            prior = _order(prior, _even_odd(len(prior.bias)))
        found.append(LevelWeights(read, prior))
    prior = state.take("prior_h")
    base = None
    if "learn_top_fn.conv.weight" in state.left:
        prior = F.conv2d(prior, *_zeros_conv(state, "learn_top_fn"), padding=1)
    if prior.any():
        base = _last_base(prior[0], image_shape)
    return GlowWeights(image_shape, found, base)


def _y0ast_conv(state, key, channels):
    square = channels, channels
    if key + "lower" not in state.left:
        return state.take(key + "weight", square)
    state.discard(key + "l_mask", key + "eye")
    return PLUWeights(state.take(key + "lower", square).tril(-1), state.take(key + "upper", square).triu(1),
                      state.take(key + "log_s", (channels,)), state.take(key + "sign_s", (channels,)),
                      _permutation(state, key + "p", channels))


def _normed(state, key):
    """A convolution without bias, normalised: (conv(x) + b) e^l."""
    weight = state.take(key + ".conv.weight", (None,) * 4)
    shape = (1, len(weight), 1, 1)
    return _scaled(weight, state.take(key + ".actnorm.bias", shape).flatten(),
                   torch.exp(state.take(key + ".actnorm.logs", shape)))


def _zeros_conv(state, key):
    conv = _plain(state, key + ".conv")
    return _scaled(*conv, torch.exp(3.0 * state.take(key + ".logs", (len(conv.bias), 1, 1))))


def _normflows(state, image_shape):
    levels, entries = state.count(r"flows\.(\d+)\."), state.count(r"flows\.0\.(\d+)\.")
    channels = state.size(f"flows.{levels - 1}.0.flows.2.s", 1)
    if "q0.0.loc" in state.left and "q0.0.loc_logs" not in state.left and state.left["q0.0.loc"].dim() == 4:
        rows, columns = state.size("q0.0.loc", 2), state.size("q0.0.loc", 3)
        image_shape = channels // 4, rows * 2**levels, columns * 2**levels
    image_shape = _given(state, image_shape, channels)
    found = []
    for level in reversed(range(levels)):  # the coarsest comes first there, and every level runs from noise to data
        read = []
        for step in reversed(range(entries)):
            key = f"flows.{level}.{step}.flows."
            size = state.size(key + "2.s", 1)
            norm = ActNormWeights(-state.take(key + "2.t", (1, size, 1, 1)).flatten(),
                                  -state.take(key + "2.s", (1, size, 1, 1)).flatten(),
                                  bool(state.take(key + "2.data_dep_init_done") > 0))
            net = [_plain(state, f"{key}0.flows.1.param_map.net.{index}") for index in (0, 2, 4)]
            if len(net[2].bias) == size:
                net[2] = _order(net[2], _even_odd(size))
            signs = torch.ones_like(net[2].bias)
            signs[:size // 2] = -1.0  # (z - t) s there
            net[2] = _scaled(*net[2], signs)
            read.append(StepWeights(norm, _normflows_conv(state, key + "1.", size), tuple(net)))
        found.append(LevelWeights(read, None))
    parts = [_normflows_base(state, f"q0.{level}.", _latent(image_shape, levels - level, last=level == 0))
             for level in reversed(range(levels))]
    return GlowWeights(image_shape, found, tuple(torch.cat(values) for values in zip(*parts, strict=True)))


def _normflows_conv(state, key, channels):
    square = channels, channels
    if key + "L" not in state.left:
        return state.take(key + "W", square)
    state.discard(key + "eye")
    return PLUWeights(state.take(key + "L", square).tril(-1), state.take(key + "U", square).triu(1),
                      state.take(key + "log_S", (channels,)), state.take(key + "sign_S", (channels,)),
                      _permutation(state, key + "P", channels))


def _normflows_base(state, key, shape):
    """(mean, log sigma), flat, of one level's latents."""
    per_channel = key + "loc_logs" in state.left
    values = []
    for name in ("loc", "log_scale"):
        value = state.take(key + name, (1, shape[0], 1, 1) if per_channel else (1, *shape))
        if per_channel:
            value = value * torch.exp(3.0 * state.take(f"{key}{name}_logs", (1, shape[0], 1, 1)))
        values.append(value.expand(1, *shape).flatten())
    return values


def _given(state, image_shape, squeezed):
    """The image shape, which the caller tells where the keys don't."""
    if image_shape is None:
        raise ValueError("image_shape: expected (C, H, W), which this state dict does not tell, got None")
    if 4 * image_shape[0] != squeezed:
        raise ValueError(f"image_shape: expected {squeezed // 4} channels, as in the state dict, got "
                         f"{tuple(image_shape)}")
    return tuple(image_shape)


def _latent(image_shape, level, last=True):
    """Shape of the latents that leave after ``level`` levels."""
    channels, rows, columns = image_shape
    return channels * 2**level * (2 if last else 1), rows // 2**level, columns // 2**level


def _last_base(params, image_shape):
    """(mean, log sigma), flat, of all latents, where those of the last level have ``params`` (2 C, H, W)."""
    mean, log_scale = params.chunk(2, 0)
    front = mean.new_zeros(image_shape[0] * image_shape[1] * image_shape[2] - mean.numel())
    return torch.cat([front, mean.flatten()]), torch.cat([front, log_scale.flatten()])


def _even_odd(size):
    """Interleaved outputs to halves: the even ones first."""
    return torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)])


def _nflows(state, image_shape):
    return read_nflows(state, lambda squeezed: _given(state, image_shape, squeezed))


READERS = {"rosinality": _rosinality, "y0ast": _y0ast, "normflows": _normflows, "nflows": _nflows}
