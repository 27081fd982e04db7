"""What every gradient estimator takes and returns."""

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad

from fastflow import checks
from fastflow.estimators.latents import Discrete, bounded

__all__ = ["Estimate", "Estimator"]


class Estimate(NamedTuple):
    """What an estimator returns for B examples.

    Attributes:
        value: (B,) estimate of the objective. Its gradient by q's logits and by the parameters of f is the gradient
            estimate; no gradient reaches the estimator's own parameters.
        samples: (N, B, *event) where f was evaluated for ``value``.
        values: (N, B) f there.
        auxiliary: 0-d, what the estimator's own parameters minimise, 0 if it has none; nothing else gets a gradient
            from it. Add it to the loss whichever way ``value`` goes.
    """

    value: torch.Tensor
    samples: torch.Tensor
    values: torch.Tensor
    auxiliary: torch.Tensor


class Estimator(nn.Module):
    """estimator(q, f, n_samples=1, *, generator=None) -> :class:`Estimate` of an objective over b drawn from q.

    q is a :class:`~fastflow.estimators.Bernoulli` or :class:`~fastflow.estimators.Categorical`; f takes samples
    (N, B, *event), any N, to (N, B), each from its own sample alone. f may have parameters, and may depend on q's
    logits directly as well (as log p(x, b) - log q(b) does); the gradient counts both.

    Attributes:
        objective: "mean", E f(b); or "iwae", E log(mean of exp f(b_k) over the n_samples).
        independent_rows: whether a row's estimate has nothing to do with the other rows of the call nor with earlier
            calls, so that many calls can be made as one. A class says so of itself; its subclasses don't inherit it.
    """

    objective = "mean"
    least_samples = 1
    independent_rows = False

    def forward(self, q, f, n_samples=1, *, generator=None):
        if not isinstance(q, Discrete):
            raise TypeError(f"q: expected a Bernoulli or Categorical, got {type(q).__name__}")
        n_samples = checks.count("n_samples", n_samples, self.least_samples)
        return self.estimate(q, f, n_samples, generator)

    def estimate(self, q, f, n_samples, generator):
        raise NotImplementedError


def evaluate(f, samples):
    """f at samples (N, B, *event): (N, B), checked."""
    values = f(samples)
    if not isinstance(values, torch.Tensor) or values.shape != samples.shape[:2]:
        got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"f: expected values of shape (N, B) = {tuple(samples.shape[:2])}, got {got}")
    if not values.is_floating_point():
        raise TypeError(f"f: expected values of a floating dtype, got {values.dtype}")
    return values


def called(network, logits, batch):
    """The network's numbers (batch,), in the dtype of the logits (batch, *event), which it gets in that of its
    parameters, infinite ones as +-30."""
    logits = bounded(logits)
    like = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    lower = like is not None and torch.float64 not in (like.dtype, logits.dtype)  # float64 is to be refused
    output = network(logits.to(like.dtype) if lower and not _autocasts(logits.device) else logits)
    if output.shape != (batch,):
        raise ValueError(f"network: expected output of shape {(batch,)}, got {tuple(output.shape)}")
    return output.to(logits.dtype)


def forward_mode():
    """Whether forward-mode AD is active, to which neither hooks nor torch.no_grad() nor requires_grad mean anything."""
    return forward_ad._current_level >= 0


def _autocasts(device):
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def with_gradient(value, tensor, gradient):
    """``value`` (B,) unchanged, with ``gradient`` added to what flows back into ``tensor`` (B, ...), where that is not
    infinite."""
    zero = torch.where(tensor.isinf(), 0.0, tensor - tensor.detach()) * gradient.detach()
    return _plus_zero(value, zero.flatten(1).sum(1) if zero.dim() > 1 else zero)


def with_score(value, score):
    """``value`` (B,) unchanged, with the gradient of ``score`` (B,) added to its own."""
    return _plus_zero(value, score - score.detach())


def _plus_zero(value, zero):
    # Where f is infinite the zero is NaN: then the value stays what it is, and the gradient is NaN.
    return torch.where(zero.isnan(), value, value + zero)


def nothing(like):
    """The auxiliary loss of an estimator without parameters."""
    return torch.zeros((), dtype=like.dtype, device=like.device)
