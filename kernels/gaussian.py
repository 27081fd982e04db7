"""Reparameterised Gaussian samples with KL and log q in one pass.

A program handles one sample index k and ``rows`` rows: samples, or (sample, channel) pairs where the KL is summed per
channel. Rows beyond ONE_PROGRAM elements are shared among programs and their partial sums added by a second launch.
"""

import math

import torch
import triton
import triton.language as tl

from . import gaussian_terms as terms
from . import layout, maths
from .gaussian_backward import bwd_launches, gaussian_bwd, noise_arguments, operands, over_batch, over_samples
from .layout import compute_dtype, offsets_within
from .philox import philox4x32_words as philox4x32

__all__ = ["LAUNCHES", "gaussian_bwd", "gaussian_fwd", "philox4x32"]

SAMPLE, CHANNEL, NONE = range(3)
LARGEST_TILE = 1024
ONE_PROGRAM, CHUNK = 4096, 2048  # the noise is worth more programs than a coupling is
HALF_LOG_TWO_PI = tl.constexpr(0.5 * math.log(2.0 * math.pi))


@triton.jit
def _row_starts(rows, channels, strides, base, LEAD: tl.constexpr):
    if LEAD == 2:
        return (rows // channels) * strides[0] + (rows % channels) * strides[1] + base
    else:
        return rows * strides[0] + base


@triton.jit(do_not_specialize=["mean_base", "raw_base", "eps_step", "n", "n_rows", "channels", "parts", "n_samples",
                               "seed_stride"])
def gaussian_fwd_kernel(
        mean_ptr, raw_ptr, prior_mean_ptr, prior_raw_ptr, eps_ptr, seed_ptr, z_ptr, kl_ptr, logq_ptr, drawn_ptr,
        mean_strides, raw_strides, prior_mean_strides, prior_raw_strides, eps_strides, sizes,
        mean_base, raw_base, eps_step, seed_stride, seed_value: tl.int64, offset: tl.int64, n: tl.int64, n_rows,
        channels, parts, n_samples,
        SCALE: tl.constexpr, LEAD: tl.constexpr, ELEMENTWISE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
        RANK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """z, kl (ELEMENTWISE, or per row and part), logq (per k, row and part) and the noise drawn. n is in units."""
    dtype = kl_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    groups = tl.maximum(n_samples, 1)
    k = pid % groups
    part = (pid // groups) % parts
    rows = (pid // groups // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    drawn_rows = k * n_rows + rows
    columns = tl.arange(0, BLOCK)[None, :]
    end = n * UNIT
    seed = seed_value
    if seed_ptr is not None:
        batch = rows
        if LEAD == 2:
            batch = rows // channels
        seed = tl.load(seed_ptr + batch * seed_stride, mask=rows < n_rows, other=0)
    kl_total = tl.zeros([ROWS, BLOCK], dtype)
    logq_total = tl.zeros([ROWS, BLOCK], dtype)
    for start in range(part * CHUNK, tl.minimum(part * CHUNK + CHUNK, end), BLOCK):
        index = start + columns
        if not WIDE:
            index = index.to(tl.int32)
        inside = (rows < n_rows) & (index < end)
        mean = tl.load(mean_ptr + offsets_within(
            _row_starts(rows, channels, mean_strides, mean_base, LEAD), index, sizes, mean_strides, LEAD, RANK, UNIT),
            mask=inside, other=0.0).to(dtype)
        raw = tl.load(raw_ptr + offsets_within(
            _row_starts(rows, channels, raw_strides, raw_base, LEAD), index, sizes, raw_strides, LEAD, RANK, UNIT),
            mask=inside, other=0.0).to(dtype)
        if eps_ptr is not None:
            eps = tl.load(eps_ptr + offsets_within(
                _row_starts(rows, channels, eps_strides, k * eps_step, LEAD), index, sizes, eps_strides, LEAD, RANK,
                UNIT), mask=inside & (k < n_samples), other=0.0).to(dtype)
        else:
            eps = terms.noise(drawn_rows, start, end, offset, seed, ALIGNED, BLOCK).to(dtype)
        sigma, log_sigma = terms.sigma_and_log(raw, SCALE)
        target = drawn_rows * n * UNIT + index
        wanted = inside & (k < n_samples)
        tl.store(z_ptr + target, tl.fma(sigma, eps, mean), mask=wanted)
        if drawn_ptr is not None:
            tl.store(drawn_ptr + target, eps, mask=wanted)
        if logq_ptr is not None:
            logq_total -= tl.where(inside, HALF_LOG_TWO_PI + tl.fma(0.5 * eps, eps, log_sigma), 0.0)
        if prior_mean_ptr is not None:
            prior_mean = tl.load(prior_mean_ptr + offsets_within(
                _row_starts(rows, channels, prior_mean_strides, 0, LEAD), index, sizes, prior_mean_strides, LEAD, RANK,
                UNIT), mask=inside, other=0.0).to(dtype)
            prior_raw = tl.load(prior_raw_ptr + offsets_within(
                _row_starts(rows, channels, prior_raw_strides, 0, LEAD), index, sizes, prior_raw_strides, LEAD, RANK,
                UNIT), mask=inside, other=0.0).to(dtype)
            prior_sigma, prior_log = terms.sigma_and_log(prior_raw, SCALE)
            mean = maths.div(mean - prior_mean, prior_sigma)
            log_sigma = log_sigma - prior_log
        _, excess = maths.expm1_and_excess(2.0 * log_sigma)
        kl = 0.5 * tl.fma(mean, mean, excess)
        if ELEMENTWISE:
            tl.store(kl_ptr + rows * n * UNIT + index, kl, mask=inside & (k == 0))
        else:
            kl_total += tl.where(inside, kl, 0.0)
    if not ELEMENTWISE:
        tl.store(kl_ptr + rows * parts + part, layout.row_sum(kl_total, ROWS, BLOCK), mask=(rows < n_rows) & (k == 0))
    if logq_ptr is not None:
        tl.store(logq_ptr + drawn_rows * parts + part, layout.row_sum(logq_total, ROWS, BLOCK),
                 mask=(rows < n_rows) & (k < n_samples))


def gaussian_fwd(params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples, scale, flags, reduce,
                 want_logq, save_eps):
    """(z, kl, logq, eps); see functional.gaussian_sample_kl. One launch, or up to three where sums are shared."""
    dtype = compute_dtype(params.dtype)
    out_dtype = layout.result_dtype(params, raw, prior_mean, prior_raw, eps)
    (mean, mean_strides, mean_base), (scales, raw_strides, raw_base), shape = operands(params, raw, flags)
    leading = () if n_samples is None else (n_samples,)
    count = 1 if n_samples is None else n_samples
    z = params.new_empty(leading + shape, dtype=out_dtype)
    kl = params.new_empty((shape[:1], shape[:2], shape)[reduce], dtype=dtype)
    logq = params.new_empty(leading + shape[:1] if want_logq else (0,), dtype=dtype)
    drawn = params.new_empty(leading + shape if save_eps and eps is None else (0,), dtype=dtype)

    elementwise = reduce == NONE or (reduce == CHANNEL and math.prod(shape[2:]) == 1)
    lead = 2 if reduce == CHANNEL and not elementwise else 1
    eps_strides, eps_step = over_samples(eps, shape, n_samples)
    seed_tensor, seed_stride = noise_arguments(eps, seed)
    plan = layout.plan(shape, (mean_strides, raw_strides, over_batch(prior_mean, shape), over_batch(prior_raw, shape),
                               eps_strides), (mean_base, raw_base, eps_step), lead=lead)
    rows, block, warps = layout.tile_of(plan.n, dtype == torch.float64, LARGEST_TILE)
    chunk = CHUNK
    if elementwise and not want_logq:
        chunk, parts = block, layout.ceil_div(plan.n, block)
    else:
        parts = layout.parts_of(plan.n, ONE_PROGRAM, CHUNK)
        chunk = CHUNK if parts > 1 else ONE_PROGRAM
    n_rows = math.prod(shape[:lead])
    kl_sums = kl if elementwise or parts == 1 else params.new_empty((n_rows, parts), dtype=dtype)
    shared = want_logq and (parts > 1 or lead == 2)
    logq_sums = params.new_empty((count, n_rows, parts), dtype=dtype) if shared else logq
    layout.launch(
        gaussian_fwd_kernel, layout.ceil_div(n_rows, rows) * parts * max(count, 1), params,
        mean, scales, prior_mean, prior_raw, eps, seed_tensor, z, kl_sums,
        logq_sums if want_logq else None, drawn if save_eps and eps is None else None, *plan.strides, plan.sizes,
        *plan.bases, seed_stride, seed_value, offset, plan.n_units, n_rows, shape[1], parts, count,
        SCALE=scale, LEAD=lead, ELEMENTWISE=elementwise, ALIGNED=plan.n % 4 == 0, CHUNK=chunk, **plan.meta(), ROWS=rows,
        BLOCK=block, num_warps=warps, **layout.registers(168 if prior_mean is None else 176))
    if kl_sums is not kl:
        layout.row_sums(kl_sums, kl)
    if shared:
        layout.row_sums(logq_sums, logq)
    return z, kl, logq, drawn


def _fwd_launches(params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples, scale, flags, reduce,
                  want_logq, save_eps):
    shape = operands(params, raw, flags)[2]
    lead = 2 if reduce == CHANNEL and math.prod(shape[2:]) != 1 else 1
    elementwise = reduce == NONE or (reduce == CHANNEL and lead == 1)
    n_rows, n = math.prod(shape[:lead]), math.prod(shape[lead:])
    summed = layout.parts_of(n, ONE_PROGRAM, CHUNK) > 1
    first = n_rows > 0 and (n > 0 or not elementwise or want_logq)
    kl_sums = n_rows > 0 and summed and not elementwise
    logq_sums = want_logq and (summed or lead == 2) and shape[0] > 0 and n_samples != 0
    return first + kl_sums + logq_sums


# Kernel launches of a call, from the launcher's own arguments.
LAUNCHES = {"gaussian_fwd": _fwd_launches, "gaussian_bwd": bwd_launches,
            "philox4x32": lambda counter, key: int(counter.numel() > 0)}
