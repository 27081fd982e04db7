"""Surjections: maps that lose or gain dimensions or digits, with what they contribute to the likelihood.

They are used like transforms, ``t(x, context) -> (z, contribution)`` and ``t.inverse(z, context) -> (x,
-contribution)`` with the contribution (B,) in nats of the same pair (x, z), and stand in a Compose like them. Where
``exact`` is true the log-likelihood is that of the base plus contributions, as for bijections. Elsewhere z is drawn,
and the sum is a lower bound of it in expectation. ``draws`` says that one of the two directions is drawn.

References:
    Nielsen et al., "SurVAE flows: surjections to bridge the gap between VAEs and flows", 2020, arXiv:2007.02731.
"""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.flows.images import dequantize
from fastflow.flows.transform import initialize

__all__ = ["Augment", "Slice", "UniformDequantization", "VariationalDequantization"]


def _draw(distribution, context, generator=None):
    """(sample (B, *event), log-density (B,)) of one sample for each context (B, ...)."""
    if hasattr(distribution, "sample_and_log_prob"):
        sample, log_prob = distribution.sample_and_log_prob(1, context, generator=generator)
        return sample[0], log_prob[0]
    sample = distribution.sample(len(context), generator=generator, context=context)
    return sample, distribution.log_prob(sample, context=context)


def _check_conditional(name, distribution):
    if not hasattr(distribution, "log_prob") or not (hasattr(distribution, "sample_and_log_prob")
                                                     or getattr(distribution, "conditional", False)):
        raise TypeError(f"{name}: expected a Flow or a base whose attribute conditional is true, got "
                        f"{type(distribution).__name__}")


class UniformDequantization(nn.Module):
    """z = (x + U)/n_bins - 0.5 for integers x in 0..n_bins-1, U uniform in [0, 1); contribution -D log n_bins.

    The bound is that of log P(x) = log of the integral of p over x's cell, by Jensen's inequality. The inverse takes
    the integer below; what lies outside [-0.5, 0.5) becomes the nearest one.

    Args:
        n_bins: number of values.

    References:
        Theis et al., "A note on the evaluation of generative models", 2016, arXiv:1511.01844.
    """

    exact = False
    draws = True
    takes_context = False

    def __init__(self, n_bins=256):
        super().__init__()
        self.register_buffer("anchor", torch.zeros(()), persistent=False)  # follows .double()
        self.n_bins = checks.count("n_bins", n_bins, 1)

    def forward(self, x, context=None, *, generator=None, dtype=None):
        """(z (B, *event) in ``dtype``, None for the module's own, contribution (B,)) of integer-valued x of any
        dtype."""
        checks.tensor("x", x, floating=False)
        z = dequantize(x, self.n_bins, generator=generator, dtype=self._dtype(dtype))
        return z, self._width(z)

    def inverse(self, z, context=None):
        """(x (B, *event) int64, minus the contribution (B,))."""
        checks.tensor("z", z)
        return self._integers(z), -self._width(z)

    def extra_repr(self):
        return f"n_bins={self.n_bins}"

    def _integers(self, z):
        return torch.floor((z + 0.5) * self.n_bins).clamp(0, self.n_bins - 1).long()

    def _dtype(self, given):
        return torch.promote_types(self.anchor.dtype, torch.float32) if given is None else given

    def _width(self, z):
        value = -math.prod(z.shape[1:]) * math.log(self.n_bins)
        return z.new_full((z.shape[0],), value, dtype=torch.promote_types(z.dtype, torch.float32))


class VariationalDequantization(UniformDequantization):
    """z = (x + u)/n_bins - 0.5 with u in (0, 1) drawn from q(u | x); contribution -D log n_bins - log q(u | x).

    The expectation of the log-likelihood that it gives is at most log P(x), and equal where q(u | x) is proportional to
    p((x + u)/n_bins - 0.5).

    Args:
        noise: q, a :class:`Flow` over u (B, *event) whose samples lie in (0, 1), for instance one whose transform
            begins with a :class:`Logit`; its context is ``encoder((x + 1/2)/n_bins - 0.5)``.
        encoder: module from such values (B, *event) to the context; None hands them on as they are.
        n_bins: number of values.
        event_shape: the shape of one x, None for whatever the encoder takes.

    References:
        Ho et al., "Flow++", 2019, arXiv:1902.00275, section 3.1.
    """

    event_shape = None

    def __init__(self, noise, encoder=None, n_bins=256, *, event_shape=None):
        super().__init__(n_bins)
        if event_shape is not None:
            self.event_shape = checks.counts("event_shape", event_shape)
        _check_conditional("noise", noise)
        self.noise = noise
        self.encoder = encoder

    def forward(self, x, context=None, *, generator=None, dtype=None):
        """As of :class:`UniformDequantization`; ``context`` is ignored."""
        self._check(x)
        dtype = self._dtype(dtype)
        u, log_q = _draw(self.noise, self._condition(x, dtype), generator)
        z = (x.to(dtype) + u.to(dtype)) / self.n_bins - 0.5
        # Rounding must not carry the last bin to 0.5, which lies outside.
        z = z.clamp(max=0.5 - (2.0**-25 if dtype == torch.float32 else 2.0**-54))
        return z, self._width(z) - log_q

    def inverse(self, z, context=None):
        """(x (B, *event) int64, minus the contribution (B,))."""
        checks.tensor("z", z)
        x = self._integers(z)
        u = (z + 0.5) * self.n_bins - x
        return x, self.noise.log_prob(u, context=self._condition(x, z.dtype)) - self._width(z)

    def initialize(self, x, context=None):
        """Sets what in ``noise`` depends on data from uniform noise, and returns z of it."""
        self._check(x)
        dtype = self.noise._dtype() if hasattr(self.noise, "_dtype") else torch.float32
        z = dequantize(x, self.n_bins, dtype=dtype)
        if hasattr(self.noise, "transform"):
            initialize(self.noise.transform, torch.rand_like(z), self._condition(x, dtype))
        return z

    def _check(self, x):
        checks.tensor("x", x, floating=False)
        if self.event_shape is not None:
            checks.events("x", x, self.event_shape)

    def _condition(self, x, dtype):
        values = (x.to(dtype) + 0.5) / self.n_bins - 0.5
        return values if self.encoder is None else self.encoder(values)


class Slice(nn.Module):
    """z = x1, the first ``keep`` channels of x (B, C, *S); contribution log p(x2 | x1), which makes it exact.

    The inverse draws x2 from p(x2 | x1), as ancestral sampling does.

    Args:
        keep: channels of z, 1 to C - 1.
        decoder: p(x2 | x1) over (C - keep, *S) with x1 as its context: a Flow, or a base such as ConditionalNormal.
    """

    exact = True
    draws = True
    takes_context = False  # that of its own networks is what passes through

    def __init__(self, keep, decoder):
        super().__init__()
        keep = checks.count("keep", keep, 1)
        _check_conditional("decoder", decoder)
        self.keep, self.decoder = keep, decoder

    def forward(self, x, context=None):
        checks.tensor("x", x)
        if x.dim() < 2 or x.shape[1] <= self.keep:
            raise ValueError(f"x: expected shape (B, C, *S) with C > {self.keep}, got {tuple(x.shape)}")
        z, rest = x[:, :self.keep], x[:, self.keep:]
        return z, self.decoder.log_prob(rest, context=z)

    def inverse(self, z, context=None, *, generator=None):
        checks.tensor("z", z)
        if z.dim() < 2 or z.shape[1] != self.keep:
            raise ValueError(f"z: expected shape (B, {self.keep}, *S), got {tuple(z.shape)}")
        rest, log_prob = _draw(self.decoder, z, generator)
        return torch.cat([z, rest], 1), -log_prob

    def noise_shape(self, event_shape):
        return (self.keep, *event_shape[1:])


class Augment(nn.Module):
    """z = (x, u) with u drawn from q(u | x); contribution -log q(u | x), in expectation a bound.

    The inverse drops u: generation slices. A flow behind it has more dimensions than the data, and
    log p(x) = log of the integral of p(x, u) over u.

    Args:
        channels: of x, C.
        extra: channels of u.
        encoder: q(u | x) over (extra, *S) with x as its context: a Flow, or a base such as ConditionalNormal.

    References:
        Huang et al., "Augmented normalizing flows", 2020, arXiv:2002.07101.
    """

    exact = False
    draws = True
    takes_context = False  # that of its own networks is what passes through

    def __init__(self, channels, extra, encoder):
        super().__init__()
        for name, value in (("channels", channels), ("extra", extra)):
            checks.count(name, value, 1)
        _check_conditional("encoder", encoder)
        self.channels, self.extra, self.encoder = channels, extra, encoder

    def forward(self, x, context=None, *, generator=None):
        checks.tensor("x", x)
        if x.dim() < 2 or x.shape[1] != self.channels:
            raise ValueError(f"x: expected shape (B, {self.channels}, *S), got {tuple(x.shape)}")
        u, log_q = _draw(self.encoder, x, generator)
        return torch.cat([x, u], 1), -log_q

    def inverse(self, z, context=None):
        checks.tensor("z", z)
        if z.dim() < 2 or z.shape[1] != self.channels + self.extra:
            raise ValueError(f"z: expected shape (B, {self.channels + self.extra}, *S), got {tuple(z.shape)}")
        x, u = z[:, :self.channels], z[:, self.channels:]
        return x, self.encoder.log_prob(u, context=x)

    def noise_shape(self, event_shape):
        return (self.channels + self.extra, *event_shape[1:])

    def data_shape(self, event_shape):
        return (self.channels, *event_shape[1:])
