"""Activation normalisation: one affine map per channel."""

import torch
from torch import nn

from fastflow import checks
from fastflow.nn.outputs import in_format_of, over_positions

__all__ = ["ActNorm"]


class ActNorm(nn.Module):
    """z = (x + bias) * exp(log_scale) per channel (dim 1), with log|det| = S * sum(log_scale) for S positions.

    :meth:`initialize` sets both from a batch so that z has mean 0 and standard deviation 1 in every channel;
    ``forward`` never looks at the data to decide. The buffer ``initialized`` records the call in the state dict.

    Args:
        channels: C, the size of dim 1.

    References:
        Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039, section 3.1.
    """

    TINY = 1e-6  # a channel whose standard deviation is below this (relative to 1 + |mean|) is left unscaled

    def __init__(self, channels, *, device=None, dtype=None):
        super().__init__()
        self.channels = channels = checks.count("channels", channels, 1)
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.log_scale = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=device))

    def forward(self, x, context=None):
        """(z, logdet) of x (B, C, *S); z in x's dtype, float32 at least; ``context`` is ignored."""
        bias, log_scale = self._operands(x)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        z = (x + bias.view(shape)) * torch.exp(log_scale).view(shape)
        return in_format_of(x, z), over_positions(log_scale.sum(), x)

    def inverse(self, z, context=None):
        """(x, logdet) with x = z * exp(-log_scale) - bias."""
        bias, log_scale = self._operands(z)
        shape = (1, -1) + (1,) * (z.dim() - 2)
        x = z * torch.exp(-log_scale).view(shape) - bias.view(shape)
        return in_format_of(z, x), over_positions(-log_scale.sum(), z)

    @torch.no_grad()
    def initialize(self, x, context=None):
        """Set bias and log_scale from the batch x (B, C, *S) and return z.

        A channel without variance is centred and keeps scale 1. An empty batch changes nothing.
        """
        self._operands(x)
        values = x.transpose(0, 1).flatten(1).double()
        if values.shape[1] > 0:
            mean, std = values.mean(1), values.std(1, correction=0)
            constant = std <= self.TINY * (1.0 + mean.abs())
            self.bias.copy_(-mean)
            self.log_scale.copy_(-torch.log(torch.where(constant, torch.ones_like(std), std)))
            self.initialized.fill_(True)
        return self(x)[0]

    def extra_repr(self):
        return f"{self.channels}"

    def _operands(self, x):
        checks.tensor("x", x)
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected shape (B, {self.channels}, *S), got {tuple(x.shape)}")
        checks.same_device("x", x, "bias", self.bias)
        checks.goes_with("x", x, "bias", self.bias)
        dtype = torch.promote_types(self.bias.dtype, torch.float32)
        return self.bias.to(dtype), self.log_scale.to(dtype)
