"""Warns of posterior collapse while a VAE trains."""

import math
import warnings

import torch

from fastflow import checks
from fastflow.diagnostics.discrete import code_usage
from fastflow.diagnostics.kl import kl_per_latent
from fastflow.diagnostics.latents import check_moments, kl_to_prior
from fastflow.vae import QuantizedVAE

__all__ = ["CollapseMonitor", "CollapseWarning"]


class CollapseWarning(UserWarning):
    """Latents that carry almost nothing."""


class CollapseMonitor:
    """Watches the mean KL of every latent and warns when too few of them are used. One that is not finite counts as not
    used, and the warning says so.

    ``attach(model)`` hooks it onto the model's posterior, so that any training loop runs it; or hand it (B, D) KLs
    with :meth:`update`. The KLs are averaged where they are and looked at every ``every`` batches only. It is silent
    inside torch.compile and CUDA-graph capture, which run no Python. Or call :meth:`look` now and then, which takes
    every kind of VAE: of quantised ones it counts the codes in use. The KL is that to the prior where each latent has
    one of its own, with any diagonal Gaussian, one for each context among them; with other priors, a dense Gaussian, a
    mixture or a flow, it is that to N(0, I), which says of a prior far from it that latents are used that are not.

    Args:
        least_active: warn when fewer latents than this have a mean KL above ``threshold``; an int of at least 1, or a
            share between 0 and 1.
        threshold: nats.
        every: batches between looks.
        patience: looks in a row with too few before the warning.
        warmup: batches before the first look begins.
        callback: called with the message in place of a CollapseWarning.

    Attributes:
        kl: (D,) mean KL at the last look, None before.
        active: how many of them were above the threshold, or of the codes in use; None before.
        collapsed: whether it has warned since the latents last recovered.
    """

    def __init__(self, least_active=1, *, threshold=0.01, every=100, patience=3, warmup=0, callback=None):
        if isinstance(least_active, bool) or not least_active > 0 or (least_active > 1 and least_active % 1):
            raise ValueError(f"least_active: expected an int of at least 1 or a share, got {least_active!r}")
        if not threshold >= 0:
            raise ValueError(f"threshold: expected a number >= 0, got {threshold!r}")
        for name, value, least in (("every", every, 1), ("patience", patience, 1), ("warmup", warmup, 0)):
            checks.count(name, value, least)
        self.least_active, self.threshold, self.every = least_active, threshold, every
        self.patience, self.warmup, self.callback = patience, warmup, callback
        self.kl, self.active, self.collapsed = None, None, False
        self._batches = self._low = 0
        self._sum = None

    def attach(self, model):
        """Watches ``model.posterior``, a GaussianPosterior, in training mode; returns a handle with remove().

        Raises:
            TypeError: the model's posterior is no diagonal Gaussian, or z is moved after it was drawn from it.
        """
        check_moments(model)

        def hook(module, args, output):
            # A model gives the prior with the encoder's params. A VampPrior, which draws from the posteriors at its own
            # inputs, does not: those are no batch.
            if not module.training or len(args) < 2 or torch.compiler.is_compiling() or _capturing(args[0]):
                return
            with torch.no_grad():
                self.update(kl_to_prior(*module.moments(args[0]), args[1]))

        return model.posterior.register_forward_hook(hook)

    def update(self, kl):
        """Counts one batch of KLs (B, D) in nats; every ``every`` batches it looks and may warn."""
        checks.tensor("kl", kl)
        if kl.dim() != 2:
            raise ValueError(f"kl: expected shape (B, D), got {tuple(kl.shape)}")
        self._batches += 1
        if self._batches <= self.warmup:
            return
        mean = kl.detach().mean(0)
        self._sum = mean if self._sum is None else self._sum + mean
        if (self._batches - self.warmup) % self.every:
            return
        mean, self._sum = self._sum / self.every, None
        self._judge(mean, f"{self._batches} batches")

    @torch.no_grad()
    def look(self, model, x, context=None, *, when, generator=None):
        """Looks at once, at the model as it stands on x (N, *event), in the mode (train or eval) that it is in, and may
        warn; ``every`` and ``warmup`` are the caller's. A model without a KL for each latent is passed over.

        Args:
            context: (N, ...) for a conditional model.
            when: what the warning says after "after", such as "300 steps".
            generator: of a hierarchy's samples, or None.
        """
        if isinstance(model, QuantizedVAE):
            usage = code_usage(model.codes(x), model.quantizer.n_codes)
            self._decide(usage.used, len(usage.counts),
                         f"codebook collapse: {usage.used} of {len(usage.counts)} codes are in use after {when} "
                         f"(perplexity {usage.perplexity:.3g}); let dead codes restart, or use fewer of them")
        elif (kl := kl_per_latent(model, x, context, generator=generator)) is not None:
            self._judge(kl, when)

    def _judge(self, kl, when):
        self.kl = kl
        active = int((kl > self.threshold).sum())
        message = (f"posterior collapse: {active} of {len(kl)} latents have a KL above {self.threshold:g} nats after "
                   f"{when} (largest {kl.max().item():.2g}); lower beta, anneal it, or use free bits")
        if unknown := int((~kl.isfinite()).sum()):
            message = (f"{unknown} of {len(kl)} latents have a KL that is not finite after {when}: look for NaN in the "
                       "data and the weights")
        self._decide(active, len(kl), message)

    def _decide(self, active, total, message):
        self.active = active
        least = self.least_active if self.least_active >= 1 else math.ceil(self.least_active * total)
        self._low = self._low + 1 if active < least else 0
        if self._low == 0:
            self.collapsed = False
        elif self._low >= self.patience and not self.collapsed:
            self.collapsed = True
            self._warn(message)

    def _warn(self, message):
        if self.callback is not None:
            self.callback(message)
        else:
            warnings.warn(message, CollapseWarning, stacklevel=2)


def _capturing(tensor):
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
