"""y = L U x + b with a triangular pair from flat parameters, as one torch.autograd.Function.

By itself each of its dozen small operations is a node of autograd, and they take longer than the product that they
prepare.
"""

import torch
import torch.nn.functional as F

from fastflow import backends
from fastflow.autograd import differentiable

__all__ = ["factors", "run"]


def factors(lower, upper, raw, eps, order):
    """(a matrix with L below its diagonal and U on and above it, U's diagonal softplus(raw) + eps). ``order``: where
    each entry of the flat matrix stands among (lower, upper, diagonal)."""
    diagonal = F.softplus(raw) + eps
    size = len(raw)
    return torch.cat([lower, upper, diagonal]).index_select(0, order).view(size, size), diagonal


def run(x, lower, upper, raw, bias, eps, order, places):
    """(y (B, D), log|det| (B,)) of x (B, D), for operands that fit by construction.

    Args:
        lower, upper: the entries below and above the diagonal, row by row.
        raw: (D,), see :func:`factors`.
        bias: (D,).
        order: see :func:`factors`.
        places: where each of (lower, upper, diagonal) stands in two flat matrices, one behind the other: the entries
            below the diagonal in the first, the others in the second.
    """
    operands = x, lower, upper, raw, bias
    if (not differentiable.needs_grad(*operands) or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type) or backends.needs_reference(operands) is not None):
        return _forward(*operands, eps, order)[:2]
    return LULinearFunction.apply(*operands, eps, order, places)


def _forward(x, lower, upper, raw, bias, eps, order):
    matrix, diagonal = factors(lower, upper, raw, eps, order)
    top, below = torch.triu(matrix), torch.tril(matrix, -1)
    weight = torch.addmm(top, below, top)
    logabsdet = torch.log(diagonal).sum().expand(len(x)).contiguous()  # repeat takes three times as long
    return torch.addmm(bias, x, weight.t()), logabsdet, diagonal, top, below, weight


class LULinearFunction(torch.autograd.Function):
    """(y, log|det|) of x, lower, upper, raw and bias."""

    @staticmethod
    def forward(ctx, x, lower, upper, raw, bias, eps, order, places):
        ctx.set_materialize_grads(False)
        y, logabsdet, *made = _forward(x, lower, upper, raw, bias, eps, order)
        ctx.save_for_backward(x, lower, upper, raw, bias, order, places, *made)
        ctx.eps = eps
        return y, logabsdet

    @staticmethod
    def backward(ctx, grad_y, grad_logabsdet):
        *inputs, order, places, diagonal, top, below, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        nothing = None, None, None
        if differentiable.wanted((grad_y, grad_logabsdet)):
            grads = differentiable.reference_grads(lambda *operands: _forward(*operands, ctx.eps, order)[:2], inputs,
                                                   needs, (grad_y, grad_logabsdet))
            return (*grads, *nothing)
        x, lower, upper, raw, bias = inputs
        grad_x = grad_bias = flat = None
        if grad_y is not None:
            grad_x = grad_y @ weight if needs[0] else None
            grad_bias = grad_y.sum(0) if needs[4] else None
            if any(needs[1:4]):
                of_weight = grad_y.t() @ x
                # W = (1 + below) top: dL = dW top^T, dU = dW + below^T dW.
                both = torch.cat([of_weight @ top.t(), torch.addmm(of_weight, below.t(), of_weight)])
                flat = both.view(-1).index_select(0, places)
        if flat is None:
            flat = torch.zeros_like(order, dtype=raw.dtype)
        of_lower, of_upper, of_diagonal = flat.split((len(lower), len(upper), len(raw)))
        if needs[3]:
            if grad_logabsdet is not None:
                of_diagonal = of_diagonal + grad_logabsdet.sum() / diagonal
            of_diagonal = of_diagonal * torch.sigmoid(raw)
        grads = (grad_x, of_lower, of_upper, of_diagonal, grad_bias)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *nothing)
