"""y = L U x + b with a triangular pair from flat parameters, as a step of a chain, and by itself.

As nodes of autograd its dozen small operations take longer than the product that they prepare.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastflow import backends, extension, reference
from fastflow.autograd import chain

__all__ = ["Places", "factors", "places_of", "run", "step"]

# Elements of x up to which, on a CPU, the time goes into the number of operations and not into what they compute.
SMALL = 16384
RELU = reference.ACTIVATIONS.index("relu")  # a residual network's between the layers of its blocks; ours has no block
SOFTPLUS_BACKWARD = torch.ops.aten.softplus_backward.default


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
    """(y (B, D), log|det| (B,)) of x (B, D), for operands that fit by construction; see :func:`step`."""
    operands = x, lower, upper, raw, bias
    if (torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
            or backends.needs_reference(operands) is not None):
        return _products(x, lower, upper, raw, bias, eps, places)[:2]
    return chain.run(x, (step(*operands, eps, places),))


def step(x, lower, upper, raw, bias, eps, places):
    """The map as a chain's step for data like x.

    Args:
        lower, upper: the entries below and above the diagonal, row by row.
        raw: (D,), see :func:`factors`.
        bias: (D,).
        places: :func:`places_of` D.
    """
    layers = x.numel() <= SMALL and backends.serves("mlp", x)
    return chain.Step(LayersStep if layers else ProductsStep, (eps, places), (lower, upper, raw, bias))


def _products(x, lower, upper, raw, bias, eps, places):
    matrix, diagonal = factors(lower, upper, raw, eps, places)
    top, below = torch.triu(matrix), torch.tril(matrix, -1)
    weight = torch.addmm(top, below, top)
    logabsdet = torch.log(diagonal).sum().expand(len(x)).contiguous()  # repeat takes three times as long
    return torch.addmm(bias, x, weight.t()), logabsdet, diagonal, top, below, weight


class ProductsStep:
    """By the product of L and U. Tensors: lower, upper, raw and bias."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        y, logabsdet, *made = _products(x, *tensors, *consts)
        return y, logabsdet if logdet is None else logabsdet.add_(logdet), x, *made

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        lower, upper, raw, _ = tensors
        x, diagonal, top, below, weight = saved
        need_lower, need_upper, need_raw, need_bias = needs
        grad_x = grad_bias = of_lower = of_upper = of_diagonal = None
        if grad_y is not None:
            grad_x = grad_y @ weight if need_x else None
            grad_bias = grad_y.sum(0) if need_bias else None
            if need_lower or need_upper or need_raw:
                of_weight = grad_y.t() @ x
                # W = (1 + below) top: dL = dW top^T, dU = dW + below^T dW.
                both = torch.cat([of_weight @ top.t(), torch.addmm(of_weight, below.t(), of_weight)])
                of_lower, of_upper, of_diagonal = both.view(-1).index_select(0, consts[1].stacked).split(
                    (len(lower), len(upper), len(raw)))
        return grad_x, [of_lower if need_lower else None, of_upper if need_upper else None,
                        _raw_gradient(of_diagonal, grad_logdet, diagonal, raw) if need_raw else None, grad_bias]

    @staticmethod
    def reference(x, tensors, consts):
        return _products(x, *tensors, *consts)[:2]


class LayersStep:
    """U and L as the two layers of a network without activation: one CPU kernel, no product of the factors. Tensors:
    lower, upper, raw and bias."""

    @staticmethod
    def forward(x, logdet, tensors, consts, keep):
        (lower, upper, raw, bias), (eps, places) = tensors, consts
        diagonal = F.softplus(raw).add_(eps)
        size = len(raw)
        top, below = torch.cat([lower, upper, diagonal, places.ends]).index_select(0, places.factors).view(
            2, size, size).unbind()
        y, kept = extension.kernel("cpu", "mlp_fwd")(x, [top, places.zeros, below, bias], RELU, True, keep)
        logabsdet = torch.log(diagonal).sum()
        logdet = x.new_full((len(x),), logabsdet.item()) if logdet is None else logdet + logabsdet
        return y, logdet, x, diagonal, top, below, kept

    @staticmethod
    def backward(grad_y, grad_logdet, tensors, saved, consts, need_x, needs):
        _, _, raw, bias = tensors
        x, diagonal, top, below, kept = saved
        places = consts[1]
        grad_x = grad_bias = of_lower = of_upper = of_diagonal = None
        if grad_y is not None:
            grad_x, found = extension.kernel("cpu", "mlp_bwd")(
                grad_y, x, kept, [top, places.zeros, below, bias], RELU, True, need_x, any(needs))
            grad_x = grad_x if need_x else None
            if found:
                of_top, _, of_below, grad_bias = found
                of_lower = of_below.take(places.lower) if needs[0] else None
                of_upper = of_top.take(places.upper) if needs[1] else None
                of_diagonal = of_top.diagonal()
        return grad_x, [of_lower, of_upper, _raw_gradient(of_diagonal, grad_logdet, diagonal, raw) if needs[2] else
                        None, grad_bias if needs[3] else None]

    reference = ProductsStep.reference


def _raw_gradient(of_diagonal, grad_logdet, diagonal, raw):
    """Of raw, from the gradients of U's diagonal and of log|det|, either of which may be None."""
    if grad_logdet is not None:
        total = grad_logdet.sum()
        of_diagonal = total / diagonal if of_diagonal is None else torch.addcdiv(of_diagonal, total, diagonal)
    return None if of_diagonal is None else SOFTPLUS_BACKWARD(of_diagonal, raw, 1, 20)
