"""The public operations: check the arguments, choose a backend, run its kernels under autograd.

Every function has a namesake with the same signature in :mod:`fastflow.reference`, which states the mathematics in
eager PyTorch. All are differentiable to any order, capturable in a CUDA graph, and visible to torch.compile.
"""

import torch

from fastflow import backends, checks, reference
from fastflow.autograd import affine_coupling as _affine
from fastflow.autograd import conv_net as _conv_net
from fastflow.autograd import conv_products as _conv_products
from fastflow.autograd import gaussian as _gaussian
from fastflow.autograd import slogdet as _slogdet
from fastflow.autograd.differentiable import distinct as _distinct
from fastflow.autograd.differentiable import needs_grad as _needs_grad
from fastflow.extension import kernel
from fastflow.functional.activated_conv import activated_conv
from fastflow.functional.bernoulli_log_prob import bernoulli_log_prob
from fastflow.functional.mlp import mlp
from fastflow.functional.mlp_flow import mlp_flow
from fastflow.functional.mlp_vae import run_mlp_vae  # noqa: F401 (for the layers above)
from fastflow.functional.spline import check_spline_constants, spline, spline_params  # noqa: F401 (for the layers above)
from fastflow.functional.top_down import top_down
from fastflow.functional.wide_mlp import run_wide_mlp, wide_mlp  # noqa: F401 (for the layers above)
from fastflow.reference import (  # noqa: F401 (some for layers)
    SCALES,
    ChannelAffine,
    LatentLevel,
    MLPBlock,
    MLPCoupling,
    Permutation,
    ScaleMap,
    full_precision,
)

__all__ = ["ChannelAffine", "LatentLevel", "MLPBlock", "MLPCoupling", "Permutation", "ScaleMap", "activated_conv",
           "affine_coupling", "bernoulli_log_prob", "conv_net", "gaussian_sample_kl", "mlp", "mlp_flow", "plu_weight",
           "slogdet", "slogdet_inverse", "spline", "spline_params", "top_down", "wide_mlp"]

LAYOUTS = ("chunk", "interleave")
REDUCTIONS = ("sample", "channel", "none")


def affine_coupling(x, params, *, scale="exp", layout="chunk", order="scale_shift", shift_first=False, inverse=False,
                    logdet=None, passive=None):
    """Affine coupling and its log-determinant in one pass.

    y = x*s + t, or with ``shift_first`` (x + t)*s; ``inverse`` undoes exactly that, given the same params:
    y = (x - t)/s, or x/s - t. The log-determinant of the direction computed is +sum(log s), or -sum(log s) for the
    inverse, from the pre-activation (never the log of a rounded scale).

    Args:
        x: (B, C, *S), any strides, S possibly empty; dim 1 is the channel. Pass (B, T, D) data as a permuted view.
            With an int as ``passive`` (B, abs(passive) + C, *S).
        params: (B, 2C, *S) straight from the conditioner, or a pair (raw_scale, shift), each (B, C, *S), dtypes free;
            for scale "additive" the shift alone, (B, C, *S).
        scale: a ScaleMap, or "exp", "sigmoid" (offset 2), "tanh" (clamp 1), "atan" (clamp 1, out_gain 2/pi), "softplus"
            (offset 0.5413), "rational" (clamp 1) or "additive".
        layout: "chunk": the two halves of params along dim 1; "interleave": its even and odd channels.
        order: "scale_shift" or "shift_scale", what comes first in packed params.
        shift_first: add the shift before scaling.
        inverse: compute the inverse map.
        logdet: (B,) running log-determinant in nats, added to the result, differentiable, never written in place.
        passive: (B, C1, *S), returned in front of y along dim 1 in the same pass, as torch.cat([passive, y], 1) would
            be. Or an int: x is a whole tensor whose first ``passive`` channels, or last ``-passive`` ones, pass
            unchanged and keep their place; its gradient is written whole in one pass too.

    Returns:
        y: (B, C, *S) ((B, C1 + C, *S) with passive) in x's dtype, float32 if any operand is, in x's memory format.
        logdet: (B,) in nats, float64 for float64 operands, else float32.

    Raises:
        ValueError: a shape, device or option does not fit; the message names the argument.
        TypeError: not a tensor, a dtype that is not floating, or float64 mixed with a lower dtype.

    References:
        Dinh et al., "Density estimation using Real NVP", 2017, arXiv:1605.08803.
        Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039.
    """
    scale = ScaleMap.of(scale)
    checks.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, *S), got {tuple(x.shape)}")
    checks.choice("layout", layout, LAYOUTS)
    checks.choice("order", order, ("scale_shift", "shift_scale"))
    kept, passive_tensor = _passive(x, passive)
    first, shift = _affine_params(x, kept, params, scale)
    named = [("x", x), ("params", first), ("params[1]", shift), ("passive", passive_tensor)]
    logdet = checks.with_running_logdet(named, logdet, x)

    operands = x, first, shift, logdet, passive_tensor
    backend = backends.choose("affine_coupling", *operands)
    if backend == "reference":
        return reference.affine_coupling(x, params, scale=scale, layout=layout, order=order, shift_first=shift_first,
                                         inverse=inverse, logdet=logdet, passive=passive)
    flags = ((_affine.INTERLEAVED if layout == "interleave" else 0)
             | (_affine.SHIFT_IN_FRONT if order == "shift_scale" else 0)
             | (_affine.SHIFT_FIRST if shift_first else 0) | (_affine.INVERSE if inverse else 0))
    how = backend, kept, flags, scale
    if _needs_grad(*operands):
        return _affine.AffineCouplingFunction.apply(*_distinct(*operands), how)
    return _affine.forward(*operands, how)


def _passive(x, passive):
    """(kept, tensor or None): how many of x's own channels pass, the last ones if negative, or what goes in front."""
    if passive is None:
        return 0, None
    if isinstance(passive, (int, torch.SymInt)) and not isinstance(passive, bool):
        if abs(passive) > x.shape[1]:
            raise ValueError(f"passive: expected at most {x.shape[1]} channels of x of shape {tuple(x.shape)}, "
                             f"got {passive}")
        return passive, None
    if not isinstance(passive, torch.Tensor):
        raise TypeError(f"passive: expected a torch.Tensor or an int, got {type(passive).__name__}")
    checks.tensor("passive", passive)
    if passive.dim() != x.dim() or passive.shape[0] != x.shape[0] or passive.shape[2:] != x.shape[2:]:
        raise ValueError(f"passive: expected shape {(x.shape[0], 'C1', *x.shape[2:])} to go with x, "
                         f"got {tuple(passive.shape)}")
    checks.same_device("passive", passive, "x", x)
    return 0, passive


def _affine_params(x, kept, params, scale):
    """(params, None) or the pair (raw_scale, shift), checked against the part of x that they transform."""
    shape = (x.shape[0], x.shape[1] - abs(kept), *x.shape[2:])
    if scale.kind == "additive":
        checks.tensor("params", params)
        if params.shape != shape:
            raise ValueError(f"params: expected the shift alone, of x's shape {shape}, for scale 'additive', "
                             f"got {tuple(params.shape)}")
        checks.same_device("params", params, "x", x)
        return params, None
    if isinstance(params, (tuple, list)):
        if len(params) != 2:
            raise ValueError(f"params: expected a pair (raw_scale, shift), got {len(params)} tensors")
        for name, t in zip(("params[0]", "params[1]"), params, strict=True):
            checks.tensor(name, t)
            checks.shape(name, t, shape)
            checks.same_device(name, t, "x", x)
        return params[0], params[1]
    checks.tensor("params", params)
    expected = (shape[0], 2 * shape[1], *shape[2:])
    if params.shape != expected:
        raise ValueError(f"params: expected shape {expected} (B, 2C, *S) for x of shape {tuple(x.shape)}"
                         f"{f' with passive={kept}' if kept else ''}, got {tuple(params.shape)}")
    checks.same_device("params", params, "x", x)
    return params, None


def conv_net(x, w1, b1, w2, b2, w3, b3, *, negative_slope=0.0):
    """Glow's conditioner in one pass: convolutions 3x3, 1x1 and 3x3, padded with zeros, rectified after the first two.

    out = conv(r(conv(r(conv(x, w1) + b1), w2) + b2), w3) + b3 with r(h) = max(h, 0) + negative_slope * min(h, 0). The
    CPU kernel takes a sample through all three while its hidden maps lie in the cache, for hidden channels in multiples
    of 16. On a GPU, with 128 hidden channels or more and at most 64 others, where TrainStep records a graph or the
    hidden maps have 2^25 elements, they are matrix products over the pixels, a 3x3 kernel's nine taps side by side,
    under autocast in its dtype. Else the convolutions are PyTorch's. In
    float32, for images of even height and width above 2 and I + O >= 12, its 3x3 convolutions run in Winograd's form
    F(2x2, 3x3), within the same bound on the error; samples with a result that is not finite, and gradients of weights
    that are not, are computed again from plain sums.

    Args:
        x: (B, I, H, W), any strides.
        w1, b1: (N, I, 3, 3) and (N,), N the hidden channels.
        w2, b2: (N, N, 1, 1) and (N,).
        w3, b3: (O, N, 3, 3) and (O,).
        negative_slope: slope of the rectifier below zero, 0 <= negative_slope.

    Returns:
        (B, O, H, W) in x's memory format and in the dtype that all operands share.

    Raises:
        ValueError: a shape or device does not fit, or the slope is negative; the message names the argument.
        TypeError: not a tensor, or a dtype that is not floating or not x's.

    References:
        Kingma and Dhariwal, "Glow", 2018, arXiv:1807.03039, section 5. Lavin and Gray, "Fast Algorithms for
        Convolutional Neural Networks", 2016, arXiv:1509.09308.
    """
    checks.tensor("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, I, H, W), got {tuple(x.shape)}")
    if not negative_slope >= 0.0:
        raise ValueError(f"negative_slope: expected a number >= 0, got {negative_slope!r}")
    checks.tensor("w1", w1)
    checks.tensor("w3", w3)
    hidden, out = w1.shape[:1], w3.shape[:1]
    for name, value, expected in (("w1", w1, (*hidden, x.shape[1], 3, 3)), ("b1", b1, hidden),
                                  ("w2", w2, (*hidden, *hidden, 1, 1)), ("b2", b2, hidden),
                                  ("w3", w3, (*out, *hidden, 3, 3)), ("b3", b3, out)):
        checks.tensor(name, value)
        checks.shape(name, value, expected)
        checks.same_device(name, value, "x", x)
        if value.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
    operands = (x, w1, b1, w2, b2, w3, b3)
    if _conv_products.serves(x, w1, w3, negative_slope):
        lowered = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype("cuda") if lowered else x.dtype
        return _conv_products.ConvNetProducts.apply(*operands, dtype)
    backend = backends.choose("conv_net", *operands)
    if backend == "reference":
        return reference.conv_net(*operands, negative_slope=negative_slope)
    if _needs_grad(*operands):
        return _conv_net.ConvNetFunction.apply(*_distinct(*operands), backend, float(negative_slope))
    return _conv_net.forward(backend, operands, float(negative_slope))[0]


def _check_weight(weight):
    checks.tensor("weight", weight)
    if weight.dim() < 2 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"weight: expected square matrices (*, C, C), got {tuple(weight.shape)}")


def slogdet(weight):
    """Sign and log-absolute-determinant of a batch of square matrices, by LU with partial pivoting.

    Args:
        weight: (*, C, C), any strides. Factorised in float64 inside up to C = 48.

    Returns:
        sign: (*,) -1, 0 or 1, not differentiable.
        logabsdet: (*,) log|det| in nats; its gradient is the inverse transpose.
        Both float64 for a float64 weight, else float32. Singular: sign 0, logabsdet -inf. NaN in, NaN out. No
        exception, no host synchronisation, and no matrix of the batch affects another.

    Raises:
        ValueError, TypeError: weight is not a floating tensor of square matrices.
    """
    _check_weight(weight)
    backend = backends.choose("slogdet", weight)
    if backend == "reference":
        return reference.slogdet(weight)
    if _needs_grad(weight):
        return _slogdet.SlogdetFunction.apply(weight, backend)[:2]
    return kernel(backend, "slogdet_fwd")(weight, False)[:2]


def slogdet_inverse(weight):
    """Sign, log|det| and inverse of a batch of square matrices from one factorisation; see :func:`slogdet`.

    Returns:
        sign, logabsdet: as slogdet. inverse: (*, C, C), differentiable, of the dtype of logabsdet; NaN for a singular
        matrix.
    """
    _check_weight(weight)
    backend = backends.choose("slogdet_inverse", weight)
    if backend == "reference":
        return reference.slogdet_inverse(weight)
    if _needs_grad(weight):
        return _slogdet.SlogdetFunction.apply(weight, backend)
    return kernel(backend, "slogdet_fwd")(weight, True)


def plu_weight(lower, upper, log_s, sign_s, perm):
    """The weights W = P L U of N PLU-parametrised layers, assembled in one launch; log|det W| = sum(log_s).

    L is unit lower triangular from the strict lower part of ``lower``; U has the strict upper part of ``upper`` and the
    diagonal sign_s * exp(log_s); row i of W is row perm[i] of L U (Kingma and Dhariwal, 2018, section 3.2).

    Args:
        lower, upper: (N, C, C) float32 or float64, one dtype for all four.
        log_s, sign_s: (N, C). sign_s carries no gradient.
        perm: (N, C) int64, a permutation of 0..C-1 in each row.

    Returns:
        (N, C, C) in lower's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    checks.tensor("lower", lower)
    if lower.dim() != 3 or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"lower: expected shape (N, C, C), got {tuple(lower.shape)}")
    if lower.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lower: expected float32 or float64, got {lower.dtype}")
    for name, value, expected in (("upper", upper, lower.shape), ("log_s", log_s, lower.shape[:2]),
                                  ("sign_s", sign_s, lower.shape[:2]), ("perm", perm, lower.shape[:2])):
        checks.tensor(name, value, floating=name != "perm")
        checks.shape(name, value, expected)
        checks.same_device(name, value, "lower", lower)
        dtype = torch.int64 if name == "perm" else lower.dtype
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    sign_s = sign_s.detach()
    backend = backends.choose("plu_weight", lower, upper, log_s, sign_s, perm)
    if backend == "reference":
        return reference.plu_weight(lower, upper, log_s, sign_s, perm)
    if _needs_grad(lower, upper, log_s):
        return _slogdet.PluWeightFunction.apply(*_distinct(lower, upper, log_s, sign_s, perm), backend)
    return kernel(backend, "plu_weight_fwd")(lower, upper, log_s, sign_s, perm)


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
        seed: int, or a 0-d or (B,) int64 tensor read on the device (entry b keys sample b). Element i of z's row-major
            order is normal i%4 of Philox4x32-10 counter i//4 + offset, the same stream on every backend, dtype and
            memory format (see reference.philox_normal).
        offset: first counter, a non-negative int.
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
    z_shape = shape if n_samples is None else (_count("n_samples", n_samples), *shape)
    _check_noise(eps, seed, offset, generator, z_shape, shape[0], first)
    checks.no_mixed_double([("params", first), ("params[1]", raw), ("prior[0]", prior_mean), ("prior[1]", prior_raw),
                            ("eps", eps)])

    backend = backends.choose("gaussian_sample_kl", first, raw, prior_mean, prior_raw, eps, seed if isinstance(
        seed, torch.Tensor) else None)
    if eps is not None:
        eps = eps.detach()
    elif seed is None:
        seed = reference.draw_seed(first.device, generator)
    if backend == "reference":
        return reference.gaussian_sample_kl(params, scale=scale, layout=layout, order=order, prior=prior, eps=eps,
                                            seed=seed, offset=offset, n_samples=n_samples, reduce=reduce,
                                            return_logq=return_logq)
    is_tensor = isinstance(seed, torch.Tensor)
    seed_value = 0 if seed is None or is_tensor else reference.to_int64(seed)
    flags = ((_gaussian.INTERLEAVED if layout == "interleave" else 0)
             | (_gaussian.SCALE_IN_FRONT if order == "scale_mean" else 0))
    consts = (seed_value, offset, n_samples, SCALES.index(scale), flags, REDUCTIONS.index(reduce))
    operands = (first, raw, prior_mean, prior_raw, eps, seed if is_tensor else None)
    if _needs_grad(*operands[:4]):
        z, kl, logq = _gaussian.GaussianFunction.apply(*_distinct(*operands), backend, consts, return_logq)
    else:
        z, kl, logq, _ = kernel(backend, "gaussian_fwd")(*operands, *consts, return_logq, False)
    return (z, kl, logq) if return_logq else (z, kl)


def _count(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name}: expected a non-negative int, got {value}")
    return value


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
        raise TypeError("prior: expected None or a pair (mean, raw)")
    for name, t in zip(("prior[0]", "prior[1]"), prior, strict=True):
        checks.tensor(name, t)
        if tuple(t.shape[1:]) != tuple(shape[1:]) or t.dim() != len(shape) or t.shape[0] not in (1, shape[0]):
            raise ValueError(f"{name}: expected shape {shape} or {(1, *shape[1:])}, got {tuple(t.shape)}")
        checks.same_device(name, t, "params", like)
    if prior[0].shape[0] != prior[1].shape[0]:  # kernels take one batch for both
        return tuple(t.expand(shape) for t in prior)
    return prior[0], prior[1]


def _check_noise(eps, seed, offset, generator, z_shape, batch, like):
    if eps is not None and seed is not None:
        raise ValueError("eps and seed: expected at most one of them, got both")
    if eps is not None:
        checks.tensor("eps", eps)
        checks.shape("eps", eps, z_shape)
        checks.same_device("eps", eps, "params", like)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: expected an int or an int64 tensor, got {seed.dtype}")
        if seed.dim() != 0 and tuple(seed.shape) != (batch,):
            raise ValueError(f"seed: expected shape () or ({batch},), got {tuple(seed.shape)}")
        checks.same_device("seed", seed, "params", like)
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    _count("offset", offset)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
