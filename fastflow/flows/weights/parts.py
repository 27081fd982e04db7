"""A Glow's weights in fastflow's form, as readers hand them over."""

from typing import NamedTuple

import torch

from fastflow.functional import ScaleMap

__all__ = ["ActNormWeights", "GlowWeights", "LevelWeights", "NetWeights", "PLUWeights", "StepWeights"]


class NetWeights(NamedTuple):
    """One convolution."""

    weight: torch.Tensor
    bias: torch.Tensor


class ActNormWeights(NamedTuple):
    """z = (x + bias) e^log_scale."""

    bias: torch.Tensor
    log_scale: torch.Tensor
    initialized: bool


class PLUWeights(NamedTuple):
    """A 1x1 weight by the names of nn.InvertibleConv1x1."""

    lower: torch.Tensor
    upper: torch.Tensor
    log_s: torch.Tensor
    sign_s: torch.Tensor
    perm: torch.Tensor


class StepWeights(NamedTuple):
    """ActNorm, 1x1 weight (C, C) or PLUWeights, and the three convolutions, whose outputs are shift, then scale."""

    norm: ActNormWeights
    conv: torch.Tensor | PLUWeights
    net: tuple[NetWeights, NetWeights, NetWeights]


class LevelWeights(NamedTuple):
    """The steps, and the convolution that makes mean and log sigma of what leaves, or None."""

    steps: list[StepWeights]
    prior: NetWeights | None


class GlowWeights(NamedTuple):
    """A model; ``base`` is (mean, log sigma) of all latents, or None for N(0, I)."""

    image_shape: tuple[int, int, int]
    levels: list[LevelWeights]
    base: tuple[torch.Tensor, torch.Tensor] | None
    ones_padded: bool = False
    scale: ScaleMap | None = None
    shift_first: bool = True
