"""Gradients of the Gaussian sample and its KL: the noise is given, or drawn again from the seed.

One launch for the gradients of mean, raw and a prior of its own for every sample; a prior shared by the batch needs
sums over the batch, added up in blocks of PRIOR_ROWS samples by one launch, and over the blocks by a second one.
"""

import math

import torch
import triton
import triton.language as tl

from . import gaussian_terms as terms
from . import layout, maths
from .layout import compute_dtype, offsets_of

INTERLEAVED, SCALE_IN_FRONT = 1, 2
LARGEST_TILE = 1024
PRIOR_ROWS = 512  # samples that one program adds up
PRIOR_TILE = (16, 64)


@triton.jit
def _add(total, lost, value, COMPENSATED: tl.constexpr):
    """(total + value, the rounding error so far): Kahan's sum; the error of a sum that is not finite counts as 0."""
    if COMPENSATED:
        value = value - lost
        new = total + value
        lost = (new - total) - value
        return new, tl.where(lost == lost, lost, 0.0)
    else:
        return total + value, lost


@triton.jit(do_not_specialize=[
    "mean_base", "raw_base", "gmean_base", "graw_base", "eps_step", "gz_step", "n", "n_rows", "parts", "n_samples",
    "seed_stride", "glogq_step", "glogq_stride"])
def gaussian_bwd_kernel(
        mean_ptr, raw_ptr, prior_mean_ptr, prior_raw_ptr, eps_ptr, gz_ptr, gkl_ptr, glogq_ptr, seed_ptr,
        gmean_ptr, graw_ptr, gprior_mean_ptr, gprior_raw_ptr,
        mean_strides, raw_strides, prior_mean_strides, prior_raw_strides, eps_strides, gz_strides,
        gmean_strides, graw_strides, gprior_mean_strides, gprior_raw_strides, gkl_strides, sizes,
        mean_base, raw_base, eps_step, gz_step, gmean_base, graw_base,
        glogq_step, glogq_stride, seed_stride, seed_value: tl.int64, offset: tl.int64, n: tl.int64, n_rows, parts,
        n_samples,
        SCALE: tl.constexpr, DOUBLE: tl.constexpr, MANY: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr,
        UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients where their pointers are given; missing incoming gradients count as zero. n is in units."""
    dtype = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    rows = (pid // parts) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (pid % parts) * BLOCK
    index = start + tl.arange(0, BLOCK)[None, :]
    if not WIDE:
        index = index.to(tl.int32)
    end = n * UNIT
    inside = (rows < n_rows) & (index < end)
    through_mean = tl.zeros([ROWS, BLOCK], dtype)
    through_sigma = through_mean
    if gz_ptr is not None:
        lost_mean = through_mean
        lost_sigma = through_mean
        seed = seed_value
        if seed_ptr is not None:
            seed = tl.load(seed_ptr + rows * seed_stride, mask=rows < n_rows, other=0)
        for count in range(n_samples):
            k = tl.cast(count, tl.int64)
            gz = tl.load(gz_ptr + offsets_of(rows, index, sizes, gz_strides, k * gz_step, RANK, UNIT), mask=inside,
                         other=0.0).to(dtype)
            through_mean, lost_mean = _add(through_mean, lost_mean, gz, MANY)
            if graw_ptr is not None:
                if eps_ptr is not None:
                    eps = tl.load(eps_ptr + offsets_of(rows, index, sizes, eps_strides, k * eps_step, RANK, UNIT),
                                  mask=inside, other=0.0).to(dtype)
                else:
                    eps = terms.noise(k * n_rows + rows, start, end, offset, seed, ALIGNED, BLOCK).to(dtype)
                if MANY:
                    through_sigma, lost_sigma = _add(through_sigma, lost_sigma, gz * eps, MANY)
                else:
                    through_sigma = tl.fma(gz, eps, through_sigma)
    raw = tl.load(raw_ptr + offsets_of(rows, index, sizes, raw_strides, raw_base, RANK, UNIT), mask=inside,
                  other=0.0).to(dtype)
    _, log_sigma, sigma_slope, log_slope = terms.with_slopes(raw, SCALE)
    gmean = through_mean
    graw = tl.zeros([ROWS, BLOCK], dtype)
    if gz_ptr is not None:
        graw = through_sigma * sigma_slope
    if glogq_ptr is not None:
        total = tl.zeros([ROWS, 1], dtype)
        lost = total
        for count in range(n_samples):
            at = rows * glogq_stride + tl.cast(count, tl.int64) * glogq_step
            total, lost = _add(total, lost, tl.load(glogq_ptr + at, mask=rows < n_rows, other=0.0).to(dtype), MANY)
        graw = tl.fma(-total, log_slope, graw)
    if gkl_ptr is not None:
        gkl = tl.load(gkl_ptr + offsets_of(rows, index, sizes, gkl_strides, 0, RANK, UNIT, True), mask=inside,
                      other=0.0).to(dtype)
        distance = tl.load(mean_ptr + offsets_of(rows, index, sizes, mean_strides, mean_base, RANK, UNIT), mask=inside,
                           other=0.0).to(dtype)
        if prior_mean_ptr is None:
            gmean = tl.fma(gkl, distance, gmean)
            graw = tl.fma(gkl, maths.expm1(2.0 * log_sigma) * log_slope, graw)
        else:
            prior_mean = tl.load(prior_mean_ptr + offsets_of(rows, index, sizes, prior_mean_strides, 0, RANK, UNIT),
                                 mask=inside, other=0.0).to(dtype)
            prior_raw = tl.load(prior_raw_ptr + offsets_of(rows, index, sizes, prior_raw_strides, 0, RANK, UNIT),
                                mask=inside, other=0.0).to(dtype)
            pull, prior_pull, growth = prior_terms(distance, log_sigma, prior_mean, prior_raw, SCALE)
            gmean = tl.fma(gkl, pull, gmean)
            graw = tl.fma(gkl, growth * log_slope, graw)
            if gprior_mean_ptr is not None:
                tl.store(gprior_mean_ptr + offsets_of(rows, index, sizes, gprior_mean_strides, 0, RANK, UNIT),
                         -gkl * pull, mask=inside)
            if gprior_raw_ptr is not None:
                tl.store(gprior_raw_ptr + offsets_of(rows, index, sizes, gprior_raw_strides, 0, RANK, UNIT),
                         -gkl * prior_pull, mask=inside)
    if gmean_ptr is not None:
        tl.store(gmean_ptr + offsets_of(rows, index, sizes, gmean_strides, gmean_base, RANK, UNIT), gmean, mask=inside)
    if graw_ptr is not None:
        tl.store(graw_ptr + offsets_of(rows, index, sizes, graw_strides, graw_base, RANK, UNIT), graw, mask=inside)


@triton.jit
def prior_terms(mean, log_sigma, prior_mean, prior_raw, SCALE: tl.constexpr):
    """Slopes of the KL: (by the mean, the negative of that by prior_raw, by log sigma = expm1(2 log(sigma / sigma_p))).

    Non-finite values come out as in csrc/common/gaussian_map.h, kl_prior_slopes.
    """
    prior_sigma, prior_log, sigma_slope, log_slope = terms.with_slopes(prior_raw, SCALE)
    distance = maths.div(mean - prior_mean, prior_sigma)
    pull = maths.div(distance, prior_sigma)
    growth = maths.expm1(2.0 * (log_sigma - prior_log))
    return pull, tl.fma(distance * pull, sigma_slope, growth * log_slope), growth


@triton.jit(do_not_specialize=["mean_base", "raw_base", "n", "n_rows", "column_blocks"])
def shared_prior_bwd_kernel(
        mean_ptr, raw_ptr, prior_mean_ptr, prior_raw_ptr, gkl_ptr, gprior_mean_ptr, gprior_raw_ptr,
        mean_strides, raw_strides, prior_mean_strides, prior_raw_strides, gprior_mean_strides, gprior_raw_strides,
        gkl_strides, sizes, mean_base, raw_base, n: tl.int64, n_rows, column_blocks,
        SCALE: tl.constexpr, DOUBLE: tl.constexpr, CHUNK: tl.constexpr, RANK: tl.constexpr, UNIT: tl.constexpr,
        WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of a prior that every sample shares, summed over CHUNK samples: row ``chunk`` of the outputs."""
    dtype = tl.float64 if DOUBLE else tl.float32
    pid = tl.program_id(0).to(tl.int64)
    chunk = pid // column_blocks
    index = (pid % column_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if not WIDE:
        index = index.to(tl.int32)
    column_inside = index < n * UNIT
    mean_total = tl.zeros([ROWS, BLOCK], dtype)
    raw_total = tl.zeros([ROWS, BLOCK], dtype)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, n_rows), ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        inside = (rows < n_rows) & column_inside
        prior_mean = tl.load(prior_mean_ptr + offsets_of(rows, index, sizes, prior_mean_strides, 0, RANK, UNIT),
                             mask=inside, other=0.0).to(dtype)
        prior_raw = tl.load(prior_raw_ptr + offsets_of(rows, index, sizes, prior_raw_strides, 0, RANK, UNIT),
                            mask=inside, other=0.0).to(dtype)
        mean = tl.load(mean_ptr + offsets_of(rows, index, sizes, mean_strides, mean_base, RANK, UNIT), mask=inside,
                       other=0.0).to(dtype)
        raw = tl.load(raw_ptr + offsets_of(rows, index, sizes, raw_strides, raw_base, RANK, UNIT), mask=inside,
                      other=0.0).to(dtype)
        gkl = tl.load(gkl_ptr + offsets_of(rows, index, sizes, gkl_strides, 0, RANK, UNIT, True), mask=inside,
                      other=0.0).to(dtype)
        _, log_sigma = terms.sigma_and_log(raw, SCALE)
        pull, prior_pull, _ = prior_terms(mean, log_sigma, prior_mean, prior_raw, SCALE)
        mean_total -= tl.where(inside, gkl * pull, 0.0)
        raw_total -= tl.where(inside, gkl * prior_pull, 0.0)
    if gprior_mean_ptr is not None:
        tl.store(gprior_mean_ptr + offsets_of(chunk, index, sizes, gprior_mean_strides, 0, RANK, UNIT),
                 layout.column_sum(mean_total, ROWS, BLOCK), mask=column_inside)
    if gprior_raw_ptr is not None:
        tl.store(gprior_raw_ptr + offsets_of(chunk, index, sizes, gprior_raw_strides, 0, RANK, UNIT),
                 layout.column_sum(raw_total, ROWS, BLOCK), mask=column_inside)


@triton.jit(do_not_specialize=["n", "n_rows"])
def column_sums_kernel(a_ptr, a_out_ptr, b_ptr, b_out_ptr, strides, a_strides, b_strides, sizes, n: tl.int64, n_rows,
                       RANK: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                       BLOCK: tl.constexpr):
    """a_out = a summed over its rows, b_out likewise, each where its pointer is given."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if not WIDE:
        index = index.to(tl.int32)
    column_inside = index < n * UNIT
    if a_ptr is not None:
        _column_sum(a_ptr, a_out_ptr, strides, a_strides, sizes, index, column_inside, n_rows, RANK, UNIT, ROWS, BLOCK)
    if b_ptr is not None:
        _column_sum(b_ptr, b_out_ptr, strides, b_strides, sizes, index, column_inside, n_rows, RANK, UNIT, ROWS, BLOCK)


@triton.jit
def _column_sum(in_ptr, out_ptr, strides, out_strides, sizes, index, column_inside, n_rows, RANK: tl.constexpr,
                UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([ROWS, BLOCK], in_ptr.dtype.element_ty)
    for first in range(0, n_rows, ROWS):
        rows = tl.cast(first, tl.int64) + tl.arange(0, ROWS)[:, None]
        total += tl.load(in_ptr + offsets_of(rows, index, sizes, strides, 0, RANK, UNIT),
                         mask=(rows < n_rows) & column_inside, other=0.0)
    one = tl.zeros([1, 1], tl.int64)
    tl.store(out_ptr + offsets_of(one, index, sizes, out_strides, 0, RANK, UNIT),
             layout.column_sum(total, ROWS, BLOCK), mask=column_inside)


def noise_arguments(eps, seed):
    """(seed tensor, its stride), (None, 0) where eps is given or the seed is a number."""
    if eps is not None or seed is None:
        return None, 0
    return seed, seed.stride(0) if seed.dim() else 0


def strides_of(t, shape):
    """Strides of ``t``, zeros for None."""
    return (0,) * len(shape) if t is None else t.stride()


def over_batch(t, shape):
    """Strides of ``t`` seen as ``shape``, with its batch of 1 repeated; zeros for None."""
    strides = strides_of(t, shape)
    return strides if t is None or t.shape[0] > 1 else (0, *strides[1:])


def over_samples(t, shape, n_samples):
    """(strides within a sample set, step from one set to the next) of eps or of the gradient of z."""
    if t is None or n_samples is None:
        return strides_of(t, shape), 0
    return t.stride()[1:], t.stride(0)


def operands(params, raw, flags):
    """(mean, its strides, base), (raw, strides, base) inside the params, and mean's shape."""
    shape = tuple(params.shape)
    if raw is not None:
        return (params, params.stride(), 0), (raw, raw.stride(), 0), shape
    strides, second = layout.halves(params, flags & INTERLEAVED)
    shape = (shape[0], shape[1] // 2, *shape[2:])
    if flags & SCALE_IN_FRONT:
        return (params, strides, second), (params, strides, 0), shape
    return (params, strides, 0), (params, strides, second), shape


def gaussian_bwd(grad_z, grad_kl, grad_logq, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset,
                 n_samples, scale, flags, reduce, need_params, need_raw, need_prior_mean, need_prior_raw):
    """Gradients of (params, raw, prior_mean, prior_raw), empty where not needed; see functional.gaussian_sample_kl.

    One launch, with a prior that the batch shares two, or three beyond PRIOR_ROWS samples.
    """
    (mean, mean_strides, mean_base), (scales, raw_strides, raw_base), shape = operands(params, raw, flags)
    grads = [layout.empty_like_format(t, t.shape, t.dtype) if need else None for t, need in (
        (params, need_params), (raw, need_raw), (prior_mean, need_prior_mean), (prior_raw, need_prior_raw))]
    if raw is None and need_params:
        (gmean, gmean_strides, gmean_base), (graw, graw_strides, graw_base), _ = operands(grads[0], None, flags)
    else:
        gmean, graw = grads[:2]
        gmean_strides, graw_strides = (strides_of(t, shape) for t in (gmean, graw))
        gmean_base = graw_base = 0
    priors = grads[2:]
    if grad_kl is None:
        for grad in filter(lambda t: t is not None, priors):
            grad.zero_()
        priors = [None, None]
    own = [g if g is not None and g.shape[0] == shape[0] else None for g in priors]
    summed = [g if o is None else None for g, o in zip(priors, own, strict=True)]
    double = params.dtype == torch.float64
    meta = {"SCALE": scale, "DOUBLE": double}
    incoming_kl = kl_strides(grad_kl, shape)
    if any(g is not None for g in (gmean, graw, *own)):
        eps_strides, eps_step = over_samples(eps, shape, n_samples)
        gz_strides, gz_step = over_samples(grad_z, shape, n_samples)
        plan = layout.plan(
            shape, (mean_strides, raw_strides, over_batch(prior_mean, shape), over_batch(prior_raw, shape), eps_strides,
                    gz_strides, gmean_strides, graw_strides, *(strides_of(g, shape) for g in own), incoming_kl),
            (mean_base, raw_base, eps_step, gz_step, gmean_base, graw_base), loose=1)
        rows, block, warps = layout.tile_of(plan.n, double, LARGEST_TILE)
        parts = layout.ceil_div(plan.n, block)
        seed_tensor, seed_stride = noise_arguments(eps, seed)
        glogq_stride, glogq_step = (0, 0) if grad_logq is None else (grad_logq.stride(-1), 0 if n_samples is None else
                                                                     grad_logq.stride(0))
        layout.launch(
            gaussian_bwd_kernel, layout.ceil_div(shape[0], rows) * parts, params,
            mean, scales, prior_mean, prior_raw, eps, grad_z, grad_kl, grad_logq, seed_tensor, gmean, graw, *own,
            *plan.strides, plan.sizes, *plan.bases, glogq_step, glogq_stride, seed_stride, seed_value, offset,
            plan.n_units, shape[0], parts, 1 if n_samples is None else n_samples, **meta,
            MANY=n_samples is not None and n_samples > 1, ALIGNED=plan.n % 4 == 0, **plan.meta(), ROWS=rows,
            BLOCK=block, num_warps=warps, **layout.registers(168))
    if any(g is not None for g in summed):
        shared_prior_bwd(summed, grad_kl, incoming_kl, (mean, mean_strides, mean_base), (scales, raw_strides, raw_base),
                         prior_mean, prior_raw, shape, meta)
    return tuple(layout.nothing(params) if g is None else g for g in grads)


def kl_strides(grad_kl, shape):
    """Strides of the KL's gradient, of any reduction, seen as ``shape``."""
    if grad_kl is None:
        return (0,) * len(shape)
    return (*grad_kl.stride(), *(0,) * (len(shape) - grad_kl.dim()))


def shared_prior_bwd(grads, grad_kl, incoming_kl, mean, raw, prior_mean, prior_raw, shape, meta):
    """Fill the gradients of the prior's parameters that have batch 1."""
    chunks = layout.ceil_div(shape[0], PRIOR_ROWS)
    if chunks <= 1:
        sums = grads
        strides = [over_batch(g, shape) for g in grads]
    else:
        dtype = compute_dtype(grad_kl.dtype)
        sums = [None if g is None else torch.empty((chunks, *shape[1:]), dtype=dtype, device=g.device) for g in grads]
        strides = [strides_of(g, shape) for g in sums]
    plan = layout.plan(shape, (mean[1], raw[1], over_batch(prior_mean, shape), over_batch(prior_raw, shape), *strides,
                               incoming_kl), (mean[2], raw[2]), loose=1)
    rows, block = PRIOR_TILE
    if meta["DOUBLE"]:
        block //= 4
    column_blocks = layout.ceil_div(plan.n, block)
    if chunks == 0:
        for grad in filter(lambda t: t is not None, grads):
            grad.zero_()
    layout.launch(shared_prior_bwd_kernel, chunks * column_blocks, mean[0],
                  mean[0], raw[0], prior_mean, prior_raw, grad_kl, *sums, *plan.strides, plan.sizes, *plan.bases,
                  plan.n_units, shape[0], column_blocks, **meta, CHUNK=PRIOR_ROWS, **plan.meta(), ROWS=rows,
                  BLOCK=block, num_warps=4, **layout.registers(168))
    if chunks > 1:
        like = next(t for t in sums if t is not None)
        plan = layout.plan(tuple(like.shape), (like.stride(), *(over_batch(g, shape) for g in grads)))
        layout.launch(column_sums_kernel, layout.ceil_div(plan.n, block), like, sums[0], grads[0], sums[1], grads[1],
                      *plan.strides, plan.sizes, plan.n_units, chunks, **plan.meta(), ROWS=rows, BLOCK=block,
                      num_warps=4)


def bwd_launches(grad_z, grad_kl, grad_logq, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset,
                 n_samples, scale, flags, reduce, need_params, need_raw, need_prior_mean, need_prior_raw):
    """Kernel launches of :func:`gaussian_bwd` with these arguments."""
    shape = operands(params, raw, flags)[2]
    if not math.prod(shape):
        return 0
    wanted = ((prior_mean, need_prior_mean), (prior_raw, need_prior_raw))
    batches = [prior.shape[0] for prior, need in wanted if need and grad_kl is not None]
    own = need_params or need_raw or shape[0] in batches
    shared = any(batch != shape[0] for batch in batches)
    return own + shared * (1 if shape[0] <= PRIOR_ROWS else 2)
