"""y = L U x + b with a triangular pair from flat parameters, as one torch.autograd.Function.

By itself each of its dozen small operations is a node of autograd, and they take longer than the product that they
prepare.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastflow import backends, extension, reference
from fastflow.autograd import differentiable

__all__ = ["Places", "factors", "places_of", "run"]

# Elements of x up to which, on a CPU, the time goes into the number of operations and not into what they compute.
SMALL = 16384
RELU = reference.ACTIVATIONS.index("relu")  # a residual network's between the layers of its blocks; ours has no block


class Places(NamedTuple):
    """Where the entries of the factors stand. Matrices are flat; "all" is (lower, upper, diagonal) in a row."""

    matrix: torch.Tensor  # of each entry of a matrix with L below its diagonal and U on and above it, its place in all
    factors: torch.Tensor  # of each entry of U, then of L, its place in (all, 0, 1)
    lower: torch.Tensor  # of each entry of lower, its place in a matrix
    upper: torch.Tensor
    stacked: torch.Tensor  # of each entry of all, its place in (L, U)
    ends: torch.Tensor  # (0, 1)
    zeros: torch.Tensor  # (D,)


def places_of(features, device, dtype):
    """Places for D = ``features``."""
    lower = torch.tril_indices(features, features, -1, device=device)
    upper = torch.triu_indices(features, features, 1, device=device)
    diagonal = torch.arange(features, device=device).expand(2, -1)
    rows, columns = torch.cat([lower, upper, diagonal], 1)
    places = rows * features + columns
    matrix = torch.argsort(places)
    above = torch.triu(torch.ones(features, features, dtype=torch.bool, device=device)).flatten()
    zero, one = len(matrix), len(matrix) + 1
    below = matrix.where(~above, zero)
    below[::features + 1] = one
    ends = torch.tensor([0.0, 1.0], dtype=dtype, device=device)
    return Places(matrix, torch.cat([matrix.where(above, zero), below]), *places.split(
        (lower.shape[1], upper.shape[1], features))[:2], places + features**2 * (columns >= rows), ends,
        torch.zeros(features, dtype=dtype, device=device))


def factors(lower, upper, raw, eps, places):
    """(a matrix with L below its diagonal and U on and above it, U's diagonal softplus(raw) + eps)."""
    diagonal = F.softplus(raw) + eps
    size = len(raw)
    return torch.cat([lower, upper, diagonal]).index_select(0, places.matrix).view(size, size), diagonal


def run(x, lower, upper, raw, bias, eps, places):
    """(y (B, D), log|det| (B,)) of x (B, D), for operands that fit by construction.

    Args:
        lower, upper: the entries below and above the diagonal, row by row.
        raw: (D,), see :func:`factors`.
        bias: (D,).
        places: :func:`places_of` D.
    """
    operands = x, lower, upper, raw, bias
    if (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
            or backends.needs_reference(operands) is not None):
        return _products(*operands, eps, places)[:2]
    layers = x.numel() <= SMALL and backends.serves("mlp", x)
    if differentiable.needs_grad(*operands):
        return (LayersFunction if layers else ProductsFunction).apply(*operands, eps, places)
    return (_layers if layers else _products)(*operands, eps, places)[:2]


def _products(x, lower, upper, raw, bias, eps, places):
    matrix, diagonal = factors(lower, upper, raw, eps, places)
    top, below = torch.triu(matrix), torch.tril(matrix, -1)
    weight = torch.addmm(top, below, top)
    logabsdet = torch.log(diagonal).sum().expand(len(x)).contiguous()  # repeat takes three times as long
    return torch.addmm(bias, x, weight.t()), logabsdet, diagonal, top, below, weight


def _again(ctx, inputs, grads):
    """The gradients by the differentiable formula."""
    return (*differentiable.reference_grads(lambda *operands: _products(*operands, ctx.eps, ctx.places)[:2], inputs,
                                            ctx.needs_input_grad[:5], grads), None, None)


class ProductsFunction(torch.autograd.Function):
    """(y, log|det|) of x, lower, upper, raw and bias by the product of L and U."""

    @staticmethod
    def forward(ctx, x, lower, upper, raw, bias, eps, places):
        ctx.set_materialize_grads(False)
        y, logabsdet, *made = _products(x, lower, upper, raw, bias, eps, places)
        ctx.save_for_backward(x, lower, upper, raw, bias, *made)
        ctx.eps, ctx.places = eps, places
        return y, logabsdet

    @staticmethod
    def backward(ctx, grad_y, grad_logabsdet):
        x, lower, upper, raw, bias, diagonal, top, below, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if differentiable.wanted((grad_y, grad_logabsdet)):
            return _again(ctx, (x, lower, upper, raw, bias), (grad_y, grad_logabsdet))
        grad_x = grad_bias = of_lower = of_upper = of_diagonal = None
        if grad_y is not None:
            grad_x = grad_y @ weight if needs[0] else None
            grad_bias = grad_y.sum(0) if needs[4] else None
            if any(needs[1:4]):
                of_weight = grad_y.t() @ x
                # W = (1 + below) top: dL = dW top^T, dU = dW + below^T dW.
                both = torch.cat([of_weight @ top.t(), torch.addmm(of_weight, below.t(), of_weight)])
                of_lower, of_upper, of_diagonal = both.view(-1).index_select(0, ctx.places.stacked).split(
                    (len(lower), len(upper), len(raw)))
        grad_raw = _raw_gradient(of_diagonal, grad_logabsdet, diagonal, raw) if needs[3] else None
        return grad_x, of_lower if needs[1] else None, of_upper if needs[2] else None, grad_raw, grad_bias, None, None


def _layers(x, lower, upper, raw, bias, eps, places):
    """U and L as the two layers of a network without activation: one kernel, no product of the factors."""
    diagonal = F.softplus(raw).add_(eps)
    size = len(raw)
    top, below = torch.cat([lower, upper, diagonal, places.ends]).index_select(0, places.factors).view(
        2, size, size).unbind()
    y, kept = extension.kernel("cpu", "mlp_fwd")(x, [top, places.zeros, below, bias], RELU, True, True)
    return y, x.new_full((len(x),), torch.log(diagonal).sum().item()), diagonal, top, below, kept



class LayersFunction(torch.autograd.Function):
    """(y, log|det|) of x, lower, upper, raw and bias by the CPU kernel of networks."""

    @staticmethod
    def forward(ctx, x, lower, upper, raw, bias, eps, places):
        ctx.set_materialize_grads(False)
        y, logabsdet, *made = _layers(x, lower, upper, raw, bias, eps, places)
        ctx.save_for_backward(x, lower, upper, raw, bias, *made)
        ctx.eps, ctx.places = eps, places
        return y, logabsdet

    @staticmethod
    def backward(ctx, grad_y, grad_logabsdet):
        x, lower, upper, raw, bias, diagonal, top, below, kept = ctx.saved_tensors
        need_x, *needs = ctx.needs_input_grad[:5]
        if differentiable.wanted((grad_y, grad_logabsdet)):
            return _again(ctx, (x, lower, upper, raw, bias), (grad_y, grad_logabsdet))
        grad_x = grad_bias = of_lower = of_upper = of_diagonal = None
        if grad_y is not None:
            places = ctx.places
            grad_x, found = extension.kernel("cpu", "mlp_bwd")(
                grad_y, x, kept, [top, places.zeros, below, bias], RELU, True, need_x, any(needs))
            grad_x = grad_x if need_x else None
            if found:
                of_top, _, of_below, grad_bias = found
                of_lower = of_below.take(places.lower) if needs[0] else None
                of_upper = of_top.take(places.upper) if needs[1] else None
                of_diagonal = of_top.diagonal()
        grad_raw = _raw_gradient(of_diagonal, grad_logabsdet, diagonal, raw) if needs[2] else None
        return grad_x, of_lower, of_upper, grad_raw, grad_bias if needs[3] else None, None, None


def _raw_gradient(of_diagonal, grad_logabsdet, diagonal, raw):
    """Of raw, from the gradients of U's diagonal and of log|det|, either of which may be None."""
    if grad_logabsdet is not None:
        total = grad_logabsdet.sum()
        of_diagonal = total / diagonal if of_diagonal is None else torch.addcdiv(of_diagonal, total, diagonal)
    return None if of_diagonal is None else torch.ops.aten.softplus_backward(of_diagonal, raw, 1, 20)
