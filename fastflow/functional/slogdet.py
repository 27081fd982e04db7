"""Log-determinants, inverses and PLU assembly of batches of matrices."""

import torch

from fastflow import backends, checks, reference
from fastflow.autograd.differentiable import apply, distinct, needs_grad
from fastflow.autograd.slogdet import PluWeightFunction, SlogdetFunction
from fastflow.extension import kernel

__all__ = ["plu_weight", "slogdet", "slogdet_inverse"]


def _check_weight(weight):
    checks.tensor("weight", weight)
    if weight.dim() < 2 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"weight: expected square matrices (*, C, C), got {tuple(weight.shape)}")


def slogdet(weight):
    """Sign and log-absolute-determinant of a batch of square matrices, by LU with partial pivoting.

    Args:
        weight: (*, C, C), any strides. Factorised in float64 inside up to C = 48.

    Returns:
        sign: (*,) -1, 0 or 1, not differentiable.
        logabsdet: (*,) log|det| in nats; its gradient is the inverse transpose.
        Both float64 for a float64 weight, else float32. Singular, that is with a pivot of exactly zero, as behind a
        zero row or column (and two equal rows, but for the reference, whose LAPACK may round them apart): sign 0,
        logabsdet -inf, and NaN for its gradient. NaN in, NaN out. No exception, no host synchronisation, and no matrix
        of the batch affects another.

    Raises:
        ValueError, TypeError: weight is not a floating tensor of square matrices.
    """
    _check_weight(weight)
    backend = backends.choose("slogdet", weight)
    if backend == "reference":
        return reference.slogdet(weight)
    if needs_grad(weight):
        return apply(SlogdetFunction, weight, backend)[:2]
    return kernel(backend, "slogdet_fwd")(weight, False)[:2]


def slogdet_inverse(weight):
    """Sign, log|det| and inverse of a batch of square matrices from one factorisation; see :func:`slogdet`.

    Returns:
        sign, logabsdet: as slogdet. inverse: (*, C, C), differentiable, of the dtype of logabsdet; NaN where logabsdet
        is not finite.
    """
    _check_weight(weight)
    backend = backends.choose("slogdet_inverse", weight)
    if backend == "reference":
        return reference.slogdet_inverse(weight)
    if needs_grad(weight):
        return apply(SlogdetFunction, weight, backend)
    return kernel(backend, "slogdet_fwd")(weight, True)


def plu_weight(lower, upper, log_s, sign_s, perm):
    """The weights W = P L U of N PLU-parametrised layers, assembled in one launch; log|det W| = sum(log_s).

    L is unit lower triangular from the strict lower part of ``lower``; U has the strict upper part of ``upper`` and the
    diagonal sign_s * exp(log_s); row i of W is row perm[i] of L U (Kingma and Dhariwal, 2018, section 3.2).

    Args:
        lower, upper: (N, C, C) float32 or float64, one dtype for all four.
        log_s, sign_s: (N, C). sign_s carries no gradient.
        perm: (N, C) int64, a permutation of 0..C-1 in each row.

    Returns:
        (N, C, C) in lower's dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit together; the message names the argument.
    """
    checks.tensor("lower", lower)
    if lower.dim() != 3 or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"lower: expected shape (N, C, C), got {tuple(lower.shape)}")
    if lower.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"lower: expected float32 or float64, got {lower.dtype}")
    for name, value, expected in (("upper", upper, lower.shape), ("log_s", log_s, lower.shape[:2]),
                                  ("sign_s", sign_s, lower.shape[:2]), ("perm", perm, lower.shape[:2])):
        checks.tensor(name, value, floating=name != "perm")
        checks.shape(name, value, expected)
        checks.same_device(name, value, "lower", lower)
        dtype = torch.int64 if name == "perm" else lower.dtype
        if value.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {value.dtype}")
    sign_s = sign_s.detach()
    backend = backends.choose("plu_weight", lower, upper, log_s, sign_s, perm)
    if backend == "reference":
        return reference.plu_weight(lower, upper, log_s, sign_s, perm)
    if needs_grad(lower, upper, log_s):
        return apply(PluWeightFunction, *distinct(lower, upper, log_s, sign_s, perm), backend)
    return kernel(backend, "plu_weight_fwd")(lower, upper, log_s, sign_s, perm)
