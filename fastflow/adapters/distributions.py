"""torch.distributions: a Normal posterior whose sample and KL divergence to its prior come from one kernel."""

import torch
from torch import distributions
from torch.distributions.utils import _standard_normal

from fastflow import functional
from fastflow.adapters.layers import fusable

__all__ = ["Normal"]


class Normal(distributions.Normal):
    """torch.distributions.Normal, of which ``rsample`` also computes the KL divergence to the prior, in one pass.

    Samples are those of torch.distributions.Normal: the noise is torch's own, from the default generator of the device.
    ``torch.distributions.kl_divergence(q, q.prior)``, elementwise and in nats, is then the one computed with the latest
    sample; sample and divergence are parts of one graph, so that backward passes from the two one after the other need
    ``retain_graph=True``. To any other distribution, before the first sample, and in lower precision than float32 the
    divergence is torch's.

    Args:
        loc, scale: as in torch.distributions.Normal.
        prior: a torch.distributions.Normal whose parameters broadcast to the shape of these; None: N(0, 1).
        validate_args: as in torch.distributions.Normal.

    Raises:
        TypeError: ``prior`` is not a torch.distributions.Normal.
        ValueError: the prior's shape does not broadcast to that of loc and scale.
    """

    def __init__(self, loc, scale, prior=None, validate_args=None):
        super().__init__(loc, scale, validate_args)
        if prior is not None and not isinstance(prior, distributions.Normal):
            raise TypeError(f"prior: expected a torch.distributions.Normal, got {type(prior).__name__}")
        if prior is not None and not _broadcasts(prior.batch_shape, self.batch_shape):
            raise ValueError(f"prior: its shape {tuple(prior.batch_shape)} does not broadcast to "
                             f"{tuple(self.batch_shape)}")
        self._standard, self._kl = prior is None, None
        self.prior = prior if prior is not None else distributions.Normal(
            torch.zeros((), dtype=self.loc.dtype, device=self.loc.device),
            torch.ones((), dtype=self.loc.dtype, device=self.loc.device), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape)
        return Normal(self.loc.expand(shape), self.scale.expand(shape), None if self._standard else self.prior,
                      validate_args=False)

    def rsample(self, sample_shape=()):
        sample_shape, shape = torch.Size(sample_shape), self.batch_shape
        operands = (self.loc, self.scale) if self._standard else (self.loc, self.scale, self.prior.loc,
                                                                  self.prior.scale)
        if not fusable(*operands) or shape.numel() == 0 or sample_shape.numel() == 0:
            return super().rsample(sample_shape)
        eps = _standard_normal(sample_shape + shape, dtype=self.loc.dtype, device=self.loc.device)
        rows = (-1, shape[-1] if len(shape) > 1 else 1)
        loc, scale, *prior = (t.expand(shape).reshape(rows) for t in operands)
        z, kl = functional.gaussian_sample_kl((loc, scale), scale="std", prior=tuple(prior) or None, reduce="none",
                                              eps=eps.reshape(-1, *loc.shape), n_samples=sample_shape.numel())
        self._kl = kl.view(shape)
        return z.view(sample_shape + shape)


def _broadcasts(shape, target):
    return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1], strict=False))


@distributions.register_kl(Normal, distributions.Normal)
def _kl_normal(p, q):
    if q is p.prior and p._kl is not None and (p._kl.requires_grad or not torch.is_grad_enabled() or not any(
            t.requires_grad for t in (p.loc, p.scale, q.loc, q.scale))):  # else the sample was drawn without gradients
        return p._kl
    ratio = (p.scale / q.scale).square()
    return 0.5 * (ratio + ((p.loc - q.loc) / q.scale).square() - 1 - ratio.log())
