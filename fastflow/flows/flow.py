"""Flow: a transform and a base distribution, which together are a density."""

import math

import torch
from torch import nn
from torch.distributions import Distribution

from fastflow import checks
from fastflow.flows.base import Anchored, as_base, seeded
from fastflow.flows.bases import Mixture
from fastflow.flows.contexts import takes_context
from fastflow.flows.distribution import distribution_of
from fastflow.flows.images import bits_per_dim, dequantize
from fastflow.flows.labels import check_levels
from fastflow.flows.surjections import UniformDequantization
from fastflow.flows.transform import Compose, check_transform, initialize

__all__ = ["Flow"]


class Flow(Anchored):
    """The density log p(x) = log base(z) + log|det dz/dx| with z = transform(x).

    Calling the module is :meth:`log_prob`, so that wrappers such as DDP, FSDP2 and torch.compile train it.

    Args:
        transform: data to noise, any :class:`Transform`.
        base: distribution of the noise: a StandardNormal, an object like it, or a torch.distributions object, whose
            batch dimensions count as event dimensions; one without any is the law of every element, and can't sample.
            Modules follow ``.to()``; a torch.distributions object gives float64 behind the flow's ``.double()``, and
            stays on its device. One whose attribute ``conditional`` is true gets the context as well, and alone where
            the transform was built without one.
        dequantization: surjection from integers to what the transform takes, such as a
            :class:`VariationalDequantization`; None for the uniform one of :meth:`bits_per_dim` and engine.TrainStep.

    Attributes:
        transform, base, dequantization: as given.
        configs: {name: keyword arguments} of :meth:`from_config`.
    """

    configs = {}

    def __init__(self, transform, base, dequantization=None):
        super().__init__()
        check_transform("transform", transform)
        as_base(base)
        if dequantization is not None:
            check_transform("dequantization", dequantization)
        self.transform = transform
        self.base = base
        self.dequantization = dequantization
        if isinstance(base, Distribution):
            self.register_buffer("_anchor", torch.zeros(()), persistent=False)  # follows .double() in its place
        self._transform_takes_context = None  # not known yet; a graph has what was found before it
        self.context_of_transform(None)

    @classmethod
    def from_config(cls, name, **overrides):
        """The model of a paper's configuration, ``configs[name]``, with some of its arguments replaced.

        Raises:
            ValueError: an unknown name; the message lists those there are.
        """
        if name not in cls.configs:
            known = ", ".join(map(repr, cls.configs)) or "none"
            raise ValueError(f"name: expected a configuration of {cls.__name__} ({known}), got {name!r}")
        return cls(**{**cls.configs[name], **overrides})

    def forward(self, x, context=None):
        return self.log_prob(x, context)

    def log_prob(self, x, context=None):
        """log p(x), or log p(x | context), in nats.

        Args:
            x: (B, *event). Integers of a flow with a ``dequantization`` give a bound of the log-probability of the
                integers, a lower one in expectation over the noise that is drawn.
            context: (B, ...) that conditions each x, handed to the transform and to a conditional base, or None.

        Returns:
            (B,); -inf outside the support.

        Raises:
            ValueError: context and x, or what the transform or the base returns, are not of one batch size B.
        """
        if self.dequantization is not None and isinstance(x, torch.Tensor) and not x.is_floating_point():
            return self._log_prob_of_integers(x, context)
        _check_context(x, context)
        z, logdet = self.transform(x, self.context_of_transform(context))
        _check_logdet(logdet, z)
        log_base = self._log_base(z, context)
        total = log_base + logdet
        if isinstance(self.base, (Distribution, Mixture)) and isinstance(logdet, torch.Tensor):
            # Beside an element outside the transform's domain an infinite density of another counts nothing.
            return torch.where(torch.isneginf(logdet) & torch.isposinf(log_base), -torch.inf, total)
        return total

    @torch.no_grad()
    def sample(self, n, context=None, *, generator=None, temperature=1.0):
        """n samples, without gradients; see :meth:`rsample`."""
        return self.rsample(n, context, generator=generator, temperature=temperature)

    def rsample(self, n, context=None, *, generator=None, temperature=1.0):
        """n samples, with gradients for the transform's parameters and the context.

        Args:
            n: number of samples, for each context if one is given.
            context: (B, ...) or None.
            generator: torch.Generator of the noise, None for torch's own.
            temperature: factor on the base's standard deviation.

        Returns:
            (n, *event), with a context (n, B, *event).
        """
        z, context, lead = self._noise(n, context, generator, temperature)
        return self._generate(z, context, generator)[0].unflatten(0, lead)

    def sample_and_log_prob(self, n, context=None, *, generator=None, temperature=1.0):
        """(samples as of :meth:`rsample`, their log-density (n,) or (n, B) in nats), both with gradients.

        The density is that of the distribution sampled from: at another temperature than 1 it is not the model's own.
        """
        if temperature == 0:
            raise ValueError("temperature: expected a positive number, because there is no density at 0, got 0")
        z, context, lead = self._noise(n, context, generator, temperature)
        x, logdet = self._generate(z, context, generator)
        tempered = () if temperature == 1.0 else (temperature,)
        log_prob = self._log_base(z, context, *tempered) - logdet
        return x.unflatten(0, lead), log_prob.unflatten(0, lead)

    def as_distribution(self, context=None):
        """The flow as a torch.distributions object; with a context its batch shape is (B,). Where Pyro is imported it
        is one of Pyro's distributions as well, for ``pyro.sample``."""
        _check_context(None, context)
        return distribution_of(self, context)

    def initialize(self, x, context=None):
        """Set the data-dependent parameters (ActNorm) from a batch x (B, *event), anew at every call."""
        if self.dequantization is not None and isinstance(x, torch.Tensor) and not x.is_floating_point():
            x = initialize(self.dequantization, x, context)
        initialize(self.transform, x, self.context_of_transform(context))

    def context_of_transform(self, context):
        """What the transform is handed of a context: None where that is for the base alone."""
        if not getattr(self.base, "conditional", False):
            return context
        if not torch.compiler.is_compiling():  # anew each time, as parts may have been exchanged
            self._transform_takes_context = takes_context(self.transform)
        return context if self._transform_takes_context else None

    def context_of_base(self, context):
        """The keyword arguments with which a context goes to the base, none to one that is not conditional."""
        return {"context": context} if getattr(self.base, "conditional", False) else {}

    def shard_groups(self):
        """[module]: disjoint submodules that FSDP2 gathers and frees one at a time; what is left is one group more.

        None here: 1x1 weights that are factorised together are needed whole together. A flow of large repeated blocks
        lists those.
        """
        return []

    def unpack(self, z):
        """The latents of a multi-scale z (B, D) as a list, in the order in which they leave; [z] for other flows."""
        return self.transform.unpack(z) if hasattr(self.transform, "unpack") else [z]

    def bits_per_dim(self, x, n_bins=256, *, context=None, generator=None):
        """Bits per dimension of integer-valued images, with every constant counted.

        The images are dequantised as x/n_bins - 0.5 + U/n_bins; with D elements per image the result is
        -(log_prob - D log n_bins) / (D log 2), an upper bound in expectation over U. With a ``dequantizer`` the flow
        dequantises by that, and the bound is its own.

        Args:
            x: (B, C, H, W), values 0..n_bins-1, any dtype.
            n_bins: number of values.
            context: as of log_prob.
            generator: torch.Generator of U, None for torch's own.

        Returns:
            (B,).

        Raises:
            ValueError: values are others than these, on a CPU.
        """
        checks.tensor("x", x, floating=False)
        with self._drawing(generator):
            if self.dequantizer is None:
                values = dequantize(x, n_bins, generator=generator, dtype=self._dtype())
                check_levels("x", x, n_bins)
                return bits_per_dim(self.log_prob(values, context), math.prod(x.shape[1:]), n_bins)
            self.check_bins(n_bins)
            check_levels("x", x, n_bins)
            inside = self.dequantization is None
            log_prob = self.log_prob(x, context) if inside else self._log_prob_of_integers(x, context, generator)
            return -log_prob / (math.prod(x.shape[1:]) * math.log(2.0))

    @property
    def dequantizer(self):
        """What makes real numbers of integers: the ``dequantization``, or one that the transform begins with; None for
        a flow that takes real numbers."""
        if self.dequantization is not None:
            return self.dequantization
        first = self.transform
        while isinstance(first, Compose) and len(first.transforms):
            first = first.transforms[0]
        return first if isinstance(first, UniformDequantization) else None

    def check_bins(self, n_bins):
        """ValueError unless ``n_bins`` is that of the ``dequantizer``."""
        if n_bins != self.dequantizer.n_bins:
            raise ValueError(f"n_bins: expected {self.dequantizer.n_bins}, that of the flow's dequantization, got "
                             f"{n_bins}")

    def _log_prob_of_integers(self, x, context, generator=None):
        values, contribution = self.dequantization(x, context, generator=generator, dtype=self._dtype())
        return self.log_prob(values, context) + contribution

    def _log_base(self, z, context, *temperature):
        """(B,) log-density of z (B, ...) under the base."""
        value = as_base(self.base).log_prob(z, *temperature, **self.context_of_base(context))
        if (shape := getattr(value, "shape", ())) != z.shape[:1]:
            raise ValueError(f"base: expected a log-density of shape {tuple(z.shape[:1])}, got {tuple(shape)}")
        return value

    def _generate(self, z, context, generator):
        """(x, log-determinant) of z (B, ...)."""
        with self._drawing(generator):
            x, logdet = self.transform.inverse(z, self.context_of_transform(context))
        _check_logdet(logdet, z)
        return x, logdet

    def _drawing(self, generator):
        """Inside, surjections of the transform, which are not handed a generator, draw from this one."""
        inside = isinstance(self.transform, nn.Module) and generator is not None
        draws = inside and any(getattr(module, "draws", False) for module in self.transform.modules())
        return seeded(generator if draws else None)

    def _dtype(self):
        """What data the flow takes: float64 where its parameters are, or the base's buffers where it has none."""
        tensors = list(self.parameters())
        if not tensors:  # not the transform's buffers: constants are kept in float64 for either
            tensors = list(self.base.buffers() if isinstance(self.base, nn.Module) else self._buffers.values())
        return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32

    def _noise(self, n, context, generator, temperature):
        checks.number("temperature", temperature)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature!r}")
        n = checks.count("n", n)
        lead = (n,)
        if context is not None:
            _check_context(None, context)
            lead = (n, context.shape[0])
            context = context.expand(n, *context.shape).flatten(0, 1)
        # Of the rest what was asked for, which a base of the user's need not take.
        options = self.context_of_base(context)
        if generator is not None:
            options["generator"] = generator
        if temperature != 1.0:
            options["temperature"] = temperature
        z = as_base(self.base, self._buffers.get("_anchor")).sample(math.prod(lead), **options)
        return z, context, lead


def _check_logdet(logdet, z):
    """A ``logdet`` that is a tensor is 0-d, for all of z (B, ...) alike, or (B,)."""
    if isinstance(logdet, torch.Tensor) and logdet.dim() > 0 and logdet.shape != z.shape[:1]:
        raise ValueError(f"transform: expected a log-determinant of shape {tuple(z.shape[:1])}, got "
                         f"{tuple(logdet.shape)}")


def _check_context(x, context):
    """``context`` is None or a tensor (B, ...), with the batch of x where x is a tensor."""
    if context is None:
        return
    checks.tensor("context", context, floating=False)
    if context.dim() < 1:
        raise ValueError("context: expected shape (B, ...), got ()")
    if isinstance(x, torch.Tensor) and x.dim() and x.shape[0] != context.shape[0]:
        raise ValueError(f"context: expected the batch size of x of shape {tuple(x.shape)}, got shape "
                         f"{tuple(context.shape)}")
