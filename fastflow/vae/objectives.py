"""What training maximises, when that is not the plain ELBO: its terms weighed anew, with penalties, or IWAE.

An objective is called as objective(model, x, n_samples, beta, context=, eps=, seed=, generator=) and returns an
:class:`Objective`; give one to ``VAE(objective=)``, and the model's forward, and with it the training step, is that.
"""

from typing import NamedTuple

import torch
from torch import nn

from fastflow.vae.elbo import ELBO, iwae

__all__ = ["IWAEObjective", "Objective", "PenalizedELBO"]


class Objective(NamedTuple):
    """What an objective makes of B examples, in nats.

    Attributes:
        value: (B,), to be maximised. A term of the whole batch counts the same for every example.
        bound: the ELBO of the same samples.
        parts: {name: 0-d tensor without gradient} of the terms beyond rate and distortion, averaged over the batch.
    """

    value: torch.Tensor
    bound: ELBO
    parts: dict

    @property
    def rate(self):
        return self.bound.rate

    @property
    def distortion(self):
        return self.bound.distortion


class PenalizedELBO(nn.Module):
    """-distortion - beta * rate - sum of the penalties.

    Args:
        penalties: any number, see penalties.py: modules called as penalty(model, inference, bound, context=, targets=,
            generator=), which return a cost, (B,) or 0-d, to be subtracted, and {name: 0-d tensor} to be reported.
        beta: weight of the rate; the caller's beta, as of a warm-up, multiplies it.

    References:
        Higgins et al., "beta-VAE", 2017.
    """

    def __init__(self, *penalties, beta=1.0):
        super().__init__()
        self.penalties = nn.ModuleList(penalties)
        self.beta = beta

    def forward(self, model, x, n_samples=1, beta=1.0, *, context=None, targets=None, generator=None, **noise):
        inference = model.infer(x, n_samples, context=context, generator=generator, **noise)
        bound = model.elbo_of(x, inference, self.beta * beta, context=context)
        value, parts = bound.elbo, {}
        for penalty in self.penalties:
            cost, found = penalty(model, inference, bound, context=context, targets=targets, generator=generator)
            value = value - cost
            parts |= {name: term.detach() for name, term in found.items()}
        return Objective(value, bound, parts)

    def extra_repr(self):
        return f"beta={self.beta}"


class IWAEObjective(nn.Module):
    """The importance-weighted bound of K samples; the rate is weighed by the caller's beta inside the weights.

    Args:
        n_samples: K, where the caller asks for a single sample, as training steps do.

    References:
        Burda et al., "Importance weighted autoencoders", 2016, arXiv:1509.00519.
    """

    def __init__(self, n_samples=50):
        super().__init__()
        if isinstance(n_samples, bool) or not isinstance(n_samples, int) or n_samples < 1:
            raise ValueError(f"n_samples: expected a positive int, got {n_samples!r}")
        self.n_samples = n_samples

    def forward(self, model, x, n_samples=1, beta=1.0, *, context=None, **noise):
        n_samples = self.n_samples if n_samples == 1 else n_samples
        bound = model.elbo(x, n_samples, beta, context=context, **noise)
        log_w = bound.log_px_z + beta * (bound.log_pz - bound.log_qz)
        return Objective(iwae(log_w), bound, {})

    def extra_repr(self):
        return f"n_samples={self.n_samples}"
