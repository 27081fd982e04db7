"""Discrete latents q(b), independent over an event's elements: Bernoulli and categorical.

Samples are floating one-hots or bits, so that a network takes them, and relaxed ones, as they are.
"""

import math

import torch
import torch.nn.functional as F

from fastflow import checks
from fastflow.draws import drawn

__all__ = ["Bernoulli", "Categorical"]

MAX_STATES = 2**16


def uniform(shape, like, generator):
    """Uniform numbers on (0, 1) in like's dtype."""
    checks.noise(None, None, generator, "logits", like)
    return drawn(torch.rand, shape, like, generator).clamp_(min=torch.finfo(like.dtype).tiny)


def tuples(n, length, device):
    """(n**length, length): all tuples of ``length`` numbers from 0 to n - 1, in order. They are counted on the device,
    for a copy from the host can't be recorded in a CUDA graph."""
    places = torch.arange(length - 1, -1, -1, device=device)
    return torch.arange(n**length, device=device)[:, None] // n**places % n


class Discrete:
    """What both families share.

    Attributes:
        logits: as given, in float32 or float64.
        event_shape: of one sample.
        sites: shape of the independent elements, the event's without the classes.
    """

    def __init__(self, logits):
        checks.tensor("logits", logits)
        if logits.dim() < self.LEAST_DIM:
            raise ValueError(f"logits: expected shape {self.SHAPE}, got {tuple(logits.shape)}")
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def event_shape(self):
        return self.logits.shape[1:]

    def __repr__(self):
        return f"{type(self).__name__}(logits of shape {tuple(self.logits.shape)})"

    def detached(self):
        """The same distribution of logits that are a leaf of their own, with gradient."""
        return type(self)(self.logits.detach().requires_grad_())

    def noise(self, n, generator=None):
        """(n, B, *event) uniform on (0, 1), of which :meth:`perturb` makes n samples."""
        return uniform((checks.count("n", n), *self.logits.shape), self.logits, generator)

    def sample(self, n=1, *, generator=None):
        """(n, B, *event) independent draws, without gradient."""
        with torch.no_grad():  # no decorator: torch.compile can't trace one on an object made in its graph
            return self.harden(self.perturb(self.noise(n, generator)))

    def states(self):
        """(S, *event), every value that a sample can take.

        Raises:
            ValueError: there are more than 65536.
        """
        sites, n = math.prod(self.sites), self.n_classes
        if n**sites > MAX_STATES:
            raise ValueError(f"q: expected at most {MAX_STATES} states to enumerate, got {n}**{sites}")
        return self.from_index(tuples(n, sites, self.logits.device).reshape(-1, *self.sites))

    def table(self):
        """(B, sites, n_classes) log-probabilities of each element's classes."""
        raise NotImplementedError

    def _check_samples(self, b):
        """b is (K, B, *event); where either has one row, the other's number of them is B."""
        checks.tensor("b", b, floating=False)
        fits = b.dim() == self.logits.dim() + 1 and b.shape[2:] == self.event_shape
        if not fits or b.shape[1] != self.logits.shape[0] and 1 not in (b.shape[1], self.logits.shape[0]):
            raise ValueError(f"b: expected shape (K, {', '.join(map(str, self.logits.shape))}), got {tuple(b.shape)}")

    def _check_other(self, other, family):
        """other is of the same family and event, with as many rows or one."""
        if not isinstance(other, family):
            raise TypeError(f"other: expected a {family.__name__}, got {type(other).__name__}")
        if other.event_shape != self.event_shape or other.logits.shape[0] not in (1, self.logits.shape[0]):
            raise ValueError(f"other: expected logits of shape {tuple(self.logits.shape)}, or one row of them, got "
                             f"{tuple(other.logits.shape)}")


class Bernoulli(Discrete):
    """Independent bits; logits (B, *event) are log(p / (1 - p)), infinite ones those of certain bits."""

    LEAST_DIM, SHAPE = 1, "(B, *event)"
    n_classes = 2

    @property
    def sites(self):
        return self.event_shape

    @property
    def probs(self):
        return torch.sigmoid(self.logits)

    def mode(self):
        """(B, *event), the likeliest value."""
        return (self.logits > 0).to(self.logits.dtype)

    def one_hot(self, b):
        """(N, sites, 2) of b (N, *event), as :meth:`table` orders the classes."""
        b = b.reshape(len(b), math.prod(self.sites))
        return torch.stack([1.0 - b, b], -1)

    def log_prob(self, b):
        """(K, B) nats of b (K, B, *event)."""
        self._check_samples(b)
        log_zero, log_one = self._log_probs()
        return _sum(weighed(b, log_one) + weighed(1.0 - b, log_zero), 2)

    def score(self, b):
        """(K, B, *event), the gradient of :meth:`log_prob` by the logits."""
        return b - self.probs

    def entropy(self):
        """(B,) nats."""
        log_zero, log_one = self._log_probs()
        return -_sum(weighed(self.probs, log_one) + weighed(torch.sigmoid(-self.logits), log_zero))

    def kl(self, other):
        """(B,) nats, KL(self || other); other may have one row."""
        self._check_other(other, Bernoulli)
        p, d = self.probs, self.logits - other.logits
        near = d.abs() < 1.0
        # Near the other the plain difference would be rounding: softplus(l') - softplus(l) = log1p(p expm1(-d)). It is
        # taken of the less likely value, whose probability keeps its digits.
        one_rare = self.logits < 0
        rare = torch.where(one_rare, p, torch.sigmoid(-self.logits))
        small = torch.where(near, torch.where(one_rare, d, -d), 0.0)
        zero, one = (own - far for own, far in zip(self._log_probs(), other._log_probs(), strict=True))
        return _sum(torch.where(near, rare * small + torch.log1p(rare * torch.expm1(-small)),
                                weighed(p, one) + weighed(torch.sigmoid(-self.logits), zero)))

    def from_index(self, index):
        return index.to(self.logits.dtype)

    def table(self):
        table = torch.stack(self._log_probs(), -1)
        return table.flatten(1, -2) if table.dim() > 2 else table[:, None]

    def _log_probs(self):
        """Log-probabilities (B, *event) of 0 and of 1."""
        return -F.softplus(self.logits), -F.softplus(-self.logits)

    def perturb(self, u):
        """Logits plus logistic noise, positive where the sample is 1."""
        return self.logits + torch.log(u) - torch.log1p(-u)

    def harden(self, z):
        return (z > 0).to(z.dtype)

    def relax(self, z, temperature):
        """The binary concrete variable: in (0, 1), near :meth:`harden` for a small temperature."""
        return torch.sigmoid(_tempered(z, temperature))

    def conditional(self, b, v):
        """Perturbed logits given that they harden to b, of uniform v, with gradient by the logits."""
        # Given b = 1, u = 1 - p + v*p, whence z = log1p(v*exp(logit)) - log1p(-v); b = 0 is its mirror image.
        one = F.softplus(self.logits + torch.log(v)) - torch.log1p(-v)
        zero = F.softplus(-self.logits + torch.log1p(-v)) - torch.log(v)
        return torch.where(b > 0.5, one, -zero)


class Categorical(Discrete):
    """Independent one-hots; logits (B, *sites, C) need not be normalised, those of masked classes are -inf. The event
    is (*sites, C)."""

    LEAST_DIM, SHAPE = 2, "(B, *sites, C) with C >= 1"

    def __init__(self, logits):
        super().__init__(logits)
        if self.n_classes < 1:
            raise ValueError(f"logits: expected shape {self.SHAPE}, got {tuple(logits.shape)}")

    @property
    def n_classes(self):
        return self.logits.shape[-1]

    @property
    def sites(self):
        return self.event_shape[:-1]

    @property
    def log_probs(self):
        return torch.log_softmax(self.logits, -1)

    @property
    def probs(self):
        return torch.softmax(self.logits, -1)

    def mode(self):
        """(B, *sites, C), the likeliest value."""
        return self.harden(self.logits)

    def one_hot(self, b):
        """(N, sites, C) of b (N, *event), as :meth:`table` orders the classes."""
        return b.reshape(len(b), math.prod(self.sites), self.n_classes)

    def log_prob(self, b):
        """(K, B) nats of b (K, B, *sites, C)."""
        self._check_samples(b)
        return _sum(weighed(b, self.log_probs), 2)

    def score(self, b):
        """(K, B, *sites, C), the gradient of :meth:`log_prob` by the logits."""
        return b - self.probs

    def entropy(self):
        """(B,) nats."""
        return -_sum(weighed(self.probs, self.log_probs))

    def kl(self, other):
        """(B,) nats, KL(self || other); other may have one row."""
        self._check_other(other, Categorical)
        p, d = self.probs, self.log_probs - other.log_probs
        near = d.abs() < 1.0
        small = torch.where(near, d, 0.0)
        # p' - p, zero in the sum, makes each class's term >= 0, and so small ones exact: p' = p exp(-d).
        return _sum(torch.where(near, p * (small + torch.expm1(-small)),
                                weighed(p, d) + other.probs - p))

    def from_index(self, index):
        return F.one_hot(index, self.n_classes).to(self.logits.dtype)

    def table(self):
        return self.log_probs.reshape(self.logits.shape[0], math.prod(self.sites), self.n_classes)

    def perturb(self, u):
        """Log-probabilities plus Gumbel noise, largest at the sample."""
        return self.log_probs - torch.log(-torch.log(u))

    def harden(self, z):
        return F.one_hot(z.argmax(-1), self.n_classes).to(z.dtype)

    def relax(self, z, temperature):
        """The concrete (Gumbel-softmax) variable: on the simplex, near :meth:`harden` for a small temperature."""
        return torch.softmax(_tempered(z, temperature), -1)

    def conditional(self, b, v):
        """Perturbed log-probabilities given that they harden to b, of uniform v, with gradient by the logits."""
        # The largest is a Gumbel variable of its own; the others are truncated at it.
        gumbel = -torch.log(-torch.log(v))
        top = (b * gumbel).sum(-1, keepdim=True)
        return torch.where(b > 0.5, top, -torch.logaddexp(-gumbel - self.log_probs, -top))


def bounded(logits):
    """Logits, perturbed ones too, as a network takes them: infinite ones as +-30."""
    return torch.where(logits.isinf(), 30.0 * logits.sign(), logits)


def weighed(weights, logs):
    """weights * logs, and 0 for a weight of 0 whatever the logarithm is, the gradients too."""
    return weights * torch.where((weights == 0) & ~logs.isfinite(), 0.0, logs)


def _tempered(z, temperature):
    """z / temperature, with no gradient in the temperature from a z that is infinite whatever it is."""
    fixed = z.isinf()
    return torch.where(fixed, z, torch.where(fixed, 0.0, z) / temperature)


def _sum(terms, lead=1):
    """The sum over all dimensions of ``terms`` after the first ``lead``."""
    return terms.flatten(lead).sum(lead) if terms.dim() > lead else terms
