"""The Bernoulli log-likelihood as a torch.autograd.Function."""

import torch

from fastflow import extension, reference
from fastflow.autograd import differentiable


def forward(backend, x, logits):
    """The kernel's (N,) log-likelihoods, without a graph."""
    return extension.kernel(backend, "bernoulli_log_prob_fwd")(x, logits)


@differentiable.direct
class BernoulliLogProbFunction(torch.autograd.Function):
    """(N,) of x (B, *event) and logits (N, *event), N a multiple of B. Saves both as they came."""

    @staticmethod
    def forward(ctx, x, logits, backend):
        ctx.save_for_backward(x, logits)
        ctx.backend = backend
        return forward(backend, x, logits)

    @staticmethod
    def backward(ctx, grad):
        x, logits = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if differentiable.wanted((grad,)):
            found = differentiable.reference_grads(lambda *inputs: (_reference(*inputs),), (x, logits), needs, (grad,))
            return (*found, None)
        grad_x = grad_logits = None
        if needs[0]:  # rare: data seldom need one
            each = logits.unflatten(0, (-1, x.shape[0])) if x.shape[0] else logits[None]
            weights = grad.view(each.shape[:2] + (1,) * (each.dim() - 2))
            grad_x = (weights * each).sum(0).to(x.dtype)
        if needs[1]:
            grad_logits = extension.kernel(ctx.backend, "bernoulli_log_prob_bwd")(grad, x, logits)
        return grad_x, grad_logits, None


def _reference(x, logits):
    """The same shapes as the operators'."""
    grouped = logits.unflatten(0, (-1, x.shape[0])) if x.shape[0] else logits[None]
    return reference.bernoulli_log_prob(x, grouped).flatten()
