"""Glow in plain, careful eager PyTorch: the neutral baseline, as a good user would write it without fastflow.

Parameter by parameter it is the model of ``fastflow.flows.Glow``: :func:`load_weights` carries the weights over, and
both then compute the same likelihood.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class ActNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return (x + self.bias) * torch.exp(self.log_scale), self.log_scale.sum() * (x.shape[2] * x.shape[3])

    def inverse(self, z):
        return z * torch.exp(-self.log_scale) - self.bias


class Conv1x1(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x):
        logdet = torch.linalg.slogdet(self.weight)[1] * (x.shape[2] * x.shape[3])
        return F.conv2d(x, self.weight[:, :, None, None]), logdet

    def inverse(self, z):
        return F.conv2d(z, torch.linalg.inv(self.weight)[:, :, None, None])


class Coupling(nn.Module):
    def __init__(self, channels, hidden):
        super().__init__()
        half = channels // 2
        self.net = nn.Sequential(nn.Conv2d(half, hidden, 3, padding=1), nn.ReLU(inplace=True),
                                 nn.Conv2d(hidden, hidden, 1), nn.ReLU(inplace=True),
                                 nn.Conv2d(hidden, 2 * (channels - half), 3, padding=1))

    def forward(self, x):
        passive, active = x.chunk(2, 1)
        shift, raw = self.net(passive).chunk(2, 1)
        u = raw + 2.0
        z = torch.cat([passive, (active + shift) * torch.sigmoid(u)], 1)
        return z, F.logsigmoid(u).flatten(1).sum(1)

    def inverse(self, z):
        passive, active = z.chunk(2, 1)
        shift, raw = self.net(passive).chunk(2, 1)
        return torch.cat([passive, active / torch.sigmoid(raw + 2.0) - shift], 1)


class NeutralGlow(nn.Module):
    """log p(x) (B,) in nats of images (B, C, H, W); ``sample(n)``."""

    def __init__(self, image_shape, n_levels, n_steps, hidden_channels):
        super().__init__()
        channels, self.image_shape = image_shape[0], tuple(image_shape)
        self.levels, self.priors = nn.ModuleList(), nn.ModuleList()
        for level in range(n_levels):
            channels *= 4
            self.levels.append(nn.ModuleList(
                nn.ModuleList([ActNorm(channels), Conv1x1(channels), Coupling(channels, hidden_channels)])
                for _ in range(n_steps)))
            if level < n_levels - 1:
                channels //= 2
                self.priors.append(nn.Conv2d(channels, 2 * channels, 3, padding=1))

    def forward(self, x):
        logdet, log_prob = 0.0, 0.0
        for level, steps in enumerate(self.levels):
            x = F.pixel_unshuffle(x, 2)
            for step in steps:
                for layer in step:
                    x, term = layer(x)
                    logdet = logdet + term
            if level < len(self.priors):
                x, latent = x.chunk(2, 1)
                mean, raw = self.priors[level](x).chunk(2, 1)
                log_sigma = 5.0 * torch.tanh(raw / 5.0)
                normal = -0.5 * (((latent - mean) * torch.exp(-log_sigma)) ** 2 + math.log(2 * math.pi)) - log_sigma
                log_prob = log_prob + normal.flatten(1).sum(1)
        log_prob = log_prob + (-0.5 * (x**2 + math.log(2 * math.pi))).flatten(1).sum(1)
        return log_prob + logdet

    def decode(self, latents):
        """The images whose latents these are, finest first."""
        x = latents[-1]
        for level, steps in reversed(list(enumerate(self.levels))):
            if level < len(self.priors):
                mean, raw = self.priors[level](x).chunk(2, 1)
                x = torch.cat([x, mean + latents[level] * torch.exp(5.0 * torch.tanh(raw / 5.0))], 1)
            for step in reversed(steps):
                for layer in reversed(step):
                    x = layer.inverse(x)
            x = F.pixel_shuffle(x, 2)
        return x

    def sample(self, n):
        channels, height, width = self.image_shape
        weight = self.levels[0][0][1].weight
        memory_format = torch.channels_last if _in_channels_last(self) else torch.contiguous_format
        latents = []
        for level in range(len(self.levels)):
            channels, height, width = 4 * channels, height // 2, width // 2
            channels //= 2 if level < len(self.priors) else 1
            latents.append(torch.randn(n, channels, height, width, device=weight.device, dtype=weight.dtype)
                           .contiguous(memory_format=memory_format))
        return self.decode(latents)


def _in_channels_last(model):
    """Whether model.to(memory_format=torch.channels_last) has been called."""
    weight = model.levels[0][0][2].net[0].weight
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def pairs(neutral, glow):
    """(baseline's parameter, fastflow's parameter) for every parameter, shapes equal up to trailing ones."""
    for steps, level in zip(neutral.levels, glow.transform.levels, strict=True):
        for (actnorm, conv, coupling), step in zip(steps, level.steps, strict=True):
            yield actnorm.bias, step.conv.actnorm.bias
            yield actnorm.log_scale, step.conv.actnorm.log_scale
            yield conv.weight, step.conv.weight
            yield from zip(coupling.net.parameters(), step.coupling.conditioner.parameters(), strict=True)
    for prior, level in zip(neutral.priors, glow.transform.levels, strict=False):
        yield from zip(prior.parameters(), level.split.prior.parameters(), strict=True)


@torch.no_grad()
def load_weights(neutral, glow):
    """Give the baseline the weights of a fastflow.flows.Glow."""
    for mine, theirs in pairs(neutral, glow):
        mine.copy_(theirs.reshape(mine.shape))
