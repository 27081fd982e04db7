"""The terms of the ELBO of a VAE of bits with fully connected networks as one torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable
from fastflow.autograd.gaussian import packing_of


@differentiable.direct
class MLPVAEFunction(torch.autograd.Function):
    """(log p(x | z), KL), each (B,), of x (B, N), a seed tensor or None, and the networks' parameters: the encoder's
    weights and biases, the decoder's weights and biases.

    ``consts``: how many layers the encoder and the decoder have, their activations, and the arguments of gaussian_fwd
    behind the seed.
    """

    @staticmethod
    def forward(ctx, x, seed, backend, consts, *params):
        layers, activations, noise = consts
        encoder, decoder = _networks(params, layers)
        encoded, kept_encoder = extension.kernel(backend, "wide_mlp_fwd")(x, *encoder, activations[0], True)
        z, kl, _, eps = extension.kernel(backend, "gaussian_fwd")(encoded, None, None, None, None, seed, *noise, False,
                                                                  True)
        logits, kept_decoder = extension.kernel(backend, "wide_mlp_fwd")(z, *decoder, activations[1], True)
        ctx.save_for_backward(x, seed, encoded, z, eps, logits, *params, *kept_encoder, *kept_decoder)
        ctx.consts = backend, consts, len(kept_encoder)
        return extension.kernel(backend, "bernoulli_log_prob_fwd")(x, logits), kl

    @staticmethod
    def backward(ctx, grad_log_px, grad_kl):
        backend, consts, in_encoder = ctx.consts
        layers, activations, noise = consts
        x, seed, encoded, z, eps, logits, *saved = ctx.saved_tensors
        count = 2 * sum(layers)
        params, kept = saved[:count], saved[count:]
        needs = ctx.needs_input_grad[4:]
        if differentiable.wanted((grad_log_px, grad_kl)):
            grads = differentiable.reference_grads(lambda *p: _reference(x, eps, consts, p), params, needs,
                                                   (grad_log_px, grad_kl))
            return (None, None, None, None, *grads)
        encoder, decoder = _networks(params, layers)
        grad_logits = extension.kernel(backend, "bernoulli_log_prob_bwd")(grad_log_px, x, logits)
        grad_z, of_decoder = extension.kernel(backend, "wide_mlp_bwd")(
            grad_logits, [], z, decoder[0], kept[in_encoder:], activations[1], True, True)
        grad_encoded = extension.kernel(backend, "gaussian_bwd")(
            grad_z, grad_kl, None, encoded, None, None, None, eps, seed, *noise, True, False, False, False)[0]
        _, of_encoder = extension.kernel(backend, "wide_mlp_bwd")(
            grad_encoded, [], x, encoder[0], kept[:in_encoder], activations[0], False, True)
        grads = of_encoder[0::2] + of_encoder[1::2] + of_decoder[0::2] + of_decoder[1::2]
        if not all(needs):
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return (None, None, None, None, *grads)


def _networks(params, layers):
    """((weights, biases) of the encoder, the same of the decoder)."""
    at, found = 0, []
    for count in layers:
        found.append((params[at:at + count], params[at + count:at + 2 * count]))
        at += 2 * count
    return found


def _reference(x, eps, consts, params):
    layers, activations, (_, _, _, scale, flags, _) = consts
    encoder, decoder = _networks(params, layers)
    first, second = (reference.LAYER_ACTIVATIONS[activation] for activation in activations)
    z, kl = reference.gaussian_sample_kl(
        reference.wide_mlp(x, *encoder, activation=first), scale=reference.SCALES[scale], eps=eps, **packing_of(flags))
    return reference.bernoulli_log_prob(x, reference.wide_mlp(z, *decoder, activation=second)), kl
