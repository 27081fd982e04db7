"""The terms of the ELBO of the commonest VAE."""

import torch

from fastflow import checks, reference
from fastflow.autograd import gaussian
from fastflow.autograd.differentiable import apply
from fastflow.autograd.mlp_vae import MLPVAEFunction

__all__ = ["run_mlp_vae"]


def run_mlp_vae(backend, x, encoder, decoder, *, scale, layout, order, seed=None, generator=None):
    """(log p(x | z), KL(q(z | x) || N(0, I))), each (B,), with gradients for the networks' parameters: wide_mlp,
    gaussian_sample_kl, wide_mlp and bernoulli_log_prob as one node of autograd, on a kernel's backend, for callers that
    know that the operands fit.

    Args:
        x: (B, N) bits in the parameters' dtype.
        encoder, decoder: (weights, biases, activation) as for wide_mlp, from N to 2D and from D to N features.
        scale, layout, order, seed, generator: as for gaussian_sample_kl.
    """
    checks.noise(None, seed, generator, "x", x, x.shape[0])
    if seed is None:
        seed = reference.draw_seed(x.device, generator)
    is_int = not isinstance(seed, torch.Tensor)
    noise = (reference.to_int64(seed) if is_int else 0, 0, None, reference.SCALES.index(scale),
             gaussian.flags_of(layout, order), 0)
    activations = [reference.LAYER_ACTIVATIONS.index(kind) for *_, kind in (encoder, decoder)]
    consts = (len(encoder[0]), len(decoder[0])), activations, noise
    return apply(MLPVAEFunction, x, None if is_int else seed, backend, consts, *encoder[0], *encoder[1], *decoder[0],
                 *decoder[1])
