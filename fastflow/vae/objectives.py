"""What training maximises, when that is not the plain ELBO: its terms weighed anew, with penalties, or a tighter bound.

An objective is called as objective(model, x, n_samples, beta, context=, eps=, seed=, generator=) and returns an
:class:`Objective`; give one to ``VAE(objective=)`` or ``HierarchicalVAE(objective=)``, and the model's forward, and
with it the training step, is that.
"""

from typing import NamedTuple

import torch
from torch import nn

from fastflow import checks
from fastflow.vae import bounds
from fastflow.vae.elbo import ELBO, check_beta, iwae

__all__ = ["BoundObjective", "Objective", "PenalizedELBO"]


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
        penalties: any number, see penalties.py: modules called as penalty(model, inference, bound, beta=, context=,
            targets=, generator=), beta the rate's weight in the bound, which return a cost, (B,) or 0-d, to be
            subtracted, and {name: 0-d tensor} to be reported. Those with ``of_levels`` also take a hierarchy, whose
            inference is its HierarchyTerms; those with ``of_targets`` have a ``name`` among the targets; of those with
            ``of_rate``, which put something in the place of the rate, there is one at most. ``asks(model)``, where a
            penalty has it, gives further keywords for the model's infer.
        beta: weight of the rate; the caller's beta, as of a warm-up, multiplies it.

    A ``seed`` is of the posterior's noise alone. What penalties draw themselves, samples of the prior (MMD,
    DensityRatio) or an order of the rows (FactorTC), comes from ``generator``, or else from torch's.

    Raises:
        TypeError: when called for a hierarchy, with a penalty on a single z.
        ValueError: two penalties in the place of the rate; when called with targets that belong to no penalty.

    References:
        Higgins et al., "beta-VAE", 2017.
    """

    def __init__(self, *penalties, beta=1.0):
        super().__init__()
        of_rate = [type(penalty).__name__ for penalty in penalties if getattr(penalty, "of_rate", False)]
        if len(of_rate) > 1:
            raise ValueError(f"penalties: {' and '.join(of_rate)} each stand in the place of the rate; give one")
        self.penalties = nn.ModuleList(penalties)
        self.beta = beta

    def forward(self, model, x, n_samples=1, beta=1.0, *, context=None, targets=None, generator=None, **noise):
        self._check_targets(targets)
        given = {} if context is None else {"context": context}
        asks = {key: value for penalty in self.penalties if hasattr(penalty, "asks")
                for key, value in penalty.asks(model).items()}
        inference = model.infer(x, n_samples, generator=generator, **given, **asks, **noise)
        check_beta(beta, inference.log_qz)
        beta = self.beta * beta
        bound = model.elbo_of(x, inference, beta, **given)
        value, parts = bound.elbo, {}
        for penalty in self.penalties:
            if not (hasattr(inference, "z") or getattr(penalty, "of_levels", False)):
                raise TypeError(f"model: {type(penalty).__name__} needs a VAE with one z, got {type(model).__name__}")
            cost, found = penalty(model, inference, bound, beta=beta, context=context, targets=targets,
                                  generator=generator)
            value = value - cost
            parts |= {name: term.detach() for name, term in found.items()}
        return Objective(value, bound, parts)

    def _check_targets(self, targets):
        if targets is None:
            return
        names = {penalty.name for penalty in self.penalties if getattr(penalty, "of_targets", False)}
        unknown = sorted(set(targets) - names) if isinstance(targets, dict) else []
        if unknown or not names:
            raise ValueError(f"targets: expected those of the penalties' tasks ({', '.join(sorted(names)) or 'none'}), "
                             f"got {', '.join(unknown) or 'some'}")

    def extra_repr(self):
        return f"beta={self.beta}"


OF_WEIGHTS = {"iwae": iwae, "miwae": bounds.miwae, "ciwae": bounds.ciwae, "renyi": bounds.renyi}
OF_MODEL = {"stl": bounds.stl_terms, "dreg": bounds.dreg_terms, "piwae": bounds.piwae_terms}
OPTIONS = {"miwae": {"groups"}, "piwae": {"groups"}, "ciwae": {"beta"}, "renyi": {"alpha"}}


class BoundObjective(nn.Module):
    """A bound of K samples by its name, or a gradient estimator of one; the rate is weighed by the caller's beta inside
    the weights.

    Args:
        name: "iwae", "miwae", "ciwae", "renyi", "stl", "dreg" or "piwae", the functions of those names.
        n_samples: K, where the caller asks for a single sample, as training steps do.
        options: what else the function takes: ``groups`` of "miwae" and "piwae", ``beta`` of "ciwae", ``alpha`` of
            "renyi".

    All serve a VAE and a HierarchicalVAE, compiled too.

    Raises:
        ValueError: no such name, n_samples below 1, or an option that the function refuses for as many samples; when
            called with targets.
        TypeError: options that the bound does not take, or lacks.
    """

    def __init__(self, name, n_samples=50, **options):
        super().__init__()
        checks.choice("name", name, (*OF_WEIGHTS, *OF_MODEL))
        n_samples = checks.count("n_samples", n_samples, 1)
        if options.keys() != (wanted := OPTIONS.get(name, set())):
            raise TypeError(f"options: {name} takes {', '.join(sorted(wanted)) or 'none'}, got "
                            f"{', '.join(sorted(options)) or 'none'}")
        if name == "piwae":
            bounds.check_groups(n_samples, options["groups"])
        elif name in OF_WEIGHTS:
            OF_WEIGHTS[name](torch.zeros(n_samples, 1), **options)  # checks the options
        self.name, self.n_samples, self.options = name, n_samples, options

    def forward(self, model, x, n_samples=1, beta=1.0, *, context=None, targets=None, **noise):
        if targets is not None:
            raise ValueError(f"targets: {self.name} is a bound without a task")
        n_samples = self.n_samples if n_samples == 1 else n_samples
        if self.name in OF_WEIGHTS:
            given = {} if context is None else {"context": context}
            bound = model.elbo(x, n_samples, beta, **given, **noise)
            log_w = bound.log_px_z + beta * (bound.log_pz - bound.log_qz)
            return Objective(OF_WEIGHTS[self.name](log_w, **self.options), bound, {})
        value, terms = OF_MODEL[self.name](model, x, n_samples, beta, context=context, **self.options, **noise)
        terms = bounds.Terms(*(t.detach() for t in terms))
        rate, distortion = (terms.log_qz - terms.log_pz).mean(0), -terms.log_px_z.mean(0)
        return Objective(value, ELBO(*terms, terms.log_w(1.0), rate, distortion, rate, -distortion - beta * rate), {})

    def extra_repr(self):
        return ", ".join([repr(self.name), f"n_samples={self.n_samples}",
                          *(f"{key}={value}" for key, value in self.options.items())])
