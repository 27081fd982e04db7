"""Autoregressive priors, of real latents and of codes."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow import checks
from fastflow.draws import choose, drawn
from fastflow.flows import MADE
from fastflow.flows.labels import check_labels
from fastflow.vae.likelihoods.base import promoted
from fastflow.vae.priors.gaussian import check_z

__all__ = ["AutoregressivePrior", "CodePrior"]


class AutoregressivePrior(nn.Module):
    """p(z) = prod_d p(z_d | z_<d), each a mixture of Gaussians whose parameters a MADE makes of the features before.

    Over (D,). With one component it is a masked autoregressive flow; more make the conditionals multimodal. It starts
    as a mixture of C unit Gaussians spread around 0 for every feature, for one component N(0, I).

    Args:
        features: D >= 1.
        n_components: C, at least 1.
        hidden, order, activation: of the MADE.

    References:
        Chen et al., "Variational lossy autoencoder", 2017, arXiv:1611.02731.
        Uria et al., "RNADE", 2013, arXiv:1306.0186.
    """

    def __init__(self, features, n_components=5, hidden=(64, 64), *, order=None, activation=nn.ReLU):
        super().__init__()
        n_components = checks.count("n_components", n_components, 1)
        self.n_components = n_components
        self.event_shape = torch.Size([features])
        self.network = MADE(features, 3 * n_components, hidden, order=order, layout="interleave",
                            activation=activation)
        with torch.no_grad():
            means = self.network.layers[-1].bias.view(features, 3, n_components)[:, 1]
            means.copy_(torch.linspace(-1.0, 1.0, n_components) if n_components > 1 else torch.zeros(1))

    def log_prob(self, z):
        """(N,) nats of z (N, D), in one pass."""
        check_z(z, self.event_shape, self.network.layers[0].weight)
        z = z.to(self.network.layers[0].weight.dtype)
        params = self.network(z).unflatten(1, (z.shape[1], 3 * self.n_components))
        log_weights, means, log_sigmas = self._split(params)
        standard = (z[:, :, None] - means) * torch.exp(-log_sigmas)
        each = -0.5 * standard.square() - log_sigmas - 0.5 * math.log(2.0 * math.pi)
        return torch.logsumexp(log_weights + each, 2).sum(1)

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, D), feature by feature; ``temperature`` scales the components' standard deviations."""
        checks.rng(generator)
        network, weight = self.network, self.network.layers[0].weight
        sweep, found = network.sweep(n), []
        for _ in range(network.features):
            log_weights, means, log_sigmas = self._split(sweep.params())
            u = drawn(torch.rand, (n, 1), weight, generator)
            chosen = (u > torch.exp(log_weights).cumsum(1)).sum(1, keepdim=True).clamp_max(self.n_components - 1)
            noise = drawn(torch.randn, (n, 1), weight, generator)
            z = means.gather(1, chosen) + temperature * torch.exp(log_sigmas.gather(1, chosen)) * noise
            sweep.push(z)
            found.append(z)
        return torch.cat(found, 1).index_select(1, torch.argsort(network.order))

    def _split(self, params):
        """(log-weights, means, log-sigmas) along the last dimension; log sigma between -5 and 5, smoothly."""
        logits, means, raws = params.chunk(3, -1)
        return torch.log_softmax(logits, -1), means, 5.0 * torch.tanh(raws / 5.0)


class CodePrior(nn.Module):
    """p(c) = prod_t p(c_t | c_<t) of a sequence of codes out of n_codes, by causal dilated convolutions.

    It starts uniform. The prior that a VQ-VAE's codes get, row by row for images. Code t sees the ``receptive_field``
    codes before it.

    Args:
        n_codes: number of codes, at least 2.
        hidden: channels.
        n_layers: residual layers; dilations 1, 2, 4, ... double the receptive field with each.

    References:
        van den Oord et al., "Neural discrete representation learning", 2017, arXiv:1711.00937, section 3.2.
        van den Oord et al., "WaveNet", 2016, arXiv:1609.03499.
    """

    takes_integers = True  # as they are, where it is trained by itself

    def __init__(self, n_codes, hidden=64, n_layers=5):
        super().__init__()
        for name, value, least in (("n_codes", n_codes, 2), ("hidden", hidden, 1), ("n_layers", n_layers, 1)):
            checks.count(name, value, least)
        self.n_codes = n_codes
        self.receptive_field = 2**n_layers
        self.embedding = nn.Embedding(n_codes + 1, hidden)  # the last starts the sequence
        self.layers = nn.ModuleList(nn.Conv1d(hidden, 2 * hidden, 2, dilation=2**index) for index in range(n_layers))
        self.output = nn.Linear(hidden, n_codes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, codes):
        return self.log_prob(codes)

    def log_prob(self, codes):
        """(N,) nats of codes (N, *shape) int64, taken in row-major order; (N,) is one code each."""
        return self.log_probs(codes).sum(1)

    def log_probs(self, codes):
        """(N, T) nats: log p(c_t | c_<t) of each of the T codes that :meth:`log_prob` sums."""
        if not isinstance(codes, torch.Tensor) or codes.dtype != torch.int64:
            got = codes.dtype if isinstance(codes, torch.Tensor) else type(codes).__name__
            raise TypeError(f"codes: expected an int64 tensor, got {got}")
        codes = codes.flatten(1) if codes.dim() > 1 else codes[:, None]
        check_labels("codes", codes, self.n_codes, "n_codes", 0)
        start = torch.full_like(codes[:, :1], self.n_codes)
        logits = self._logits(torch.cat([start, codes[:, :-1]], 1))
        return torch.log_softmax(logits, 2).gather(2, codes[..., None])[..., 0]

    @torch.no_grad()
    def sample(self, n, shape, *, generator=None, temperature=1.0):
        """(n, *shape) int64; logits are divided by ``temperature``, 0 takes the likeliest code each time."""
        checks.rng(generator)
        codes = torch.full((n, 1), self.n_codes, device=self.output.weight.device)
        for _ in range(math.prod(shape)):
            logits = self._logits(codes[:, -self.receptive_field:])[:, -1]
            if temperature == 0.0:
                following = logits.argmax(1, keepdim=True)
            else:
                following = choose(torch.softmax(logits / temperature, 1), 1, generator)
            codes = torch.cat([codes, following], 1)
        return codes[:, 1:].view(n, *shape)

    def _logits(self, before):
        """(N, T, n_codes) for the codes that follow each of ``before`` (N, T), given it and those before it."""
        h = self.embedding(before).mT
        for layer in self.layers:
            a, gate = layer(F.pad(h, (layer.dilation[0], 0))).chunk(2, 1)
            h = h + torch.tanh(a) * torch.sigmoid(gate)
        return promoted(self.output(h.mT))
