"""What gradient estimators ask of a model: draws of q(z | x), and both densities at any z, for one z or for levels.

``draw(n_samples, eps=, seed=, generator=)`` gives a list of reparameterised latents (K, B, D, *S), one, or one for each
level, and log q(z | x) (K, B); ``log_joint(latents)`` gives log p(x | z) and log p(z), (K, B) each;
``fixed_log_q(latents)`` log q(z | x) (K, B), differentiable in the latents alone.
"""

from torch import nn
from torch.func import functional_call

from fastflow.vae.hierarchy import HierarchicalVAE
from fastflow.vae.model import VAE

__all__ = ["sampled"]


def sampled(model, x, context):
    """The draws and densities of a model for x (B, *event).

    Raises:
        TypeError: the model is neither a VAE with one encoder and posterior nor a hierarchy, or a hierarchy with a
            context.
    """
    if isinstance(model, HierarchicalVAE):
        if context is not None:
            raise TypeError(f"context: a {type(model).__name__} takes none")
        return _Levels(model, x)
    if not isinstance(model, VAE) or type(model)._infer is not VAE._infer:
        raise TypeError(f"model: expected a HierarchicalVAE, or a VAE whose z is drawn from its posterior, got "
                        f"{type(model).__name__}")
    return _One(model, x, context)


class _One:
    """One latent z."""

    def __init__(self, model, x, context):
        self.model, self.x, self.context = model, x, context
        self.prior, self.params = model._prior(context), model._encoded(x, context)

    def draw(self, n_samples, **noise):
        z, log_q, _ = self.model.posterior(self.params, self.prior, n_samples, **noise)
        return [z], log_q

    def log_joint(self, latents):
        z, = latents
        return (self.model._log_likelihood(self.x, z, self.context, z.shape[:1]),
                self.model._log_prior(z, self.context, self.prior))

    def fixed_log_q(self, latents):
        posterior = self.model.posterior
        if not hasattr(posterior, "log_prob"):
            raise TypeError(f"posterior: expected log_prob(params, z), which {type(posterior).__name__} has not")
        params = self.params.detach()
        if next(posterior.parameters(), None) is None:
            return posterior.log_prob(params, *latents)
        return _fixed(_LogProb(posterior), params, *latents)


class _Levels:
    """The latents of a hierarchy."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def draw(self, n_samples, **noise):
        _, latents, (_, log_q, _) = self.model._descend(self.x, n_samples, **noise)
        return latents, log_q.sum(0)

    def log_joint(self, latents):
        log_px_z, log_pz = self.model.log_joint(self.x, latents)
        return log_px_z, log_pz.sum(0)

    def fixed_log_q(self, latents):
        density, = self.model._density
        return _fixed(density, self.x, latents).sum(0)


class _LogProb(nn.Module):
    """log_prob of a posterior as a forward, for functional_call."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, params, z):
        return self.posterior.log_prob(params, z)


def _fixed(module, *args):
    """What a module gives with its parameters as constants."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, args)
