"""The mixture of the encoder's posteriors at learned inputs."""

import math

import torch
from torch import nn

from fastflow import checks
from fastflow.draws import choose

__all__ = ["VampPrior"]


class VampPrior(nn.Module):
    """p(z) = (1/C) sum_c q(z | u_c), the posteriors at C learned pseudo-inputs u_c, parameter ``inputs`` (C, *event).

    It belongs to the VAE that it is given to, whose encoder and posterior it uses, as they are at every call.

    Args:
        inputs: (C, *event), where the pseudo-inputs start: examples of the data, or noise like them. With ``bounds``
            they must lie inside.
        bounds: (low, high) that pseudo-inputs are kept between, as for pixels, or None.
        trainable: whether the pseudo-inputs are learned; examples that stay make a mixture of data posteriors.

    References:
        Tomczak and Welling, "VAE with a VampPrior", 2018, arXiv:1705.07120.
    """

    def __init__(self, inputs, *, bounds=None, trainable=True):
        super().__init__()
        checks.tensor("inputs", inputs)
        if inputs.dim() < 2 or len(inputs) < 1:
            raise ValueError(f"inputs: expected shape (C, *event) with C >= 1, got {tuple(inputs.shape)}")
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"bounds: expected (low, high) with low < high, got {bounds!r}")
        if bounds is not None and not inputs.is_meta and bool(((inputs < bounds[0]) | (inputs > bounds[1])).any()):
            raise ValueError(f"inputs: expected values within the bounds {bounds!r}, got values from "
                             f"{inputs.min().item():g} to {inputs.max().item():g}")
        self.bounds = bounds
        self.inputs = nn.Parameter(inputs.detach().clone(), requires_grad=trainable)
        self._models = ()  # in a tuple, as it is no module of this one: the model has this one already

    def bind(self, model):
        """Take the encoder and posterior of the model; called by VAE.

        Raises:
            TypeError: the posterior has no log_prob.
            ValueError: the prior belongs to a model with another encoder or posterior.
        """
        if not hasattr(model.posterior, "log_prob"):
            raise TypeError("posterior: expected log_prob(params, z) for a VampPrior, which "
                            f"{type(model.posterior).__name__} has not")
        if any(own.encoder is not model.encoder or own.posterior is not model.posterior for own in self._models):
            raise ValueError("prior: expected a VampPrior for this model alone, got one that belongs to a "
                             f"{type(self._models[0]).__name__} with another encoder or posterior")
        self._models = (model,)

    def log_prob(self, z):
        """(N,) nats of z (N, D, *S)."""
        checks.tensor("z", z)
        params, posterior = self._params()
        each = posterior.log_prob(params, z[:, None].expand(-1, len(params), *z.shape[1:]))
        return torch.logsumexp(each, 1) - math.log(len(params))

    def sample(self, n, *, generator=None, temperature=1.0):
        """(n, D, *S); ``temperature`` scales the components' standard deviations, and must be 1 where the posterior is
        no diagonal Gaussian."""
        checks.rng(generator)
        params, posterior = self._params()
        if temperature != 1.0 and not hasattr(posterior, "moments"):
            raise ValueError(f"temperature: expected 1 for a VampPrior of a {type(posterior).__name__}, got "
                             f"{temperature}")
        chosen = choose(params.new_full((len(params),), 1.0 / len(params)), n, generator)
        z = posterior(params[chosen], generator=generator)[0][0]
        if temperature == 1.0:
            return z
        mean = posterior.moments(params[chosen])[0]
        return mean + temperature * (z - mean)

    def pseudo_inputs(self):
        """(C, *event), within the bounds."""
        return self.inputs if self.bounds is None else self.inputs.clamp(*self.bounds)

    def _params(self):
        if not self._models:
            raise RuntimeError("VampPrior: give it to a VAE first, as prior=")
        model, = self._models
        return model._encoded(self.pseudo_inputs(), None), model.posterior
