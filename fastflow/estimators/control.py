"""Score-function estimators with a reparameterised control variate, which learn to lower their own variance."""

import torch

from fastflow.estimators.base import Estimate, Estimator, called, evaluate, forward_mode, nothing, with_gradient
from fastflow.estimators.relaxed import temperature_parameter
from fastflow.one_number import OneNumber, one_number

__all__ = ["REBAR", "RELAX"]


class REBAR(OneNumber, Estimator):
    """(f(b) - c(z~)) grad log q(b) + grad c(z) - grad c(z~), where z are perturbed logits that harden to b, z~ are
    drawn given b, and c(z) = eta f(relaxed z). Unbiased for every eta and temperature, both of which the auxiliary loss
    (the squared gradient, hence its variance) teaches. f must accept relaxed samples; it is evaluated three times a
    sample.

    Args:
        temperature: of the relaxation, at first.
        eta: weight of the control variate, at first.

    References:
        Tucker et al., "REBAR: low-variance, unbiased gradient estimates for discrete latent variable models", 2017,
        arXiv:1703.07370.
    """

    independent_rows = True

    def __init__(self, temperature=0.5, eta=1.0):
        super().__init__()
        self.log_temperature = temperature_parameter(temperature)
        self.eta = one_number(eta)

    def control(self, q, f, z):
        """c (K, B) at perturbed logits z (K, B, *event)."""
        return self.eta * evaluate(f, q.relax(z, self.log_temperature.exp()))

    def estimate(self, q, f, n_samples, generator):
        return self.at(q, f, q.noise(n_samples, generator), q.noise(n_samples, generator))

    def at(self, q, f, u, v):
        """The estimate of given uniform noise (K, B, *event) for z and for z~."""
        with torch.no_grad():
            samples = q.harden(q.perturb(u))
        values = evaluate(f, samples)
        if not (torch.is_grad_enabled() and q.logits.requires_grad):
            if forward_mode():
                raise NotImplementedError(f"{type(self).__name__}: expected its gradient to be taken by backward, got "
                                          "logits without requires_grad under forward-mode AD")
            return Estimate(values.mean(0), samples, values, nothing(values))
        own = [p for p in self.parameters() if p.requires_grad]
        leaf = q.detached()  # the gradient is worked out here, so that c's own graph ends here
        free, given = (self.control(q, f, z) for z in (leaf.perturb(u), leaf.conditional(samples, v)))
        path, = torch.autograd.grad(free.sum() - given.sum(), leaf.logits, create_graph=bool(own))
        residual = values.detach() - (given if own else given.detach())
        score = q.score(samples).detach()
        gradient = (residual.reshape(*residual.shape, *[1] * (score.dim() - 2)) * score).mean(0) + path / len(values)
        value = with_gradient(values.mean(0), q.logits, gradient)
        return Estimate(value, samples, values, _squared(gradient, own) if own else nothing(values))


class RELAX(REBAR):
    """REBAR with a learned part in the control variate: c(z) = eta f(relaxed z) + network(z).

    Args:
        network: module from perturbed logits (N, *event) to (N,), see :func:`~fastflow.estimators.baseline_network`.
        temperature, eta: as for REBAR; eta=None leaves f out of the control variate.

    References:
        Grathwohl et al., "Backpropagation through the void", 2018, arXiv:1711.00123.
    """

    independent_rows = True

    def __init__(self, network, temperature=0.5, eta=1.0):
        super().__init__(temperature, 0.0 if eta is None else eta)
        self.network = network
        self.uses_f = eta is not None
        if not self.uses_f:
            self.log_temperature = self.eta = None

    def control(self, q, f, z):
        learned = called(self.network, z.flatten(0, 1), z.shape[0] * z.shape[1]).unflatten(0, z.shape[:2])
        return super().control(q, f, z) + learned if self.uses_f else learned


def _squared(gradient, own):
    """The mean over the batch of the squared gradient (B, ...), differentiable in ``own`` alone."""
    squared = (gradient**2).sum() / max(len(gradient), 1)
    slopes = torch.autograd.grad(squared, own, allow_unused=True)
    squared = squared.detach()
    for parameter, slope in zip(own, slopes, strict=True):
        if slope is not None:
            squared = squared + ((parameter - parameter.detach()) * slope).sum()
    return squared
