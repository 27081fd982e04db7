"""Glow without fused kernels at its fastest: compiled region by region, to be captured as one CUDA graph.

The model is that of benchmarks.neutral_glow, arranged for speed by torch's own means. A flow step is a function of
tensors that torch.compile sees once per level, so that 96 steps share three compilations (the unrolled model takes
minutes). 1x1 weights have Glow's own LU form, W = P L (U + diag(s)): its log-determinant is a sum, while torch's
slogdet factorises matrix by matrix and may wait for the device, which no graph can record. All weights of a level are
assembled in one batched product.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def assemble(lower, upper, log_s, sign, permutation, log_scale, area):
    """(weights (K, C, C), log-determinant of a level's actnorms and 1x1 convolutions, 0-d)."""
    channels = log_s.shape[1]
    unit = torch.eye(channels, dtype=lower.dtype, device=lower.device)
    weights = permutation @ (lower.tril(-1) + unit) @ (upper.triu(1) + torch.diag_embed(sign * log_s.exp()))
    return weights, (log_s.sum() + log_scale.sum()) * area


def _flow_step(x, logdet, bias, log_scale, weight, w1, b1, w2, b2, w3, b3, dtype):
    """Actnorm, 1x1 convolution and coupling; the coupling's network under autocast to ``dtype`` if it is not None."""
    x = (x + bias[:, None, None]) * log_scale.exp()[:, None, None]
    x = F.conv2d(x, weight[:, :, None, None])
    passive, active = x.chunk(2, 1)
    with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        h = F.relu(F.conv2d(passive, w1, b1, padding=1))
        h = F.relu(F.conv2d(h, w2, b2))
        params = F.conv2d(h, w3, b3, padding=1)
    shift, raw = params.to(x.dtype).chunk(2, 1)
    u = raw + 2.0
    z = torch.cat([passive, (active + shift) * torch.sigmoid(u)], 1)
    return z.contiguous(memory_format=torch.channels_last), logdet + F.logsigmoid(u).flatten(1).sum(1)


def _split(x, weight, bias, dtype):
    """(what stays, log p of what leaves)."""
    x, latent = x.chunk(2, 1)
    with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        params = F.conv2d(x, weight, bias, padding=1)
    mean, raw = params.to(x.dtype).chunk(2, 1)
    log_sigma = 5.0 * torch.tanh(raw / 5.0)
    normal = -0.5 * (((latent - mean) * torch.exp(-log_sigma)) ** 2 + math.log(2 * math.pi)) - log_sigma
    return x, normal.flatten(1).sum(1)


class _Level(nn.Module):
    """The parameters of a level's steps, those of actnorms and 1x1 convolutions stacked."""

    def __init__(self, steps, prior):
        super().__init__()
        factors = [torch.linalg.lu(conv.weight.detach()) for _, conv, _ in steps]
        diagonal = torch.stack([upper.diagonal() for _, _, upper in factors])
        self.register_buffer("permutation", torch.stack([p for p, _, _ in factors]))
        self.register_buffer("sign", diagonal.sign())
        self.lower = nn.Parameter(torch.stack([lower for _, lower, _ in factors]))
        self.upper = nn.Parameter(torch.stack([upper for _, _, upper in factors]))
        self.log_s = nn.Parameter(diagonal.abs().log())
        self.bias = nn.Parameter(torch.stack([actnorm.bias.detach().flatten() for actnorm, _, _ in steps]))
        self.log_scale = nn.Parameter(torch.stack([actnorm.log_scale.detach().flatten() for actnorm, _, _ in steps]))
        self.nets = nn.ModuleList(nn.ParameterList(self._copied(p) for p in coupling.net.parameters())
                                  for _, _, coupling in steps)
        self.prior = None if prior is None else nn.ParameterList(map(self._copied, prior.parameters()))

    @staticmethod
    def _copied(parameter):
        memory_format = torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
        return nn.Parameter(parameter.detach().clone(memory_format=memory_format))


class UnfusedGlow(nn.Module):
    """log p(x) (B,) in nats of images (B, C, H, W), equal to that of the NeutralGlow whose weights it takes.

    Args:
        neutral: a NeutralGlow.
        dtype: torch.bfloat16 runs couplings' and splits' networks under autocast to it.
        backend: of torch.compile; None does not compile.
    """

    def __init__(self, neutral, dtype=None, backend="inductor"):
        super().__init__()
        self.levels = nn.ModuleList(_Level(steps, neutral.priors[index] if index < len(neutral.priors) else None)
                                    for index, steps in enumerate(neutral.levels))
        self.dtype = dtype
        self._run = [part if backend is None else torch.compile(part, dynamic=False, fullgraph=True, backend=backend)
                     for part in (assemble, _flow_step, _split)]

    def forward(self, x):
        assemble, flow_step, split = self._run
        log_prob = constant = 0.0
        logdet = x.new_zeros(len(x)).requires_grad_()
        # A leaf of its own, so that the first step is compiled as the others are: with a gradient for its input.
        x = x.detach().requires_grad_()
        for level in self.levels:
            x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
            weights, total = assemble(level.lower, level.upper, level.log_s, level.sign, level.permutation,
                                      level.log_scale, x.shape[2] * x.shape[3])
            constant = constant + total
            parts = zip(level.bias.unbind(0), level.log_scale.unbind(0), weights.unbind(0), level.nets, strict=True)
            for bias, log_scale, weight, net in parts:
                x, logdet = flow_step(x, logdet, bias, log_scale, weight, *net, self.dtype)
            if level.prior is not None:
                x, term = split(x, *level.prior, self.dtype)
                log_prob = log_prob + term
        log_prob = log_prob - 0.5 * (x**2 + math.log(2 * math.pi)).flatten(1).sum(1)
        return log_prob + logdet + constant
