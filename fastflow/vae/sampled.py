"""What gradient estimators ask of a model: draws of q(z | x), and both densities at any z, for one z or for levels.

``draw(n_samples, eps=, seed=, generator=)`` gives a list of reparameterised latents (K, B, D, *S), one, or one for each
level, and log q(z | x) (K, B); ``log_joint(latents)`` gives log p(x | z) and log p(z), (K, B) each; ``fixed_log_joint``
the same and ``fixed_log_q`` log q(z | x) (K, B), both differentiable in the latents alone.
"""

from fastflow.vae.fixed import fixed
from fastflow.vae.hierarchy import HierarchicalVAE
from fastflow.vae.model import draws_from_posterior

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
    if not draws_from_posterior(model):
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
        return self.model._log_joint(self.x, *latents, self.context, self.prior)

    def fixed_log_joint(self, latents):
        with fixed(self.model):
            return self.model._log_joint(self.x, *latents, self.context)

    def fixed_log_q(self, latents):
        with fixed(self.model.posterior):
            return self.model._log_posterior(self.params.detach(), *latents)


class _Levels:
    """The latents of a hierarchy."""

    def __init__(self, model, x):
        self.model, self.x = model, x

    def draw(self, n_samples, **noise):
        _, terms = self.model._descend(self.x, n_samples, **noise)
        return terms.latents, terms.log_qz.sum(0)

    def log_joint(self, latents):
        log_px_z, log_pz = self.model.log_joint(self.x, latents)
        return log_px_z, log_pz.sum(0)

    def fixed_log_joint(self, latents):
        with fixed(self.model):
            return self.log_joint(latents)

    def fixed_log_q(self, latents):
        with fixed(self.model):
            return self.model.log_posterior(self.x, latents).sum(0)
