"""The mathematics of every fused operation in eager PyTorch: the truth that each backend is held against.

Every operation here has a namesake with the same signature in :mod:`fastflow.functional`. These versions are
differentiable to any order, work under ``torch.func`` and forward-mode AD, and run on any device. They validate
nothing beyond what the mathematics needs; :mod:`fastflow.functional` checks arguments.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from fastflow.reference.layout import memory_format_of
from fastflow.reference.philox import philox4x32, philox_normal, to_int64  # noqa: F401 (to_int64 for other modules)
from fastflow.reference.scale_map import KINDS, ScaleMap, softplus  # noqa: F401 (KINDS for other modules)

__all__ = ["SCALES", "SPLINES", "ChannelAffine", "LatentLevel", "MLPBlock", "MLPCoupling", "Permutation", "ScaleMap",
           "activated_conv", "affine_coupling", "bernoulli_log_prob", "conv_net", "gaussian_sample_kl", "mlp",
           "mlp_flow", "philox4x32", "philox_normal", "plu_weight", "slogdet", "slogdet_inverse", "spline",
           "spline_bins", "spline_params", "top_down", "wide_mlp"]

LAYOUTS = ("chunk", "interleave")
REDUCTIONS = ("sample", "channel", "none")
SCALES = ("logvar", "logstd", "std", "softplus", "soft_tanh")
SOFTPLUS_FLOOR = 1e-4  # sigma = softplus(r) + SOFTPLUS_FLOOR
SOFT_TANH = 5.0  # log sigma = SOFT_TANH * tanh(r / SOFT_TANH)
FLOAT64_UP_TO = 48  # matrices up to this size are factorised in float64, where that costs little


def compute_dtype(*tensors):
    """float64 if any operand is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def result_dtype(like, *operands):
    """dtype of y or z: that of ``like``, widened to float32 if any operand is float32."""
    dtypes = [t.dtype for t in (like, *operands) if t is not None]
    if torch.float64 in dtypes:
        return torch.float64
    return torch.float32 if torch.float32 in dtypes else like.dtype


def split_params(params, layout, first_is_a):
    """The two halves (a, b) of packed params along dim 1; ``first_is_a`` tells whether a comes first."""
    if isinstance(params, (tuple, list)):
        return params[0], params[1]
    half = params.shape[1] // 2
    if layout == "chunk":
        first, second = params[:, :half], params[:, half:]
    else:
        first, second = params[:, 0::2], params[:, 1::2]
    return (first, second) if first_is_a else (second, first)


def split_passive(x, passive):
    """(active part of x, passive tensor or None, whether the passive goes in front of y)."""
    if passive is None or isinstance(passive, torch.Tensor):
        return x, passive, True
    if passive >= 0:
        return x[:, passive:], x[:, :passive], True
    return x[:, :passive], x[:, passive:], False


def affine_coupling(x, params, *, scale="exp", layout="chunk", order="scale_shift", shift_first=False, inverse=False,
                    logdet=None, passive=None):
    """y = x*s + t (or (x + t)*s), or exactly its inverse, and log|det J|; see functional.affine_coupling."""
    scale = ScaleMap.of(scale)
    memory_format = memory_format_of(x)
    x, passive, in_front = split_passive(x, passive)
    if scale.kind == "additive":
        raw, shift = None, params
    else:
        raw, shift = split_params(params, layout, order == "scale_shift")
    dtype = compute_dtype(x, raw, shift)
    out_dtype = result_dtype(x, raw, shift, passive)
    xc, t = x.to(dtype), shift.to(dtype)
    if scale.shift_gain != 1.0:
        t = scale.shift_gain * t
    s, log_s = scale.scale_and_log(torch.zeros_like(t) if raw is None else raw.to(dtype))
    if inverse and shift_first:
        y = xc / s - t
    elif inverse:
        y = (xc - t) / s
    elif shift_first:
        y = (xc + t) * s
    else:
        y = xc * s + t
    total = log_s.flatten(1).sum(1)
    if inverse:
        total = -total
    if logdet is not None:
        total = logdet.to(dtype) + total
    y = y.to(out_dtype)
    if passive is not None:
        passive = passive.to(out_dtype)
        y = torch.cat([passive, y] if in_front else [y, passive], 1)
    return y.contiguous(memory_format=memory_format), total


def conv_net(x, w1, b1, w2, b2, w3, b3, *, negative_slope=0.0):
    """Convolutions 3x3, 1x1 and 3x3, padded with zeros, with a rectifier after the first two."""
    def rectify(h):
        return F.leaky_relu(h, negative_slope, inplace=True) if negative_slope else F.relu(h, inplace=True)

    h = rectify(F.conv2d(x, w1, b1, padding=1))  # a convolution does not keep its own output
    return F.conv2d(rectify(F.conv2d(h, w2, b2)), w3, b3, padding=1)


def _knows_autocast(device_type):
    return torch.amp.is_autocast_available(device_type)


_knows_autocast._dynamo_marked_constant = True  # asked at trace time: not every Dynamo traces it


def full_precision(device_type):
    """A context in which autocast does not lower matrix products."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else contextlib.nullcontext()


def autocasts(device_type):
    """Whether autocast is on for devices of that type, some of which have none."""
    return _knows_autocast(device_type) and torch.is_autocast_enabled(device_type)


def _spared(matrix):
    """The matrix, under autocast in float64, whose products that leaves alone on the way back as well."""
    return matrix.double() if autocasts(matrix.device.type) else matrix


def _factorised(weight):
    """(sign, log|det|, which matrices have no finite log|det|, the weight in the dtype that it is factorised in with
    the identity in their place, a term of theirs: 0, with the derivative NaN)."""
    w = weight.to(torch.float64 if weight.shape[-1] <= FLOAT64_UP_TO else compute_dtype(weight))
    fixed = w.detach()
    sign, found = torch.linalg.slogdet(fixed)
    # CUDA's slogdet swallows NaN (pytorch#173638), LAPACK's sign is 0 where infinities cancel.
    nan = torch.isnan(fixed).flatten(-2).any(-1) | torch.isnan(found)
    sign, found = torch.where(nan, math.nan, sign), torch.where(nan, math.nan, found)
    broken = ~torch.isfinite(found)
    each = broken[..., None, None]
    zero = torch.where(each, w.nan_to_num() - fixed.nan_to_num(), 1.0)  # whose root has no derivative
    term = (0.0 * zero.sqrt()).sum((-2, -1))
    # torch raises on the way back from a singular matrix.
    w = torch.where(each, torch.eye(w.shape[-1], device=w.device, dtype=w.dtype), w)
    return sign, torch.where(broken, found + term, torch.linalg.slogdet(w)[1]), each, w, term[..., None, None]


def slogdet(weight):
    """(sign, log|det|) of a batch of square matrices; see functional.slogdet."""
    sign, logabsdet, *_ = _factorised(weight)
    return sign.to(compute_dtype(weight)), logabsdet.to(compute_dtype(weight))


def slogdet_inverse(weight):
    """(sign, log|det|, inverse); see functional.slogdet_inverse."""
    sign, logabsdet, broken, w, term = _factorised(weight)
    inverse = torch.where(broken, math.nan + term, torch.linalg.inv_ex(_spared(w)).inverse)
    return *(t.to(compute_dtype(weight)) for t in (sign, logabsdet)), inverse.to(compute_dtype(weight)).contiguous()


def plu_weight(lower, upper, log_s, sign_s, perm):
    """W = P (tril(lower, -1) + I) (triu(upper, 1) + diag(sign_s * exp(log_s))); see functional.plu_weight."""
    eye = torch.eye(lower.shape[-1], device=lower.device, dtype=lower.dtype)
    low = lower.tril(-1) + eye
    up = upper.triu(1) + torch.diag_embed(sign_s * torch.exp(log_s))
    return torch.gather(_spared(low) @ _spared(up), -2, perm[..., None].expand(lower.shape)).to(lower.dtype)


def sigma_and_log(raw, scale):
    """(sigma, log sigma) of a raw scale parameter."""
    if scale == "logvar":
        return torch.exp(0.5 * raw), 0.5 * raw
    if scale == "logstd":
        return torch.exp(raw), raw
    if scale == "std":
        return raw, torch.log(raw)
    if scale == "softplus":
        sigma = softplus(raw) + SOFTPLUS_FLOOR
        return sigma, torch.log(sigma)
    log_sigma = SOFT_TANH * torch.tanh(raw / SOFT_TANH)
    return torch.exp(log_sigma), log_sigma


def draw_seed(device, generator=None):
    """A 0-d int64 seed from ``generator`` or torch's default one, on ``device`` and without a host synchronisation."""
    source = device if generator is None else generator.device
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=source, generator=generator).to(device)


def gaussian_sample_kl(params, *, scale="logvar", layout="chunk", order="mean_scale", prior=None, eps=None, seed=None,
                       offset=0, generator=None, n_samples=None, reduce="sample", return_logq=False):
    """z = mean + sigma*eps, KL(N(mean, sigma^2) || prior) and log q(z), in nats; see functional.gaussian_sample_kl."""
    if eps is not None and seed is not None:
        raise ValueError("eps and seed: expected at most one of them, got both")
    mean, raw = split_params(params, layout, order == "mean_scale")
    dtype = compute_dtype(mean, raw, eps, *(prior or ()))
    out_dtype = result_dtype(mean, raw, eps, *(prior or ()))
    mean, raw = mean.to(dtype), raw.to(dtype)
    shape = mean.shape if n_samples is None else (n_samples, *mean.shape)
    if eps is None:
        seed = draw_seed(mean.device, generator) if seed is None else seed
        eps = philox_normal(shape, seed, offset, batch_dim=0 if n_samples is None else 1, device=mean.device)
    eps = eps.detach().to(dtype)
    sigma, log_sigma = sigma_and_log(raw, scale)
    z = mean + sigma * eps
    if prior is None:
        kl = 0.5 * (mean * mean + (torch.expm1(2.0 * log_sigma) - 2.0 * log_sigma))
    else:
        prior_mean, prior_raw = (p.to(dtype) for p in prior)
        prior_sigma, prior_log = sigma_and_log(prior_raw, scale)
        delta = 2.0 * (log_sigma - prior_log)
        kl = 0.5 * (((mean - prior_mean) / prior_sigma) ** 2 + (torch.expm1(delta) - delta))
    if reduce == "sample":
        kl = kl.flatten(1).sum(1)
    elif reduce == "channel":
        kl = kl.flatten(2).sum(2) if kl.dim() > 2 else kl
    z = z.to(out_dtype).contiguous()
    if not return_logq:
        return z, kl.contiguous()
    per_element = 0.5 * math.log(2.0 * math.pi) + 0.5 * eps * eps + log_sigma
    return z, kl.contiguous(), -per_element.flatten(1 if n_samples is None else 2).sum(-1)


# Built on what stands above.
from fastflow.reference.activated_conv import LAYER_ACTIVATIONS, activated_conv  # noqa: E402, F401
from fastflow.reference.bernoulli_log_prob import bernoulli_log_prob  # noqa: E402
from fastflow.reference.mlp import mlp  # noqa: E402
from fastflow.reference.mlp_flow import ACTIVATIONS, ChannelAffine, MLPCoupling, Permutation, mlp_flow  # noqa: E402, F401
from fastflow.reference.spline import SPLINES, TAILS, spline, spline_bins, spline_params, wrapped  # noqa: E402, F401
from fastflow.reference.top_down import (  # noqa: E402, F401
    LEVEL_MODES,
    LatentLevel,
    MLPBlock,
    level_gaussians,
    normal_log_prob,
    top_down,
)
from fastflow.reference.wide_mlp import wide_mlp  # noqa: E402
