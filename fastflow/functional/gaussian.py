"""Samples of diagonal Gaussians and their KL divergence."""

import torch

from fastflow import backends, checks, reference
from fastflow.autograd import gaussian as _gaussian
from fastflow.autograd.differentiable import apply, distinct, keeping_format, needs_grad
from fastflow.extension import kernel
from fastflow.reference import LAYOUTS, REDUCTIONS, SCALES

__all__ = ["gaussian_sample_kl"]


def gaussian_sample_kl(params, *, scale="logvar", layout="chunk", order="mean_scale", prior=None, eps=None, seed=None,
                       offset=0, generator=None, n_samples=None, reduce="sample", return_logq=False):
    """Reparameterised samples of a diagonal Gaussian, its KL divergence to the prior, and log q(z), in one pass.

    z = mean + sigma*eps. KL(N(mean, sigma^2) || N(0, I)) = (mean^2 + expm1(2 log sigma) - 2 log sigma)/2 per element;
    to a second Gaussian ((mean - mean_p)^2/sigma_p^2 + expm1(d) - d)/2 with d = 2 log(sigma/sigma_p). The KL is
    analytic and does not depend on the samples.

    Args:
        params: (B, 2D, *S) from the encoder, or a pair (mean, raw), each (B, D, *S), any strides, dtypes free.
        scale: what raw is: "logvar" (sigma = exp(raw/2)), "logstd", "std", "softplus" (sigma = softplus(raw) + 1e-4),
            "soft_tanh" (log sigma = 5 tanh(raw/5)).
        layout: "chunk" or "interleave" packing of params along dim 1.
        order: "mean_scale" or "scale_mean", what comes first in packed params.
        prior: None for N(0, I), or (mean, raw) in the same scale, of mean's shape or with batch 1.
        eps: noise to use, of z's shape; carries no gradient. Excludes seed.
        seed: int of 64 bits, signed or not, or a 0-d or (B,) int64 tensor read on the device (entry b keys sample b).
            Element i of z's row-major order is normal i%4 of Philox4x32-10 counter i//4 + offset, the same stream on
            every backend, dtype and memory format (see reference.philox_normal).
        offset: first counter, a non-negative int below 2^63.
        generator: torch.Generator that a seed is drawn from when neither eps nor seed is given; None: torch's own.
        n_samples: K for z of shape (K, B, D, *S); None for z of mean's shape. The first k of K samples are those of
            n_samples=k.
        reduce: "sample": kl (B,); "channel": kl (B, D), summed over S; "none": kl like mean.
        return_logq: also return log q(z | x), (B,) or (K, B).

    Returns:
        z: mean's dtype, float32 if any operand is; kl and logq: nats, float64 for float64 operands, else float32.

    Raises:
        ValueError: a shape, device or option does not fit, or both eps and seed are given.
        TypeError: not a tensor, a wrong dtype, or float64 mixed with a lower dtype.

    References:
        Kingma and Welling, "Auto-encoding variational Bayes", 2014, arXiv:1312.6114.
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    checks.choice("scale", scale, SCALES)
    checks.choice("layout", layout, LAYOUTS)
    checks.choice("order", order, ("mean_scale", "scale_mean"))
    checks.choice("reduce", reduce, REDUCTIONS)
    first, raw, shape = _gaussian_params(params)
    prior_mean, prior_raw = _gaussian_prior(prior, shape, first)
    n_samples = None if n_samples is None else checks.count("n_samples", n_samples)
    z_shape = shape if n_samples is None else (n_samples, *shape)
    offset = checks.count("offset", offset)
    checks.noise(eps, seed, generator, "params", first, shape[0])
    return_logq = bool(return_logq)
    if eps is not None:
        checks.tensor("eps", eps)
        checks.shape("eps", eps, z_shape)
        checks.same_device("eps", eps, "params", first)
    checks.no_mixed_double([("params", first), ("params[1]", raw), ("prior[0]", prior_mean), ("prior[1]", prior_raw),
                            ("eps", eps)])

    backend = backends.choose("gaussian_sample_kl", first, raw, prior_mean, prior_raw, eps, seed if isinstance(
        seed, torch.Tensor) else None)
    if eps is not None:
        eps = eps.detach()
    elif seed is None:
        seed = reference.draw_seed(first.device, generator)
    if backend == "reference":
        return reference.gaussian_sample_kl(keeping_format(params), scale=scale, layout=layout, order=order,
                                            prior=prior, eps=eps, seed=seed, offset=offset, n_samples=n_samples,
                                            reduce=reduce, return_logq=return_logq)
    z_dtype = reference.result_dtype(first, raw, eps, prior_mean, prior_raw)
    prior_mean, prior_raw = _one_batch(prior_mean, prior_raw, shape)
    is_tensor = isinstance(seed, torch.Tensor)
    seed_value = 0 if seed is None or is_tensor else reference.to_int64(seed)
    consts = (seed_value, offset, n_samples, SCALES.index(scale), _gaussian.flags_of(layout, order),
              REDUCTIONS.index(reduce))
    operands = (first, raw, prior_mean, prior_raw, eps, seed if is_tensor else None)
    if needs_grad(*operands[:4]):
        z, kl, logq = apply(_gaussian.GaussianFunction, *distinct(*operands), backend, consts, return_logq)
    else:
        z, kl, logq, _ = kernel(backend, "gaussian_fwd")(*operands, *consts, return_logq, False)
    z = z if z.dtype == z_dtype else z.to(z_dtype)
    return (z, kl, logq) if return_logq else (z, kl)


def _gaussian_params(params):
    """(params, None, shape of mean), or (mean, raw, shape of mean)."""
    if isinstance(params, (tuple, list)):
        if len(params) != 2:
            raise ValueError(f"params: expected a pair (mean, raw), got {len(params)} tensors")
        mean, raw = params
        checks.tensor("params[0]", mean)
        checks.tensor("params[1]", raw)
        if mean.dim() < 2:
            raise ValueError(f"params[0]: expected shape (B, D, *S), got {tuple(mean.shape)}")
        checks.shape("params[1]", raw, mean.shape)
        checks.same_device("params[1]", raw, "params[0]", mean)
        return mean, raw, tuple(mean.shape)
    checks.tensor("params", params)
    if params.dim() < 2 or params.shape[1] % 2:
        raise ValueError(f"params: expected shape (B, 2D, *S), got {tuple(params.shape)}")
    return params, None, (params.shape[0], params.shape[1] // 2, *params.shape[2:])


def _gaussian_prior(prior, shape, like):
    if prior is None:
        return None, None
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        got = f"{len(prior)} tensors" if isinstance(prior, (tuple, list)) else type(prior).__name__
        raise TypeError(f"prior: expected None or a pair (mean, raw), got {got}")
    for name, t in zip(("prior[0]", "prior[1]"), prior, strict=True):
        checks.tensor(name, t)
        if tuple(t.shape[1:]) != tuple(shape[1:]) or t.dim() != len(shape) or t.shape[0] not in (1, shape[0]):
            raise ValueError(f"{name}: expected shape {shape} or {(1, *shape[1:])}, got {tuple(t.shape)}")
        checks.same_device(name, t, "params", like)
    return prior[0], prior[1]


def _one_batch(mean, raw, shape):
    """A prior with one batch for both, as kernels take it. What is repeated for it is float32 at least, in which the
    gradients of its rows are added up."""
    if mean is None or mean.shape[0] == raw.shape[0]:
        return mean, raw
    return tuple(t if t.shape[0] == shape[0] else t.to(reference.compute_dtype(t)).expand(shape) for t in (mean, raw))
