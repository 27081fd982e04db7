"""Pieces of an objective that hold the KL where it is wanted: free bits, capacity, balance of groups.

Each takes KL in nats and gives what stands in for it in the loss. Gates and coefficients are constants to the gradient.
Averages over the batch are taken over all ranks of torch.distributed where it runs, so that every rank opens the same
gates; the modules do so in training mode alone, in which all ranks call them together.
"""

import math

import torch
import torch.distributed as dist
from torch import nn

from fastflow import checks
from fastflow.vae.posteriors.closed import kl_by_element, prior_moments
from fastflow.vae.schedules import Schedule

__all__ = ["Capacity", "FreeBits", "KLBalance", "capacity", "free_bits", "kl_balance"]


def free_bits(kl, least, per="dim", *, batch_mean=True, ranks=True):
    """The rate (B,) with max(least, kl) in place of each unit's kl: below ``least`` nats a unit costs nothing more and
    has no gradient.

    Args:
        kl: (B, D, *S), element by element.
        least: nats that each unit has free.
        per: the unit: "dim", each element; "channel", summed over S; "group", everything, one group of a hierarchy.
        batch_mean: compare the batch's mean, which leaves the gates open or shut for all alike; the mean
            of the result over that batch is then the sum of max(least, mean kl). False compares each example's own.
        ranks: whether the batch is that of all ranks.

    References:
        Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016, arXiv:1606.04934.
    """
    checks.tensor("kl", kl)
    checks.choice("per", per, ("dim", "channel", "group"))
    if kl.dim() < 2:
        raise ValueError(f"kl: expected shape (B, D, *S), got {tuple(kl.shape)}")
    checks.number("least", least)
    if not 0.0 <= least < math.inf:
        raise ValueError(f"least: expected a finite number >= 0, got {least!r}")
    units = _unit_kl(kl, per)
    compared = _batch_mean(units, ranks) if batch_mean else units.detach()
    return torch.where(compared <= least, least, units).sum(1)  # NaN stays NaN


def capacity(kl, target, gamma):
    """gamma |kl - target| (B,): the KL (B,) drawn to ``target`` nats, which a schedule may raise.

    Args:
        target: a finite number or a tensor.
        gamma: weight, a number >= 0 or a tensor.

    References:
        Burgess et al., "Understanding disentangling in beta-VAE", 2018, arXiv:1804.03599.
    """
    checks.tensor("kl", kl)
    for name, value, least in (("target", target, ""), ("gamma", gamma, " >= 0")):
        if not isinstance(value, torch.Tensor):  # whose value is the device's
            checks.number(name, value)
            if not -math.inf < value < math.inf or least and value < 0.0:
                raise ValueError(f"{name}: expected a finite number{least}, got {value!r}")
    return gamma * (kl - target).abs()


def kl_balance(kl, sizes=None, *, ranks=True):
    """(rate (B,), coefficients (L,)) of the KL (L, B) of L groups: each is weighed in proportion to its batch mean plus
    0.01 nats, for each of its elements, the coefficients' mean being 1. A group that says little for its size is so
    spared while the total warms up.

    Args:
        sizes: L numbers, elements of each group, that its batch mean is divided by; None treats all alike.
        ranks: whether the batch is that of all ranks.

    References:
        Vahdat et al., "DVAE++", 2018, arXiv:1802.04920, appendix H; Vahdat and Kautz, "NVAE", 2020, arXiv:2007.03898,
        whose code divides by the size, where the formula on paper multiplies.
    """
    checks.tensor("kl", kl)
    if kl.dim() != 2:
        raise ValueError(f"kl: expected shape (L, B), got {tuple(kl.shape)}")
    strength = _batch_mean(kl.transpose(0, 1), ranks)[0].abs() + 0.01  # as NVAE does: no group is silenced altogether
    if sizes is not None:
        if len(sizes) != len(kl):
            raise ValueError(f"sizes: expected {len(kl)} numbers, got {len(sizes)}")
        # No tensor of the sizes: the copy from the host can't be recorded in a CUDA graph.
        strength = torch.stack([one / size for one, size in zip(strength, sizes, strict=True)])
    coefficients = strength / strength.mean()
    return (coefficients[:, None] * kl).sum(0), coefficients


class FreeBits(nn.Module):
    """A penalty that puts :func:`free_bits` in the place of the rate, weighed as the rate is. Reports "free_bits", the
    mean of what stands there.

    Args:
        least, per, batch_mean: as for the function. A group is the whole z of a VAE, and each level of a hierarchy; the
            KL of a hierarchy's units is that at the samples of the levels above, averaged over them.

    Raises:
        TypeError: when called with "dim" or "channel" for a model without a GaussianPosterior that is no hierarchy, or
            a prior to which its KL has no closed form; "group" suits every VAE.
    """

    of_levels = of_rate = True

    def __init__(self, least, per="dim", *, batch_mean=True):
        super().__init__()
        free_bits(torch.zeros(1, 1), least, per, ranks=False)  # checks the options
        self.least, self.per, self.batch_mean = least, per, batch_mean

    def asks(self, model):
        """What the model's infer is asked for."""
        return {"by_element": True} if self.per != "group" and hasattr(model, "levels") else {}

    def forward(self, model, inference, bound, *, beta=1.0, context=None, **_):
        rate = free_bits(self._units(model, inference, bound, context), self.least, batch_mean=self.batch_mean,
                         ranks=self.training)
        return beta * (rate - bound.rate), {"free_bits": rate.mean()}

    def _units(self, model, inference, bound, context):
        """The KL (B, U) of each unit."""
        if self.per == "group":
            return bound.rate[:, None] if hasattr(inference, "z") else inference.kl.mean(1).T
        parts = ([_elementwise_kl(model, inference, context)] if hasattr(inference, "z")
                 else [kl.mean(0) for kl in inference.kl_by_element])
        return torch.cat([_unit_kl(kl, self.per) for kl in parts], 1)

    def extra_repr(self):
        return f"least={self.least}, per={self.per!r}"


class KLBalance(nn.Module):
    """A penalty that puts :func:`kl_balance` of a hierarchy's levels in the place of the rate, weighed as the rate is,
    while that weight is below ``until``; from there on the rate is the plain sum. Reports "balanced_rate".

    Args:
        until: weight of the rate at which the balance ends: 1, where a warm-up does; math.inf for never.
        sizes: whether each level's KL is taken for each of its latents, as in the function, or whole.

    Raises:
        TypeError: when called for a model without levels.
    """

    of_levels = of_rate = True

    def __init__(self, until=1.0, *, sizes=True):
        super().__init__()
        self.until, self.sizes = until, sizes

    def forward(self, model, inference, bound, *, beta=1.0, **_):
        if not hasattr(inference, "latents"):
            raise TypeError(f"model: KLBalance needs a hierarchy, got {type(model).__name__}")
        sizes = [z[0, 0].numel() for z in inference.latents] if self.sizes else None
        rate, _ = kl_balance(inference.kl.mean(1), sizes, ranks=self.training)
        if isinstance(beta, torch.Tensor):  # whose value is the device's
            rate = torch.where(beta < self.until, rate, bound.rate)
        elif not beta < self.until:
            rate = bound.rate
        return beta * (rate - bound.rate), {"balanced_rate": rate.mean()}

    def extra_repr(self):
        return f"until={self.until}, sizes={self.sizes}"


class Capacity(nn.Module):
    """A penalty that puts :func:`capacity` in the place of the rate, whatever weight that has.

    Args:
        target: nats; a number, a 0-d tensor, or a Schedule that raises it.
        gamma: as for the function.
    """

    of_levels = of_rate = True

    def __init__(self, target, gamma):
        super().__init__()
        capacity(torch.zeros(1), 0.0 if isinstance(target, Schedule) else target, gamma)  # checks the options
        self.target, self.gamma = target, gamma

    def forward(self, model, inference, bound, *, beta=1.0, **_):
        target, rate = self.target, bound.rate
        if isinstance(target, Schedule):
            target = target.tensor(rate.device, rate.dtype)
        return capacity(rate, target, self.gamma) - beta * rate, {}

    def extra_repr(self):
        return f"gamma={self.gamma}"


def _unit_kl(kl, per):
    """(B, U) of a KL (B, D, *S)."""
    if per == "dim":
        return kl.flatten(1)
    return kl.flatten(1).sum(1, keepdim=True) if per == "group" else kl.reshape(*kl.shape[:2], -1).sum(2)


def _elementwise_kl(model, inference, context):
    """KL (B, D, *S) of the posterior to the prior."""
    posterior = getattr(model, "posterior", None)
    if not hasattr(posterior, "moments"):
        raise TypeError(f"posterior: free bits of each latent need a GaussianPosterior, got {type(posterior).__name__}"
                        "; use per='group'")
    mean, log_sigma = posterior.moments(inference.params)
    given = model._prior(context)
    prior = prior_moments(given, mean)
    if prior is None:
        raise TypeError(f"prior: free bits of each latent need None or a GaussianPrior, got {type(given).__name__}; "
                        "use per='group'")
    if inference.kl is None:
        raise TypeError(f"model: free bits of each latent need a KL in closed form, which a {type(model).__name__} has "
                        "not; use per='group'")
    lead = (1, -1, *[1] * (mean.dim() - 2))
    prior_mean, prior_log = (t.reshape(lead) if t.dim() == 2 and mean.dim() != 2 else t for t in prior)
    return kl_by_element(mean, log_sigma, prior_mean, prior_log)


def _batch_mean(values, ranks):
    """(1, *): the mean over dim 0, of all ranks' rows if ``ranks``, without gradient."""
    values = values.detach()
    total = torch.cat([values.sum(0).flatten(), values.new_full((1,), values.shape[0])])
    if ranks and dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return (total[:-1] / total[-1]).reshape(1, *values.shape[1:])
