"""The distribution function of a mixture of logistics as an element-wise bijection, in log-space."""

import torch
import torch.nn.functional as F

from fastflow import checks, functional
from fastflow.functional import ScaleMap

__all__ = ["check_mixture", "logistic_mixture", "mixture_params", "mixture_start"]


def mixture_params(n_components):
    """3K + 2: the raw parameters of one element for :func:`logistic_mixture` with K components."""
    return 3 * n_components + 2


def mixture_start(n_components):
    """(3K + 2,) raw parameters near the identity: equal weights, unit scales, means spread evenly over [-1, 1], because
    components that start alike stay alike."""
    params = torch.zeros(mixture_params(n_components))
    if n_components > 1:
        params[n_components:2 * n_components] = torch.linspace(-1.0, 1.0, n_components)
    return params


def check_mixture(n_components, scale, log_scale_bound):
    """The ScaleMap that ``scale`` names; ValueError that names the option that does not fit."""
    checks.count("n_components", n_components, 1)
    if not 0.0 < log_scale_bound < float("inf"):
        raise ValueError(f"log_scale_bound: expected a positive number, got {log_scale_bound!r}")
    scale = ScaleMap.of(scale)
    if scale.kind == "additive":
        raise ValueError("scale: expected a map of a raw scale, got 'additive', which has none")
    return scale


def logistic_mixture(x, params, *, scale="tanh", log_scale_bound=7.0, inverse=False, logdet=None):
    """z = s*logit(F(x)) + t per element, F the distribution function of K logistics, and its log-determinant.

    With raw logits v, means m and log-scales r of an element's components, and u_k = (x - m_k)/exp(b tanh(r_k/b)),
    b = log_scale_bound,

        log F = logsumexp_k(log softmax(v)_k + logsigmoid(u_k)),    log(1 - F) the same with -u_k,
        logit F = log F - log(1 - F),    log dlogit F/dx = log f - log F - log(1 - F),

    none of which leaves log-space, so that both tails keep their relative precision. The inverse solves
    logit F(x) = y by Newton's method within a bracket that halves where that fails. Its ends are the smallest and the
    largest quantile m_k + exp(..)*y of one component. Derivatives of the inverse, first and second, are those of the
    implicit function. Between components far apart F is flat and the inverse as ill-conditioned as F.

    Args:
        x: (B, C, *S), S possibly empty.
        params: (B, C*(3K + 2), *S); those of a channel lie side by side: K logits, K means, K log-scales, the raw scale
            and the shift t.
        scale: ScaleMap from the raw scale to s, or its name; not "additive".
        log_scale_bound: b > 0.
        inverse: compute the inverse map.
        logdet: (B,) running log-determinant in nats, added to the result.

    Returns:
        z: (B, C, *S) in x's dtype, float32 if any operand is.
        logdet: (B,) in nats, float64 for float64 operands, else float32.

    Raises:
        ValueError: a shape does not fit; the message names the argument.
        TypeError: not a floating tensor, or float64 mixed with a lower dtype.

    References:
        Ho et al., "Flow++", 2019, arXiv:1902.00275, section 3.2.
    """
    checks.tensor("x", x)
    checks.tensor("params", params)
    if x.dim() < 2:
        raise ValueError(f"x: expected shape (B, C, *S), got {tuple(x.shape)}")
    channels = x.shape[1]
    per_channel, rest = divmod(params.shape[1], max(channels, 1)) if params.dim() > 1 else (0, 1)
    fits = per_channel >= 5 and per_channel % 3 == 2 if channels else per_channel == 0
    if rest or not fits or (params.shape[0], *params.shape[2:]) != (x.shape[0], *x.shape[2:]):
        raise ValueError(f"params: expected shape {(x.shape[0], f'{channels}*(3K + 2)', *x.shape[2:])} for x of shape "
                         f"{tuple(x.shape)}, got {tuple(params.shape)}")
    logdet = checks.with_running_logdet([("x", x), ("params", params)], logdet, x)
    dtype = torch.promote_types(torch.promote_types(x.dtype, params.dtype), torch.float32)
    out_dtype = x.dtype if params.dtype == x.dtype else dtype
    if not channels:
        return x, x.new_zeros(x.shape[0], dtype=dtype) if logdet is None else logdet
    raw = params.to(dtype).unflatten(1, (channels, per_channel))
    k = per_channel // 3
    logits, means, raw_scales = raw[:, :, :3 * k].chunk(3, 2)
    mixture = F.log_softmax(logits, 2), means, log_scale_bound * torch.tanh(raw_scales / log_scale_bound)
    affine = {"params": (raw[:, :, -2], raw[:, :, -1]), "scale": scale}
    if inverse:
        y, logdet = functional.affine_coupling(x.to(dtype), inverse=True, logdet=logdet, **affine)
        value = _Root(mixture).of(y)
        return value.to(out_dtype), logdet - _logit(value, *mixture)[1].flatten(1).sum(1)
    y, log_slope = _logit(x.to(dtype), *mixture)
    total = log_slope.flatten(1).sum(1)
    z, logdet = functional.affine_coupling(y, logdet=total if logdet is None else logdet + total, **affine)
    return z.to(out_dtype), logdet


def _logit(x, log_weights, means, log_scales):
    """(logit F(x), log of its slope), components along dim 2 of the last three."""
    u = (x.unsqueeze(2) - means) * torch.exp(-log_scales)
    below, above = F.logsigmoid(u), F.logsigmoid(-u)
    log_cdf = torch.logsumexp(log_weights + below, 2)
    log_rest = torch.logsumexp(log_weights + above, 2)
    log_pdf = torch.logsumexp(log_weights + below + above - log_scales, 2)
    return log_cdf - log_rest, log_pdf - log_cdf - log_rest


class _Root:
    """x with logit F(x) = y, for one mixture per element."""

    def __init__(self, mixture):
        self.mixture = mixture

    def of(self, y):
        with torch.no_grad():
            x = self._solve(y)
        if not (torch.is_grad_enabled() and (y.requires_grad or any(t.requires_grad for t in self.mixture))):
            return x
        # Newton's steps with a constant slope and a residual that stands for zero: x stays, and each step makes one
        # more order of its derivatives in y and the mixture right.
        with torch.no_grad():
            slope = torch.exp(_logit(x, *self.mixture)[1]).clamp(min=torch.finfo(x.dtype).tiny)
        for _ in range(2):
            residual = _logit(x, *self.mixture)[0] - y
            x = x - (residual - residual.detach()) / slope
        return x

    def _solve(self, y):
        log_weights, means, log_scales = self.mixture
        eps = torch.finfo(y.dtype).eps
        knots = means + torch.exp(log_scales) * y.unsqueeze(2)
        low, high = knots.amin(2), knots.amax(2)
        smallest = torch.exp(log_scales).amin(2)
        x = (torch.exp(log_weights) * knots).sum(2)
        last = high - low
        watched = not (torch.compiler.is_compiling() or (y.is_cuda and torch.cuda.is_current_stream_capturing()))
        # Two steps halve the bracket at least, from at most 1/eps of the tolerance in what the dtype can tell apart.
        for _ in range(160 if y.dtype == torch.float64 else 80):
            value, log_slope = _logit(x, *self.mixture)
            residual = value - y
            low, high = torch.where(residual <= 0, x, low), torch.where(residual >= 0, x, high)
            newton = x - residual * torch.exp(-log_slope)
            good = (newton >= low) & (newton <= high) & ((newton - x).abs() <= 0.5 * last)
            x, before = torch.where(good, newton, 0.5 * (low + high)), x
            last = (x - before).abs()
            # Written so that a NaN, which never gets better, counts as done.
            if watched and not bool((last > 2 * eps * (x.abs() + smallest)).any()):
                break
        return x
