"""The training loss of a VAE of bits with fully connected networks as one node of autograd."""

import torch

from fastflow import backends
from fastflow.functional.mlp_vae import run_mlp_vae
from fastflow.nn.fused_sequential import whole_mlp
from fastflow.nn.hooks import is_hooked
from fastflow.vae.likelihoods import BernoulliLikelihood

__all__ = ["one_node"]


def one_node(model, x, *, seed=None, generator=None, eps=None):
    """(log p(x | z), KL) of one sample for each x, (B,), as the model's parts make them one after the other; None where
    the model is another one, a part of it is hooked, or no kernel serves.

    Between some ten nodes of autograd, dispatching costs an MLP VAE on a CPU more than the likelihood.
    """
    likelihood, posterior = model.likelihood, model.posterior
    if (type(likelihood) is not BernoulliLikelihood or eps is not None or seed is not None and type(seed) is not int
            or torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.requires_grad or x.dim() < 2
            or x.shape[0] == 0 or is_hooked(likelihood) or is_hooked(posterior) or "log_prob" in vars(likelihood)):
        return None
    event = x.shape[1:]
    encoding = whole_mlp(model.encoder, event, None, x.dtype)
    if encoding is None or (features := encoding[0][-1].shape[0]) % 2:
        return None
    latents = (features // 2,)
    decoding = whole_mlp(model.decoder, latents, event, x.dtype)
    if decoding is None:
        return None
    parameters = (*encoding[0], *encoding[1], *decoding[0], *decoding[1])
    backend, _ = backends.prefers("wide_mlp", x, *parameters)
    if backend == "reference" or not any(p.requires_grad for p in parameters):
        return None
    if model.latent_shape is None:
        model.latent_shape = torch.Size(latents)
    return run_mlp_vae(backend, x.flatten(1), encoding, decoding, scale=posterior.scale,
                       layout=posterior.layout, order=posterior.order, seed=seed, generator=generator)
