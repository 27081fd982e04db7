"""Glow and RealNVP in normflows (PyPI ``normflows``), from its own GlowBlock, MultiscaleFlow and AffineCouplingBlock.

normflows has no learned prior for the latents of a split; here it is normflows' own AffineCoupling inside its Merge.
"""

import normflows as nf
import torch
from torch import nn

from benchmarks.peers import common

GLOW_SETTINGS = {"plain 1x1": {"use_lu": False}, "LU 1x1": {"use_lu": True}}
REALNVP_SETTINGS = {"": {}}


class PriorParams(nn.Module):
    """(mean, log sigma) alternating, from a zero convolution; log sigma = 5 tanh(r / 5)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = common.zero_conv(channels, 2 * channels)

    def forward(self, x):
        params = self.conv(x)
        return torch.stack([params[:, 0::2], 5.0 * torch.tanh(params[:, 1::2] / 5.0)], 2).flatten(1, 2)


class PriorMerge(nf.flows.Merge):
    """normflows' Merge, whose second part has a Gaussian prior learned from the first."""

    def __init__(self, channels):
        super().__init__("channel")
        self.prior = nf.flows.AffineCoupling(PriorParams(channels), scale_map="exp")

    def forward(self, z):
        z, logdet = self.prior(z)
        return super().forward(z)[0], logdet

    def inverse(self, z):
        return self.prior.inverse(super().inverse(z)[0])


class Glow(nn.Module):
    """log p(x) (B,) of images (B, C, H, W); ``sample(n)``."""

    def __init__(self, image_shape, n_levels, n_steps, hidden_channels, use_lu=False):
        super().__init__()
        channels, height, width = image_shape
        bases, flows, merges = [], [], []
        for level in range(n_levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            blocks = [nf.flows.GlowBlock(channels, hidden_channels, use_lu=use_lu) for _ in range(n_steps)]
            last = level == n_levels - 1
            if not last:
                channels //= 2
                merges.insert(0, PriorMerge(channels))
            # normflows runs from noise to data and puts the coarsest level first
            flows.insert(0, [*blocks, nf.flows.Squeeze()])
            bases.insert(0, nf.distributions.DiagGaussian((channels, height, width), trainable=False))
        self.flow = nf.MultiscaleFlow(bases, flows, merges, class_cond=False)

    def forward(self, x):
        return self.flow.log_prob(x, None)

    def sample(self, n):
        return self.flow.sample(n)[0]

    @torch.no_grad()
    def initialize(self, x):
        """The data-dependent initialisation: normflows does it in the first pass."""
        self(x)


def load_glow(peer, glow):
    """Give it the weights of a fastflow Glow with its default coupling: (x + t) * s there, (x - t') * s here."""
    levels = list(glow.transform.levels)
    for level, flows in zip(levels, reversed(peer.flow.flows), strict=True):
        for step, block in zip(level.steps, reversed(flows[:-1]), strict=True):
            coupling, conv, actnorm = block.flows
            with torch.no_grad():
                actnorm.s.copy_(-step.conv.actnorm.log_scale.view_as(actnorm.s))
                actnorm.t.copy_(-step.conv.actnorm.bias.view_as(actnorm.t))
                actnorm.data_dep_init_done = torch.tensor(1.0)
                _set_weight(conv, step.conv.weight)
            half = step.conv.channels // 2
            signs = torch.tensor([-1.0, 1.0]).repeat(half)
            common.copy_layers(coupling.flows[1].param_map, step.coupling.conditioner, common.interleaved(half), signs)
    for level, merge in zip(levels[:-1], reversed(peer.flow.merges), strict=True):
        half = level.split.prior.out_channels // 2
        common.copy_layers(merge.prior.param_map, level.split.prior, common.interleaved(half))


def _set_weight(conv, weight):
    if not conv.use_lu:
        conv.W.copy_(weight)
        return
    permutation, lower, upper = torch.linalg.lu(weight.double())
    diagonal = upper.diagonal()
    for target, value in ((conv.P, permutation), (conv.L, lower), (conv.U, upper.triu(1)),
                          (conv.sign_S, diagonal.sign()), (conv.log_S, diagonal.abs().log())):
        target.copy_(value)


class RealNVP(nn.Module):
    """log p(x) (B,) of x (B, 2); ``sample(n)``."""

    def __init__(self, n_layers, hidden):
        super().__init__()
        flows = []
        for index in range(n_layers):
            flows.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([1, *hidden, 2], init_zeros=True)))
            if index < n_layers - 1:
                flows.append(nf.flows.Permute(2, mode="swap"))
        flows.append(nf.flows.ActNorm(2))  # noise to data: what the data pass first stands last
        self.flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), flows)

    def forward(self, x):
        return self.flow.log_prob(x)

    def sample(self, n):
        return self.flow.sample(n)[0]


def load_realnvp(peer, flow):
    """Give it the weights of realnvp.fastflow_realnvp(dialect="normflows"): (x + t) * exp(r) there,
    (x - t') * exp(-r') here."""
    flows = list(peer.flow.flows)[::-1]
    actnorm, couplings = flows[0], flows[1::2]
    own, *layers = flow.transform.transforms
    with torch.no_grad():
        actnorm.s.copy_(-own.log_scale.view_as(actnorm.s))
        actnorm.t.copy_(-own.bias.view_as(actnorm.t))
        actnorm.data_dep_init_done = torch.tensor(1.0)
    for block, layer in zip(couplings, layers, strict=True):
        common.copy_layers(block.flows[1].param_map, layer.conditioner, torch.tensor([1, 0]), -torch.ones(2))
