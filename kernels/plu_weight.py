"""Weights W = P L U of PLU-parametrised layers, and the gradients of their parameters.

L is unit lower triangular, U upper triangular with the diagonal sign_s * exp(log_s); row i of W is row perm[i] of L U.
A program makes one tile of one matrix; products are added in blocks of TERMS, and the blocks then in turn.
"""

import triton
import triton.language as tl

from . import layout, maths

TILE, DOUBLE_TILE = 32, 16
TERMS = 16


@triton.jit
def _lower(lower_ptr, n, r, c, strides, inside):
    """Elements (r, c) of L of matrix n."""
    value = tl.load(lower_ptr + n * strides[0] + r * strides[1] + c * strides[2], mask=inside & (r > c), other=0.0)
    return tl.where(r == c, 1.0, value).to(value.dtype)


@triton.jit
def _upper(upper_ptr, log_s_ptr, sign_s_ptr, n, r, c, strides, log_s_strides, sign_s_strides, inside):
    """Elements (r, c) of U of matrix n."""
    value = tl.load(upper_ptr + n * strides[0] + r * strides[1] + c * strides[2], mask=inside & (r < c), other=0.0)
    on = inside & (r == c)
    log_s = tl.load(log_s_ptr + n * log_s_strides[0] + r * log_s_strides[1] + c * 0, mask=on, other=0.0)
    sign_s = tl.load(sign_s_ptr + n * sign_s_strides[0] + r * sign_s_strides[1] + c * 0, mask=on, other=0.0)
    return tl.where(r == c, sign_s * maths.exp(log_s), value)


@triton.jit(do_not_specialize=["size", "tiles"])
def plu_weight_fwd_kernel(lower_ptr, upper_ptr, log_s_ptr, sign_s_ptr, perm_ptr, out_ptr, lower_strides, upper_strides,
                          log_s_strides, sign_s_strides, perm_strides, size, tiles, TILE: tl.constexpr,
                          TERMS: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    n = pid // (tiles * tiles)
    first_column = (pid % tiles) * TILE
    i = ((pid // tiles) % tiles) * TILE + tl.arange(0, TILE)[:, None]
    j = first_column + tl.arange(0, TILE)[None, :]
    row = tl.load(perm_ptr + n * perm_strides[0] + i * perm_strides[1], mask=i < size, other=0)
    total = tl.zeros([TILE, TILE], out_ptr.dtype.element_ty)
    for start in range(0, tl.minimum(first_column + TILE, size), TERMS):
        part = tl.zeros([TILE, TILE], out_ptr.dtype.element_ty)
        for term in range(start, tl.minimum(start + TERMS, size)):
            k = tl.zeros([1, 1], tl.int64) + term
            lower = _lower(lower_ptr, n, row, k, lower_strides, (i < size) & (k < size))
            upper = _upper(upper_ptr, log_s_ptr, sign_s_ptr, n, k, j, upper_strides, log_s_strides, sign_s_strides,
                           (k < size) & (j < size))
            part = tl.fma(lower, upper, part)
        total += part
    tl.store(out_ptr + (n * size + i) * size + j, total, mask=(i < size) & (j < size))


@triton.jit(do_not_specialize=["size", "tiles"])
def plu_weight_bwd_kernel(grad_ptr, lower_ptr, upper_ptr, log_s_ptr, sign_s_ptr, perm_ptr, glower_ptr, gupper_ptr,
                          glog_s_ptr, grad_strides, lower_strides, upper_strides, log_s_strides, sign_s_strides,
                          perm_strides, size, tiles, TILE: tl.constexpr, TERMS: tl.constexpr):
    """With G = P^T grad: the strictly lower part of G U^T, the strictly upper part of L^T G, and its diagonal."""
    pid = tl.program_id(0).to(tl.int64)
    n = pid // (tiles * tiles)
    i = ((pid // tiles) % tiles) * TILE + tl.arange(0, TILE)[:, None]
    j = (pid % tiles) * TILE + tl.arange(0, TILE)[None, :]
    # Row i of grad is row perm[i] of G.
    row = tl.load(perm_ptr + n * perm_strides[0] + i * perm_strides[1], mask=i < size, other=0)
    lower_total = tl.zeros([TILE, TILE], glower_ptr.dtype.element_ty)
    upper_total = tl.zeros([TILE, TILE], glower_ptr.dtype.element_ty)
    for start in range(0, size, TERMS):
        lower_part = tl.zeros([TILE, TILE], glower_ptr.dtype.element_ty)
        upper_part = tl.zeros([TILE, TILE], glower_ptr.dtype.element_ty)
        for term in range(start, tl.minimum(start + TERMS, size)):
            k = tl.zeros([1, 1], tl.int64) + term
            there = k < size
            g = tl.load(grad_ptr + n * grad_strides[0] + i * grad_strides[1] + k * grad_strides[2],
                        mask=(i < size) & there, other=0.0)
            upper = _upper(upper_ptr, log_s_ptr, sign_s_ptr, n, j, k, upper_strides, log_s_strides, sign_s_strides,
                           there & (j < size))
            lower_part = tl.fma(g, upper, lower_part)
            source = tl.load(perm_ptr + n * perm_strides[0] + k * perm_strides[1], mask=there, other=0)
            g = tl.load(grad_ptr + n * grad_strides[0] + k * grad_strides[1] + j * grad_strides[2],
                        mask=there & (j < size), other=0.0)
            lower = _lower(lower_ptr, n, source, i, lower_strides, there & (i < size))
            upper_part = tl.fma(lower, g, upper_part)
        lower_total += lower_part
        upper_total += upper_part
    inside = (i < size) & (j < size)
    tl.store(glower_ptr + (n * size + row) * size + j, tl.where(row > j, lower_total, 0.0), mask=inside)
    tl.store(gupper_ptr + (n * size + i) * size + j, tl.where(i < j, upper_total, 0.0), mask=inside)
    on = inside & (i == j)
    log_s = tl.load(log_s_ptr + n * log_s_strides[0] + i * log_s_strides[1] + j * 0, mask=on, other=0.0)
    sign_s = tl.load(sign_s_ptr + n * sign_s_strides[0] + i * sign_s_strides[1] + j * 0, mask=on, other=0.0)
    tl.store(glog_s_ptr + n * size + i + j * 0, upper_total * sign_s * maths.exp(log_s), mask=on)


def _tile(lower):
    return DOUBLE_TILE if lower.dtype.itemsize == 8 else TILE


def plu_weight_fwd(lower, upper, log_s, sign_s, perm):
    """W (N, C, C); see functional.plu_weight. One launch."""
    out = lower.new_empty(lower.shape)
    count, size, tile = lower.shape[0], lower.shape[-1], _tile(lower)
    tiles = layout.ceil_div(size, tile)
    layout.launch(plu_weight_fwd_kernel, count * tiles * tiles, lower, lower, upper, log_s, sign_s, perm, out,
                  lower.stride(), upper.stride(), log_s.stride(), sign_s.stride(), perm.stride(), size, tiles,
                  TILE=tile, TERMS=TERMS, num_warps=4)
    return out


def plu_weight_bwd(grad_weight, lower, upper, log_s, sign_s, perm):
    """Gradients of (lower, upper, log_s), zeros outside their strict triangles. One launch."""
    grads = lower.new_empty(lower.shape), upper.new_empty(upper.shape), log_s.new_empty(log_s.shape)
    count, size, tile = lower.shape[0], lower.shape[-1], _tile(lower)
    tiles = layout.ceil_div(size, tile)
    layout.launch(plu_weight_bwd_kernel, count * tiles * tiles, lower, grad_weight, lower, upper, log_s, sign_s, perm,
                  *grads, grad_weight.stride(), lower.stride(), upper.stride(), log_s.stride(), sign_s.stride(),
                  perm.stride(), size, tiles, TILE=tile, TERMS=TERMS, num_warps=4)
    return grads


def _launches(weight, *others):
    return int(weight.numel() > 0)


# Kernel launches of a call, from the launcher's own arguments; the first is (N, C, C) in both directions.
LAUNCHES = {"plu_weight_fwd": _launches, "plu_weight_bwd": _launches}
