"""nflows' Glow: masks say which channels pass, so the order of the channels is followed through the model."""

import torch
import torch.nn.functional as F

from fastflow.flows.weights.parts import ActNormWeights, GlowWeights, LevelWeights, NetWeights, StepWeights
from fastflow.functional import ScaleMap

__all__ = ["read_nflows"]

ROOT = "_transform._transforms."
MIN_PIVOT = 1e-3  # LULinear's eps


def read_nflows(state, image_shape):
    """:class:`GlowWeights` of a state dict; ``image_shape`` is a function of the channels behind the first squeeze."""
    levels = state.count(ROOT.replace(".", r"\.") + r"(\d+)\.")
    found, order = [], None
    for level in range(levels):
        parts = _parts(state, f"{ROOT}{level}.")
        read = []
        for norm_key, conv_key, coupling_key in zip(parts[0::3], parts[1::3], parts[2::3], strict=False):
            incoming = torch.arange(state.size(norm_key + "shift", 0)) if order is None else order
            step, order = _step(state, norm_key, conv_key, coupling_key, incoming)
            read.append(step)
        found.append(LevelWeights(read, None))
        if level == 0:
            shape = image_shape(len(order))
        if level < levels - 1:
            # The first half leaves there and the second goes on: it must be what the couplings pass.
            half = len(order) // 2
            kept = order[:half] - half
            if bool((kept < 0).any()):
                raise ValueError(f"state_dict: expected {parts[-1] + 'identity_features'!r} to be the second half of "
                                 f"the channels, which goes on to the next level, got others")
            order = (4 * kept[:, None] + torch.arange(4)).flatten()
    state.discard("_distribution._log_z")
    return GlowWeights(shape, found, None, scale=ScaleMap.nflows(), shift_first=False)


def _parts(state, prefix):
    """The prefixes of ActNorm, OneByOneConvolution and coupling of every step of a level, in order."""
    ends = ("log_scale", "lower_entries", "identity_features")
    parts = []
    for key in state.left:
        for kind, end in enumerate(ends):
            if key.startswith(prefix) and key.endswith("." + end):
                parts.append((kind, key[:-len(end)]))
    for position, (kind, key) in enumerate(parts):
        if kind != position % 3:
            raise ValueError(f"state_dict: unexpected key {key + ends[kind]!r}, a step is ActNorm, OneByOneConvolution "
                             f"and coupling in turn")
    if not parts or len(parts) % 3:
        raise ValueError(f"state_dict: missing key {prefix + '*.' + ends[len(parts) % 3]!r}")
    return [key for _, key in parts]


def _step(state, norm_key, conv_key, coupling_key, incoming):
    """(StepWeights, order of the channels behind it) for channels that come in the order ``incoming``."""
    channels = len(incoming)
    log_scale, shift = (state.take(norm_key + name, (channels,)) for name in ("log_scale", "shift"))
    initialized = bool(state.take(norm_key + "initialized"))
    weight, bias = _convolution(state, conv_key, channels)
    # W (x e^l + shift) + b = W ((x + (shift + W^-1 b) e^-l) e^l)
    offset = (shift + torch.linalg.solve(weight, bias)) * torch.exp(-log_scale)
    passive, active = (state.take(coupling_key + name) for name in ("identity_features", "transform_features"))
    outgoing = torch.cat([passive, active])
    if len(passive) != channels // 2 or len(outgoing) != channels:
        raise ValueError(f"state_dict: expected {channels // 2} features in {coupling_key + 'identity_features'!r}, "
                         f"got {len(passive)}")
    norm = ActNormWeights(offset[incoming], log_scale[incoming], initialized)
    return StepWeights(norm, weight[outgoing][:, incoming], _network(state, coupling_key + "transform_net.")), outgoing


def _convolution(state, key, channels):
    """(L U P, bias)."""
    pairs = channels * (channels - 1) // 2
    lower, upper = (torch.eye(channels, dtype=torch.float64) for _ in range(2))
    lower[tuple(torch.tril_indices(channels, channels, -1))] = state.take(key + "lower_entries", (pairs,))
    upper[tuple(torch.triu_indices(channels, channels, 1))] = state.take(key + "upper_entries", (pairs,))
    pivots = F.softplus(state.take(key + "unconstrained_upper_diag", (channels,))) + MIN_PIVOT
    upper = upper.diagonal_scatter(pivots)
    permutation = state.take(key + "permutation._permutation", (channels,))
    weight = torch.zeros_like(lower)
    weight[:, permutation] = lower @ upper
    return weight, state.take(key + "bias", (channels,))


def _network(state, prefix):
    """The three convolutions of a conditioner, whatever they are called."""
    names = [key[:-len(".weight")] for key in state.left if key.startswith(prefix) and key.endswith(".weight")]
    if len(names) != 3:
        raise ValueError(f"state_dict: expected three convolutions under {prefix!r}, got {len(names)} weights")
    return tuple(NetWeights(state.take(name + ".weight", (None, None, size, size)), state.take(name + ".bias", (None,)))
                 for name, size in zip(names, (3, 1, 3), strict=True))
