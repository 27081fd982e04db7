"""VAEs in plain, careful eager PyTorch: the neutral baseline, as a good user would write them without fastflow.

Each is built from a fastflow model and shares nothing with it but a copy of its networks, which are plain modules: the
weights are equal, and so is the bound, but for the noise.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow.nn import FusedSequential


def log_bernoulli(x, logits):
    """log p(x) (*, B) in nats of bits x (B, *event)."""
    each = F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none")
    return -each.flatten(logits.dim() - x.dim() + 1).sum(-1)


def plain(module):
    """A copy whose sequences of layers are torch's own."""
    found = copy.deepcopy(module)
    for part in found.modules():
        if isinstance(part, FusedSequential):
            part.__class__ = nn.Sequential
    return found


class NeutralVAE(nn.Module):
    """The ELBO (B,) in nats of a Gaussian posterior, prior N(0, I) and bits, or with K samples the IWAE bound."""

    def __init__(self, vae, n_samples=None):
        super().__init__()
        self.encoder, self.decoder = plain(vae.encoder), plain(vae.decoder)
        self.n_samples = n_samples

    def forward(self, x, eps=None):
        mean, logvar = self.encoder(x).chunk(2, 1)
        if self.n_samples is not None:
            return self._importance_weighted(x, mean, logvar, eps)
        eps = torch.randn_like(mean) if eps is None else eps
        z = mean + torch.exp(0.5 * logvar) * eps
        kl = 0.5 * (mean.square() + torch.expm1(logvar) - logvar).sum(1)
        return log_bernoulli(x, self.decoder(z)) - kl

    def _importance_weighted(self, x, mean, logvar, eps):
        shape = (self.n_samples, *mean.shape)
        eps = torch.randn(shape, dtype=mean.dtype, device=mean.device) if eps is None else eps
        z = mean + torch.exp(0.5 * logvar) * eps
        logits = self.decoder(z.flatten(0, 1)).unflatten(0, shape[:2])
        log_ratio = 0.5 * (eps.square() + logvar - z.square()).sum(2)  # log p(z) - log q(z | x)
        return torch.logsumexp(log_bernoulli(x, logits) + log_ratio, 0) - math.log(self.n_samples)


class NeutralHierarchicalVAE(nn.Module):
    """The ELBO (B,) in nats of a HierarchicalVAE of bits whose levels have mode "residual" and scale "soft_tanh"."""

    def __init__(self, vae):
        super().__init__()
        self.stages, self.taken, self.decoder = plain(vae.bottom_up.stages), vae.bottom_up.taken, plain(vae.decoder)
        self.priors, self.posteriors, self.merges = (nn.ModuleList(plain(getattr(level, name))
                                                                   for level in vae.levels)
                                                     for name in ("prior", "posterior", "merge"))
        self.top = nn.Parameter(vae.top.detach().clone())

    def features(self, x):
        """What each level sees of x, from the top down."""
        found = []
        for stage, count in zip(self.stages, self.taken, strict=True):
            x = stage(x)
            found += [x] * count
        return found[::-1]

    def forward(self, x, eps=None):
        h, kl = self.top.expand(len(x), *self.top.shape[1:]), 0.0
        levels = zip(self.priors, self.posteriors, self.merges, self.features(x), strict=True)
        for index, (prior, posterior, merge, d) in enumerate(levels):
            mean_p, raw_p = prior(h).chunk(2, 1)
            delta_mean, delta_raw = posterior(torch.cat([h, d], 1)).chunk(2, 1)
            mean, log_sigma_p = mean_p + delta_mean, 5.0 * torch.tanh(raw_p / 5.0)
            log_sigma = 5.0 * torch.tanh((raw_p + delta_raw) / 5.0)
            sigma = torch.exp(log_sigma)
            z = mean + sigma * (torch.randn_like(mean) if eps is None else eps[index])
            squares = (sigma.square() + delta_mean.square()) * torch.exp(-2.0 * log_sigma_p)
            kl = kl + (log_sigma_p - log_sigma + 0.5 * (squares - 1.0)).flatten(1).sum(1)
            h = merge(torch.cat([h, z], 1))
        return log_bernoulli(x, self.decoder(h)) - kl
