"""The Bernoulli log-likelihood of logits, summed over each sample, in eager PyTorch."""

import torch.nn.functional as F

from fastflow import reference

__all__ = ["bernoulli_log_prob"]


def bernoulli_log_prob(x, logits):
    """sum(x*l - softplus(l)) over the event, (*, B); see functional.bernoulli_log_prob."""
    dtype = reference.compute_dtype(x, logits)
    wide = logits.to(dtype)
    each = F.binary_cross_entropy_with_logits(wide, x.to(dtype).expand(wide.shape), reduction="none")
    lead = logits.dim() - x.dim() + 1
    return -(each.flatten(lead).sum(-1) if each.dim() > lead else each)
