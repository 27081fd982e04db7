"""Glow as the widely copied research code has it (github.com/rosinality/glow-pytorch, not on PyPI), written here anew.

Its idiom: an actnorm that asks a flag in every pass whether it is initialised; a 1x1 weight whose log-determinant is
taken in double, layer by layer, or assembled from P, L, U and s; convolutions padded by hand with ones whose outputs a
learned scale multiplies; log(sigmoid(r + 2)); a learned prior for the latents of every level, the last among them.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

GLOW_SETTINGS = {"plain 1x1": {"use_lu": False}, "LU 1x1": {"use_lu": True}}


class ActNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def _initialize(self, x):
        flat = x.transpose(0, 1).flatten(1)
        self.loc.copy_(-flat.mean(1).view(1, -1, 1, 1))
        self.scale.copy_(1 / (flat.std(1).view(1, -1, 1, 1) + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x):
        if self.initialized.item() == 0:
            self._initialize(x)
        logdet = x.shape[2] * x.shape[3] * torch.sum(torch.log(torch.abs(self.scale)))
        return self.scale * (x + self.loc), logdet


class Conv1x1(nn.Module):
    """W stored as it is, log|det W| from slogdet in double."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0][:, :, None, None].contiguous())

    def forward(self, x):
        logdet = x.shape[2] * x.shape[3] * torch.slogdet(self.weight.squeeze().double())[1].to(x.dtype)
        return F.conv2d(x, self.weight), logdet


class Conv1x1LU(nn.Module):
    """W = P L (U + diag(s)), assembled in every pass."""

    def __init__(self, channels):
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        diagonal = upper.diagonal()
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(diagonal.abs().log())
        for name, value in (("permutation", permutation), ("sign_s", diagonal.sign()), ("eye", torch.eye(channels)),
                            ("upper_mask", torch.ones(channels, channels).triu(1)),
                            ("lower_mask", torch.ones(channels, channels).tril(-1))):
            self.register_buffer(name, value)

    def forward(self, x):
        lower = self.lower * self.lower_mask + self.eye
        upper = self.upper * self.upper_mask + torch.diag(self.sign_s * torch.exp(self.log_s))
        weight = self.permutation @ lower @ upper
        return F.conv2d(x, weight[:, :, None, None]), x.shape[2] * x.shape[3] * torch.sum(self.log_s)


class ZeroConv(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.scale = nn.Parameter(torch.zeros(1, out_channels, 1, 1))

    def forward(self, x):
        return self.conv(F.pad(x, [1, 1, 1, 1], value=1)) * torch.exp(3 * self.scale)


class Coupling(nn.Module):
    def __init__(self, channels, hidden_channels):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels // 2, hidden_channels, 3, padding=1), nn.ReLU(inplace=True),
                                 nn.Conv2d(hidden_channels, hidden_channels, 1), nn.ReLU(inplace=True),
                                 ZeroConv(hidden_channels, channels))
        for layer in (self.net[0], self.net[2]):
            nn.init.normal_(layer.weight, 0, 0.05)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        passive, active = x.chunk(2, 1)
        raw, shift = self.net(passive).chunk(2, 1)
        s = torch.sigmoid(raw + 2)
        z = torch.cat([passive, (active + shift) * s], 1)
        return z, torch.log(s).flatten(1).sum(1)


def _log_normal(x, mean, log_sigma):
    return -0.5 * math.log(2 * math.pi) - log_sigma - 0.5 * (x - mean) ** 2 / torch.exp(2 * log_sigma)


class Level(nn.Module):
    def __init__(self, channels, n_steps, hidden_channels, split, use_lu):
        super().__init__()
        conv = Conv1x1LU if use_lu else Conv1x1
        self.steps = nn.ModuleList(
            nn.ModuleList([ActNorm(channels), conv(channels), Coupling(channels, hidden_channels)])
            for _ in range(n_steps))
        self.split = split
        self.prior = ZeroConv(channels // 2, channels) if split else ZeroConv(channels, 2 * channels)

    def forward(self, x):
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        x = x.contiguous().view(batch, 4 * channels, height // 2, width // 2)
        logdet = 0
        for step in self.steps:
            for layer in step:
                x, term = layer(x)
                logdet = logdet + term
        if self.split:
            x, latent = x.chunk(2, 1)
            mean, log_sigma = self.prior(x).chunk(2, 1)
        else:
            mean, log_sigma = self.prior(torch.zeros_like(x)).chunk(2, 1)
            latent = x
        return x, logdet, _log_normal(latent, mean, log_sigma).flatten(1).sum(1)


class Glow(nn.Module):
    """log p(x) (B,) of images (B, C, H, W)."""

    def __init__(self, image_shape, n_levels, n_steps, hidden_channels, use_lu=False):
        super().__init__()
        channels = image_shape[0]
        self.levels = nn.ModuleList()
        for level in range(n_levels):
            channels *= 4
            split = level < n_levels - 1
            self.levels.append(Level(channels, n_steps, hidden_channels, split, use_lu))
            channels //= 2 if split else 1

    def forward(self, x):
        total = 0
        for level in self.levels:
            x, logdet, log_prob = level(x)
            total = total + logdet + log_prob
        return total

    @torch.no_grad()
    def initialize(self, x):
        """The data-dependent initialisation, which the first pass does."""
        self(x)
