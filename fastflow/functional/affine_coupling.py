"""Affine couplings."""

import torch

from fastflow import backends, checks, reference
from fastflow.autograd import affine_coupling as _affine
from fastflow.autograd.differentiable import apply, distinct, keeping_format, needs_grad
from fastflow.reference import LAYOUTS, ScaleMap

__all__ = ["affine_coupling"]


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
        return reference.affine_coupling(x, keeping_format(params), scale=scale, layout=layout, order=order,
                                         shift_first=shift_first, inverse=inverse, logdet=logdet, passive=passive)
    how = backend, kept, _affine.flags_of(layout, order, shift_first, inverse), scale.scalars
    if needs_grad(*operands):
        return apply(_affine.AffineCouplingFunction, *distinct(*operands), how)
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
