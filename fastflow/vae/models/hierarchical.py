"""Ready VAEs with latents in levels."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.nn.fused_sequential import FusedSequential, stacked
from fastflow.vae.hierarchy import HierarchicalVAE
from fastflow.vae.level import Level
from fastflow.vae.model import likelihood_of
from fastflow.vae.models.basic import front
from fastflow.vae.networks import image_sizes
from fastflow.vae.top_down import ResidualMerge

__all__ = ["HVAE", "NVAE", "VDVAE"]


def _zeroed(layer):
    """The layer with weights and bias at zero, so that what it adds starts as nothing."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class _BottomUp(nn.Module):
    """Stages one after the other; ``taken[i]`` features of stage i, each with a head of its own or as they are."""

    def __init__(self, stages, taken):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.taken = taken

    def forward(self, x):
        first, *others = self.stages
        answers = [first(x)]
        together = stacked(others, answers[0])
        if together is None:
            for stage in others:
                answers.append(stage(answers[-1]))
        features = [answer for answer, count in zip(answers + (together or []), self.taken, strict=True)
                    for _ in range(count)]
        return features[::-1]


class HVAE(HierarchicalVAE):
    """A hierarchical VAE with fully connected networks, a ladder of levels.

    Args:
        event_shape: of one x.
        latent_features: sizes of the levels, from the top down.
        hidden: width of the deterministic states.
        mode: "ladder", "residual" or "absolute", see Level.
        likelihood: a name as for VAE, or a likelihood object.
        objective: as for HierarchicalVAE.

    References:
        Sonderby et al., "Ladder variational autoencoders", 2016, arXiv:1602.02282.
    """

    def __init__(self, event_shape, latent_features=(8, 16), hidden=256, *, mode="ladder", likelihood="bernoulli",
                 objective=None):
        likelihood = likelihood_of(likelihood)
        event_shape = checks.counts("event_shape", event_shape, 1)
        hidden = checks.count("hidden", hidden, 1)
        latent_features = [checks.count("latent_features", d, 1) for d in latent_features]
        size = math.prod(event_shape)
        stages = [nn.Sequential(*front(likelihood), nn.Flatten(), nn.Linear(size, hidden), nn.SiLU())]
        stages += [nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU()) for _ in latent_features[1:]]
        levels = []
        for d in latent_features:
            seen = hidden if mode == "ladder" else 2 * hidden
            last = nn.Linear(hidden, 2 * d)
            posterior = nn.Sequential(nn.Linear(seen, hidden), nn.SiLU(), _zeroed(last) if mode == "residual" else last)
            prior = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), _zeroed(nn.Linear(hidden, 2 * d)))
            merge = nn.Sequential(nn.Linear(hidden + d, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
            levels.append(Level(prior, posterior, ResidualMerge(merge, hidden), mode=mode))
        shape = likelihood.output_shape(event_shape)
        decoder = FusedSequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, math.prod(shape)),
                                  nn.Unflatten(1, shape))
        super().__init__(_BottomUp(stages, [1] * len(stages)), levels, decoder, likelihood, (hidden,),
                         objective=objective)
        self.event_shape = event_shape


class _Cell(nn.Module):
    """x + network(x), a bottleneck of 1x1, two 3x3 and 1x1 convolutions; the last starts small."""

    def __init__(self, channels, out_channels=None, inner=None, gain=1.0):
        super().__init__()
        out_channels, inner = out_channels or channels, inner or max(channels // 2, 4)
        last = nn.Conv2d(inner, out_channels, 1)
        with torch.no_grad():
            last.weight.mul_(gain)
            last.bias.zero_()
        self.network = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, inner, 1), nn.SiLU(),
                                     nn.Conv2d(inner, inner, 3, padding=1), nn.SiLU(),
                                     nn.Conv2d(inner, inner, 3, padding=1), nn.SiLU(), last)
        self.out_channels = out_channels

    def forward(self, x):
        return x[:, :self.out_channels] + self.network(x)


class _Upsample(nn.Module):
    """Twice the resolution by repetition, which keeps the 1/sqrt(depth) scale of residuals as it is."""

    def forward(self, x):
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class NVAE(HierarchicalVAE):
    """A deep hierarchical VAE for images: groups of latent maps from coarse to fine, residual posteriors, convolutional
    residual cells.

    Args:
        image_shape: (C, H, W).
        groups: latent groups at each resolution, coarsest first; the finest has half the sides of the image, each
            coarser one half of the finer one's.
        channels: of the states.
        latent_channels: of each group.
        mode: "residual" or "absolute", see Level.
        likelihood: a name as for VAE, or a likelihood object, such as LogisticMixtureLikelihood for pixels.
        objective: as for HierarchicalVAE.

    Raises:
        ValueError: the sides are not divisible by 2**len(groups).

    References:
        Vahdat and Kautz, "NVAE: a deep hierarchical variational autoencoder", 2020, arXiv:2007.03898.
    """

    def __init__(self, image_shape, groups=(2, 2), *, channels=32, latent_channels=8, mode="residual",
                 likelihood="bernoulli", objective=None):
        likelihood = likelihood_of(likelihood)
        checks.choice("mode", mode, ("residual", "absolute"))
        groups = [checks.count("groups", count, 1) for count in groups]
        channels = checks.count("channels", channels, 1)
        latent_channels = checks.count("latent_channels", latent_channels, 1)
        size, height, width = image_shape = image_sizes(image_shape)
        factor = 2 ** len(groups)
        if not groups or height % factor or width % factor:
            raise ValueError(f"image_shape: expected height and width divisible by {factor} for {len(groups)} "
                             f"resolutions, got {tuple(image_shape)}")
        gain = 1.0 / math.sqrt(sum(groups))
        stages, width_in, ahead = [], size, front(likelihood)
        for _ in groups:  # from the finest inwards
            stages.append(nn.Sequential(*ahead, nn.Conv2d(width_in, channels, 4, stride=2, padding=1),
                                        _Cell(channels, gain=gain)))
            width_in, ahead = channels, []
        levels = []
        for index, count in enumerate(groups):
            for group in range(count):
                prior_last, posterior_last = (nn.Conv2d(channels, 2 * latent_channels, 1) for _ in range(2))
                prior = nn.Sequential(_Cell(channels, gain=gain), _zeroed(prior_last))
                posterior = nn.Sequential(_Cell(2 * channels, channels), nn.SiLU(),
                                          _zeroed(posterior_last) if mode == "residual" else posterior_last)
                merge = [ResidualMerge(nn.Conv2d(channels + latent_channels, channels, 1), channels),
                         _Cell(channels, gain=gain)]
                if group == count - 1 and index < len(groups) - 1:
                    merge.append(_Upsample())
                levels.append(Level(prior, posterior, nn.Sequential(*merge), mode=mode))
        outputs = likelihood.output_shape(image_shape)[0]
        decoder = nn.Sequential(_Cell(channels, gain=gain), nn.SiLU(),
                                nn.ConvTranspose2d(channels, outputs, 4, stride=2, padding=1))
        super().__init__(_BottomUp(stages, list(groups)[::-1]), levels, decoder, likelihood,
                         (channels, height // factor, width // factor), objective=objective)
        self.event_shape = image_shape


class VDVAE(NVAE):
    """The same with posteriors whose mean and scale are given as they are, not relative to the prior.

    References:
        Child, "Very deep VAEs generalize autoregressive models and can outperform them on images", 2021,
        arXiv:2011.10650.
    """

    def __init__(self, image_shape, groups=(2, 2), **options):
        super().__init__(image_shape, groups, mode="absolute", **options)
