"""The mathematics of every fused operation in eager PyTorch: the truth that each backend is held against.

Every function here has a namesake with the same signature in :mod:`fastflow.functional`. These versions are
differentiable to any order, work under ``torch.func`` and forward-mode AD, and run on any device. They validate
nothing beyond what the mathematics needs; :mod:`fastflow.functional` checks arguments.
"""

import contextlib
import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from fastflow.reference.philox import philox4x32, philox_normal, to_int64  # noqa: F401 (to_int64 for other modules)

__all__ = ["SCALES", "SPLINES", "ChannelAffine", "LatentLevel", "MLPBlock", "MLPCoupling", "Permutation", "ScaleMap",
           "activated_conv", "affine_coupling", "bernoulli_log_prob", "conv_net", "gaussian_sample_kl", "mlp",
           "mlp_flow", "philox4x32", "philox_normal", "plu_weight", "slogdet", "slogdet_inverse", "spline",
           "spline_bins", "spline_params", "top_down", "wide_mlp"]

KINDS = ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive")
SCALES = ("logvar", "logstd", "std", "softplus", "soft_tanh")
SOFTPLUS_FLOOR = 1e-4  # sigma = softplus(r) + SOFTPLUS_FLOOR
SOFT_TANH = 5.0  # log sigma = SOFT_TANH * tanh(r / SOFT_TANH)
FLOAT64_UP_TO = 48  # matrices up to this size are factorised in float64, where that costs little


@dataclass(frozen=True)
class ScaleMap:
    """How a conditioner's raw output r becomes the scale s of an affine coupling.

    With u = gain*r + offset, log s is

    ========== =====================================
    exp        out_gain * u
    sigmoid    logsigmoid(u) + log(out_gain)
    tanh       clamp * out_gain * tanh(u / clamp)
    atan       clamp * out_gain * atan(u / clamp)
    softplus   log(softplus(u))
    rational   u / (1 + abs(u) / clamp)
    additive   0
    ========== =====================================

    Then ``eps`` is added to s and s is clamped to [hard_min, hard_max] (zero gradient outside, NaN kept). The shift is
    multiplied by ``shift_gain``. ``clamp=None`` means 1.

    Raises:
        ValueError: unknown ``kind``; ``clamp`` or (for sigmoid) ``out_gain`` not positive; ``eps`` negative or not
            finite; ``hard_min`` negative or above ``hard_max``; a parameter that is not finite.
    """

    kind: str
    gain: float = 1.0
    offset: float = 0.0
    out_gain: float = 1.0
    clamp: float | None = None
    eps: float = 0.0
    hard_min: float | None = None
    hard_max: float | None = None
    shift_gain: float = 1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{field.name}: expected a finite number, got {value!r}")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp: expected a positive number, got {self.clamp!r}")
        if self.kind == "sigmoid" and self.out_gain <= 0:
            raise ValueError(f"out_gain: expected a positive number for kind 'sigmoid', got {self.out_gain!r}")
        if self.eps < 0:
            raise ValueError(f"eps: expected a non-negative number, got {self.eps!r}")
        if self.hard_min is not None and self.hard_min < 0:
            raise ValueError(f"hard_min: expected a non-negative number (it bounds the scale s), got {self.hard_min!r}")
        if self.hard_max is not None and self.hard_max <= (self.hard_min or 0.0):
            raise ValueError(f"hard_max: expected a number above hard_min, got {self.hard_max!r}")
        # What kernels take: the kind's index and the constants, None spelt out.
        object.__setattr__(self, "scalars", (
            KINDS.index(self.kind), float(self.gain), float(self.offset), float(self.out_gain),
            1.0 if self.clamp is None else float(self.clamp), float(self.eps),
            -math.inf if self.hard_min is None else float(self.hard_min),
            math.inf if self.hard_max is None else float(self.hard_max), float(self.shift_gain)))

    @classmethod
    def of(cls, scale):
        """``scale`` itself if it is a ScaleMap, else the map of that name with its default constants."""
        if isinstance(scale, cls):
            return scale
        if isinstance(scale, str):
            if scale not in _NAMED:
                raise ValueError(f"scale: expected a ScaleMap or one of {', '.join(_NAMED)}, got {scale!r}")
            return _NAMED[scale]
        raise TypeError(f"scale: expected a ScaleMap or a name, got {type(scale).__name__}")

    @classmethod
    def from_scalars(cls, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
        """The map whose ``scalars`` these are."""
        return cls(KINDS[kind], gain, offset, out_gain, clamp, eps, None if hard_min == -math.inf else hard_min,
                   None if hard_max == math.inf else hard_max, shift_gain)

    @classmethod
    def glow(cls):
        """openai/glow, y0ast, chaiyujin (interleaved, shift first) and rosinality (chunked, scale first):
        (x + t) * sigmoid(r + 2); pass ``shift_first=True``."""
        return cls("sigmoid", offset=2.0)

    @classmethod
    def nflows(cls, general=False):
        """nflows AffineCouplingTransform: sigmoid(r + 2) + 1e-3, or with ``general`` clamp(softplus(r) + 1e-3, 0, 3);
        chunked, shift first."""
        if general:
            return cls("softplus", eps=1e-3, hard_min=0.0, hard_max=3.0)
        return cls("sigmoid", offset=2.0, eps=1e-3)

    @classmethod
    def normflows(cls, kind="exp"):
        """normflows AffineCoupling, noise to data, interleaved with the shift first: s is exp(r), for "sigmoid"
        1/sigmoid(r + 2) = 1 + exp(-r - 2), for "sigmoid_inv" sigmoid(r + 2)."""
        if kind == "exp":
            return cls("exp")
        if kind == "sigmoid":
            return cls("exp", gain=-1.0, offset=-2.0, eps=1.0)
        if kind == "sigmoid_inv":
            return cls("sigmoid", offset=2.0)
        raise ValueError(f"kind: expected 'exp', 'sigmoid' or 'sigmoid_inv', got {kind!r}")

    @classmethod
    def freia(cls, clamp=2.0, kind="all_in_one"):
        """FrEIA: "all_in_one" (AllInOneBlock) log s = clamp*tanh(0.1 r/clamp), shift 0.1 t; for the blocks of
        coupling_layers "atan" clamp*0.636*atan(r), "tanh" clamp*tanh(r), "sigmoid" clamp*(2 sigmoid(r) - 1)."""
        name = kind.lower()
        if name == "all_in_one":
            return cls("tanh", gain=0.1, clamp=clamp, shift_gain=0.1)
        if name == "atan":
            return cls("atan", clamp=1.0, out_gain=0.636 * clamp)
        if name == "tanh":
            return cls("tanh", clamp=1.0, out_gain=clamp)
        if name == "sigmoid":  # 2 sigmoid(r) - 1 = tanh(r / 2)
            return cls("tanh", gain=0.5, clamp=1.0, out_gain=clamp)
        raise ValueError(f"kind: expected 'all_in_one', 'atan', 'tanh' or 'sigmoid', got {kind!r}")

    @classmethod
    def zuko(cls, slope=1e-3):
        """zuko MonotonicAffineTransform: log s = r / (1 + abs(r / log(slope)))."""
        return cls("rational", clamp=-math.log(slope))

    @classmethod
    def jet(cls):
        """Jet: (x + t) * 2 sigmoid(r), chunked, shift first; pass ``shift_first=True``."""
        return cls("sigmoid", out_gain=2.0)

    @classmethod
    def tarflow(cls):
        """TarFlow: (x - mu) * exp(-alpha), chunked, scale first; pass ``shift_first=True``."""
        return cls("exp", gain=-1.0, shift_gain=-1.0)

    @classmethod
    def starflow(cls):
        """STARFlow: noise to data z * softplus(r + 0.5413) + mu; data to noise is its inverse, ``inverse=True``. The
        4*tanh(./4) soft clip of r and mu belongs to the conditioner."""
        return cls("softplus", offset=0.5413)

    @classmethod
    def waveglow(cls):
        """WaveGlow: x * exp(r) + t, chunked, shift first."""
        return cls("exp")

    def scale_and_log(self, r):
        """(s, log s) of a raw tensor r, log s from the pre-activation."""
        u = r if self.gain == 1.0 and self.offset == 0.0 else self.gain * r + self.offset
        clamp = 1.0 if self.clamp is None else self.clamp
        if self.kind == "exp":
            log_s = u if self.out_gain == 1.0 else self.out_gain * u
            s = torch.exp(log_s)
        elif self.kind == "sigmoid":
            s, log_s = torch.sigmoid(u), F.logsigmoid(u)
            if self.out_gain != 1.0:
                s, log_s = self.out_gain * s, log_s + math.log(self.out_gain)
        elif self.kind == "softplus":
            s, log_s = softplus(u), log_softplus(u)
        elif self.kind == "additive":
            s, log_s = torch.ones_like(u), torch.zeros_like(u)
        else:
            if self.kind == "tanh":
                log_s = clamp * self.out_gain * torch.tanh(u / clamp)
            elif self.kind == "atan":
                log_s = clamp * self.out_gain * torch.atan(u / clamp)
            else:
                log_s = u / (1.0 + u.abs() / clamp)
            s = torch.exp(log_s)
        if self.eps != 0.0:
            s = s + self.eps
            log_s = torch.logaddexp(log_s, torch.full_like(log_s, math.log(self.eps)))
        if self.hard_min is not None or self.hard_max is not None:
            s = torch.clamp(s, self.hard_min, self.hard_max)
            log_s = torch.clamp(log_s, math.log(self.hard_min) if self.hard_min else None,
                                None if self.hard_max is None else math.log(self.hard_max))
        return s, log_s


_NAMED = {
    "exp": ScaleMap("exp"),
    "sigmoid": ScaleMap("sigmoid", offset=2.0),
    "tanh": ScaleMap("tanh", clamp=1.0),
    "atan": ScaleMap("atan", clamp=1.0, out_gain=2.0 / math.pi),
    "softplus": ScaleMap("softplus", offset=0.5413),
    "rational": ScaleMap("rational", clamp=1.0),
    "additive": ScaleMap("additive"),
}


def softplus(u):
    """log(1 + exp(u)) without a threshold, so that float64 is exact above 20 too."""
    return 0.0 - F.logsigmoid(-u)  # a negation would underflow to -0.0, and 1/softplus to -Inf


def log_softplus(u):
    """log(log(1 + exp(u))), finite where softplus(u) underflows: u - exp(u)/2 for u < -20."""
    low = u < -20.0
    safe = torch.where(low, torch.zeros_like(u), u)
    tail = torch.where(low, u, torch.full_like(u, -20.0))
    return torch.where(low, tail - 0.5 * torch.exp(tail), torch.log(softplus(safe)))


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


def memory_format_of(x):
    """The memory format that ``x``'s strides suggest (Tensor.suggest_memory_format)."""
    return torch._prims_common.suggest_memory_format(x)


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
    if _knows_autocast(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _lu_operand(weight):
    """The matrix in the dtype that it is factorised in, and which matrices of the batch hold a NaN."""
    w = weight.to(torch.float64 if weight.shape[-1] <= FLOAT64_UP_TO else compute_dtype(weight))
    return w, torch.isnan(w.detach()).flatten(-2).any(-1)


def slogdet(weight):
    """(sign, log|det|) of a batch of square matrices; see functional.slogdet."""
    w, nan = _lu_operand(weight)
    sign, logabsdet = torch.linalg.slogdet(w)
    dtype = compute_dtype(weight)
    # CUDA's slogdet swallows NaN (pytorch#173638).
    return (torch.where(nan, math.nan, sign.detach()).to(dtype), torch.where(nan, math.nan, logabsdet).to(dtype))


def slogdet_inverse(weight):
    """(sign, log|det|, inverse); see functional.slogdet_inverse."""
    w, _ = _lu_operand(weight)
    sign, logabsdet = slogdet(weight)
    broken = ~torch.isfinite(logabsdet.detach())[..., None, None]
    identity = torch.eye(w.shape[-1], device=w.device, dtype=w.dtype)
    inverse = torch.linalg.inv_ex(torch.where(broken, identity, w)).inverse
    return sign, logabsdet, torch.where(broken, math.nan, inverse).to(compute_dtype(weight)).contiguous()


def plu_weight(lower, upper, log_s, sign_s, perm):
    """W = P (tril(lower, -1) + I) (triu(upper, 1) + diag(sign_s * exp(log_s))); see functional.plu_weight."""
    eye = torch.eye(lower.shape[-1], device=lower.device, dtype=lower.dtype)
    low = lower.tril(-1) + eye
    up = upper.triu(1) + torch.diag_embed(sign_s * torch.exp(log_s))
    with full_precision(lower.device.type):
        return torch.gather(low @ up, -2, perm[..., None].expand(lower.shape))


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
from fastflow.reference.spline import SPLINES, spline, spline_bins, spline_params  # noqa: E402
from fastflow.reference.top_down import (  # noqa: E402, F401
    LEVEL_MODES,
    LatentLevel,
    MLPBlock,
    level_gaussians,
    normal_log_prob,
    top_down,
)
from fastflow.reference.wide_mlp import wide_mlp  # noqa: E402
