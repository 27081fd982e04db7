"""Reparameterised Gaussian sampling with KL as a torch.autograd.Function."""

import torch

from fastflow import backends, extension, reference
from fastflow.autograd import differentiable

INTERLEAVED, SCALE_IN_FRONT = 1, 2
# On a CPU, noise of this size and above is drawn again for backward: to allocate it and to read it from memory takes as
# long, and far longer once malloc gives blocks of this size back to the system after each step. Below, it is kept.
REDRAWN_BYTES = 2 << 20


def flags_of(layout, order):
    """How the kernel is told the packing of params."""
    return (INTERLEAVED if layout == "interleave" else 0) | (SCALE_IN_FRONT if order == "scale_mean" else 0)


def packing_of(flags):
    """The layout and order that :func:`flags_of` took, as keyword arguments."""
    return {"layout": "interleave" if flags & INTERLEAVED else "chunk",
            "order": "scale_mean" if flags & SCALE_IN_FRONT else "mean_scale"}


@differentiable.direct
class GaussianFunction(torch.autograd.Function):
    """(z, kl, logq) of params (packed, or the mean of a pair), raw (of a pair), prior_mean and prior_raw.

    ``consts`` is (seed_value, offset, n_samples, scale, flags, reduce), as the operator takes them. On a CPU noise
    of fewer than REDRAWN_BYTES is kept for backward; else it is drawn again.
    """

    @staticmethod
    def forward(ctx, params, raw, prior_mean, prior_raw, eps, seed, backend, consts, want_logq):
        ctx.set_materialize_grads(False)
        keep = eps is None and backend == "cpu" and _noise_bytes(params, raw, consts) < REDRAWN_BYTES
        z, kl, logq, drawn = extension.kernel(backend, "gaussian_fwd")(
            params, raw, prior_mean, prior_raw, eps, seed, *consts, want_logq, keep)
        ctx.save_for_backward(params, raw, prior_mean, prior_raw, drawn if keep else eps, seed)
        ctx.backend, ctx.consts, ctx.want_logq = backend, consts, want_logq
        return z, kl, logq

    @staticmethod
    def backward(ctx, grad_z, grad_kl, grad_logq):
        params, raw, prior_mean, prior_raw, eps, seed = ctx.saved_tensors
        inputs = params, raw, prior_mean, prior_raw
        needs = [need and t is not None for need, t in zip(ctx.needs_input_grad, inputs, strict=False)]
        grads = grad_z, grad_kl, grad_logq if ctx.want_logq else None
        if all(g is None for g in grads) or not any(needs):
            found = [None] * 4
        elif differentiable.wanted(grads):
            if eps is None:
                with torch.no_grad():
                    eps = extension.kernel(ctx.backend, "gaussian_fwd")(
                        params, raw, None, None, None, seed, *ctx.consts, False, True)[3]
            found = differentiable.reference_grads(lambda *t: _reference(*t, eps, ctx.consts), inputs, needs, grads)
        else:
            found = extension.kernel(ctx.backend, "gaussian_bwd")(*grads, *inputs, eps, seed, *ctx.consts, *needs)
            found = [g if need else None for g, need in zip(found, needs, strict=True)]
        return (*found, None, None, None, None, None)


def _noise_bytes(params, raw, consts):
    n_samples, itemsize = consts[2], max(params.element_size(), 4)
    return params.numel() // (2 if raw is None else 1) * (1 if n_samples is None else n_samples) * itemsize


def sample_kl(mean, logvar, eps, want_logq=False):
    """functional.gaussian_sample_kl((mean, logvar), eps=eps, return_logq=want_logq) without its checks, for operands
    that fit by construction."""
    backend = backends.choose("gaussian_sample_kl", mean, logvar, None, None, eps)
    if backend == "reference":
        return reference.gaussian_sample_kl((mean, logvar), eps=eps, return_logq=want_logq)
    operands, consts = (mean, logvar, None, None, eps, None), (0, 0, None, 0, 0, 0)
    if differentiable.needs_grad(mean, logvar):
        z, kl, logq = differentiable.apply(GaussianFunction, *differentiable.distinct(*operands), backend, consts,
                                           want_logq)
    else:
        z, kl, logq, _ = extension.kernel(backend, "gaussian_fwd")(*operands, *consts, want_logq, False)
    return (z, kl, logq) if want_logq else (z, kl)


def _reference(params, raw, prior_mean, prior_raw, eps, consts):
    _, _, n_samples, scale, flags, reduce = consts
    return reference.gaussian_sample_kl(
        params if raw is None else (params, raw), scale=reference.SCALES[scale], **packing_of(flags),
        prior=None if prior_mean is None else (prior_mean, prior_raw), eps=eps, n_samples=n_samples,
        reduce=reference.REDUCTIONS[reduce], return_logq=True)
