"""The Bernoulli log-likelihood of logits, summed over each sample."""

import torch

from fastflow import backends, checks, reference
from fastflow.autograd import bernoulli_log_prob as _bernoulli
from fastflow.autograd.differentiable import apply, distinct, needs_grad

__all__ = ["bernoulli_log_prob"]


def bernoulli_log_prob(x, logits):
    """log p(x) of independent bits with the given logits, summed over each sample, in one pass.

    log p = sum over the event of x*l - softplus(l), which for bits is x log p + (1 - x) log(1 - p) with
    p = sigmoid(l). x between 0 and 1 is taken as it is: minus the cross-entropy, no normalised density. Unlike
    binary_cross_entropy_with_logits with reduction="none" it makes no tensor of the logits' size, forward or, but for
    the gradient itself, backward; x is not repeated for the K samples.

    Args:
        x: (B, *event), floating, integer or bool, any strides.
        logits: (*, B, *event), any strides: for K samples of z, (K, B, *event).

    Returns:
        (*, B) in nats, float64 for float64 logits, else float32. Differentiable in both operands.
        NaN and infinities as binary_cross_entropy_with_logits gives them.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
        TypeError: not a tensor, logits that are not floating, complex x, or float64 mixed with a lower dtype.
    """
    checks.tensor("logits", logits)
    checks.tensor("x", x, floating=False)
    if not x.is_floating_point():
        if x.is_complex():
            raise TypeError(f"x: expected a floating, integer or bool tensor, got {x.dtype}")
        x = x.to(torch.promote_types(logits.dtype, torch.float32))
    checks.tensor("x", x)
    if x.dim() < 1:
        raise ValueError("x: expected shape (B, *event), got ()")
    lead = logits.dim() - x.dim()
    if lead < 0 or logits.shape[lead:] != x.shape:
        raise ValueError(f"logits: expected shape (*, {', '.join(map(str, x.shape))}) for x of shape {tuple(x.shape)}, "
                         f"got {tuple(logits.shape)}")
    checks.same_device("logits", logits, "x", x)
    checks.no_mixed_double([("x", x), ("logits", logits)])
    backend = backends.choose("bernoulli_log_prob", x, logits)
    if backend == "reference":
        return reference.bernoulli_log_prob(x, logits)
    rows = logits.flatten(0, lead) if lead else logits
    if needs_grad(x, logits):
        result = apply(_bernoulli.BernoulliLogProbFunction, *distinct(x, rows), backend)
    else:
        result = _bernoulli.forward(backend, x, rows)
    return result.view(logits.shape[:lead + 1]) if lead else result
