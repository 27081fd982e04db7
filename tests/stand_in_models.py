"""Small models with the interfaces of Flow and VAE, whose likelihoods are one line."""

import math
from types import SimpleNamespace

import torch
from torch import nn


class Affine(nn.Module):
    """x = shift + exp(log_scale)*z with z standard normal: a flow of one transform."""

    def __init__(self, shape=(1, 2, 2)):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def log_prob(self, x, context=None):
        shift = self.shift if context is None else self.shift + context
        z = (x - shift) * torch.exp(-self.log_scale)
        return (-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - self.log_scale).flatten(1).sum(1)

    def forward(self, x, context=None):
        return self.log_prob(x, context)


class Gauge(nn.Module):
    """A VAE whose rate and distortion are linear in its two parameters."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.5))
        self.b = nn.Parameter(torch.tensor(0.5))

    def elbo(self, x, n_samples=1, beta=1.0):
        rate, distortion = self.b * x.flatten(1).abs().mean(1), self.a * n_samples + x.flatten(1).mean(1)
        return SimpleNamespace(rate=rate, distortion=distortion, elbo=-distortion - beta * rate)

    def forward(self, x, n_samples=1, beta=1.0):
        return self.elbo(x, n_samples, beta)
