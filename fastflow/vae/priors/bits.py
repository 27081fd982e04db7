"""An autoregressive prior of bits."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.draws import drawn
from fastflow.estimators import Bernoulli
from fastflow.flows import MADE

__all__ = ["BitPrior"]


class BitPrior(nn.Module):
    """p(b) = prod_d p(b_d | b_<d) of bits, each a Bernoulli whose logit a MADE makes of the bits before.

    It starts uniform. The prior of a DiscreteVAE whose posterior's aggregate is far from independent bits.

    Args:
        shape: of one b, (D, *S), taken in row-major order.
        hidden: sizes of the MADE's hidden layers.

    References:
        Germain et al., "MADE: masked autoencoder for distribution estimation", 2015, arXiv:1502.03509.
    """

    def __init__(self, shape, hidden=(64, 64)):
        super().__init__()
        self.event_shape = checks.extent("shape", shape)
        self.network = MADE(math.prod(self.event_shape), 1, hidden)

    def given(self, b):
        """The estimators.Bernoulli (N, D, *S) of each bit given those before it in b (N, D, *S)."""
        checks.tensor("b", b)
        checks.events("b", b, self.event_shape)
        logits = self.network(b.flatten(1).to(self.network.layers[0].weight.dtype))
        return Bernoulli(logits.view(-1, *self.event_shape))

    def log_prob(self, b):
        """(K, N) nats of b (K, N, D, *S), in one pass."""
        checks.tensor("b", b)
        return self.given(b.flatten(0, 1)).log_prob(b.flatten(0, 1)[None])[0].view(b.shape[:2])

    @torch.no_grad()
    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, D, *S), bit by bit; logits are divided by ``temperature``, 0 takes the likelier value each time."""
        checks.rng(generator)
        weight = self.network.layers[0].weight
        sweep, found = self.network.sweep(n), []
        for _ in range(self.network.features):
            logits = sweep.params()
            if temperature == 0.0:
                bit = (logits > 0).to(weight.dtype)
            else:
                u = drawn(torch.rand, (n, 1), weight, generator)
                bit = (u < torch.sigmoid(logits / temperature)).to(weight.dtype)
            sweep.push(bit)
            found.append(bit)
        return torch.cat(found, 1).view(n, *self.event_shape)
