"""Fake implementations of the operators of fastflow/extension.py, one function each under the operator's name: shapes,
dtypes and strides of the results, from metadata alone."""

import torch


def _compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widen(like, *operands):
    dtypes = [t.dtype for t in (like, *operands) if t is not None]
    return torch.float32 if like.dtype != torch.float64 and torch.float32 in dtypes else like.dtype


def _nothing(like):
    return like.new_empty((0,))


def _empty_in_format_of(like, shape, dtype):
    memory_format = torch._prims_common.suggest_memory_format(like)
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def affine_coupling_fwd(x, params, shift, logdet, passive, kept, flags, kind, gain, offset, out_gain, clamp,
                        eps, hard_min, hard_max, shift_gain):
    channels = x.shape[1] + (0 if passive is None else passive.shape[1])
    y = _empty_in_format_of(x, (x.shape[0], channels, *x.shape[2:]), _widen(x, params, shift, passive))
    return y, x.new_empty((x.shape[0],), dtype=_compute_dtype(x.dtype))


def affine_coupling_bwd(grad_y, grad_logdet, x, params, shift, kept, need_x, need_params, need_shift, flags,
                        kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
    return tuple(_empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(x)
                 for t, need in ((x, need_x), (params, need_params), (shift, need_shift)))


def slogdet_fwd(weight, want_inverse):
    dtype = _compute_dtype(weight.dtype)
    sign = weight.new_empty(weight.shape[:-2], dtype=dtype)
    return sign, torch.empty_like(sign), weight.new_empty(weight.shape if want_inverse else (0,), dtype=dtype)


def plu_weight_fwd(lower, upper, log_s, sign_s, perm):
    return lower.new_empty(lower.shape)


def plu_weight_bwd(grad_weight, lower, upper, log_s, sign_s, perm):
    return lower.new_empty(lower.shape), upper.new_empty(upper.shape), log_s.new_empty(log_s.shape)


def gaussian_fwd(params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset, n_samples, scale, flags,
                 reduce, want_logq, save_eps):
    shape = list(params.shape)
    if raw is None:
        shape[1] //= 2
    lead = [] if n_samples is None else [n_samples]
    dtype = _compute_dtype(params.dtype)
    z = params.new_empty(lead + shape, dtype=_widen(params, raw, prior_mean, prior_raw, eps))
    kl = params.new_empty((shape[:1], shape[:2], shape)[reduce], dtype=dtype)
    logq = params.new_empty(lead + shape[:1] if want_logq else (0,), dtype=dtype)
    drawn = params.new_empty(lead + shape if save_eps and eps is None else (0,), dtype=dtype)
    return z, kl, logq, drawn


def gaussian_bwd(grad_z, grad_kl, grad_logq, params, raw, prior_mean, prior_raw, eps, seed, seed_value, offset,
                 n_samples, scale, flags, reduce, need_params, need_raw, need_prior_mean, need_prior_raw):
    return tuple(_empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(params)
                 for t, need in ((params, need_params), (raw, need_raw), (prior_mean, need_prior_mean),
                                 (prior_raw, need_prior_raw)))


def latent_head_fwd(mean, logvar, state):
    return torch.empty_like(mean), mean.new_empty(()), torch.empty_like(mean)


def latent_head_bwd(grad_z, grad_kl, mean, logvar, eps):
    return torch.empty_like(mean), torch.empty_like(mean)


def philox4x32(counter, key):
    return counter.new_empty(counter.shape)


def conv_net_fwd(x, w1, b1, w2, b2, w3, b3, slope, keep):
    batch, _, *spatial = x.shape
    pixels, hidden = x.shape[0] * x.shape[2] * x.shape[3], w1.shape[0]
    # kernels/conv_net.py: _turns and _map.
    turned = x.device.type == "cuda" and x.dtype == torch.float32
    shape = (hidden, (pixels + 127) // 128, 128) if turned else (pixels, hidden)
    maps = [x.new_empty(shape) if keep else _nothing(x) for _ in "12"]
    return _empty_in_format_of(x, (batch, w3.shape[0], *spatial), x.dtype), *maps


def conv_net_bwd(grad, x, w1, w2, w3, h1, h2, slope, need_x, need_weights):
    def like(t, need):
        return _empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(x)

    def bias(t):
        return t.new_empty(t.shape[:1]) if need_weights else _nothing(x)
    return like(x, need_x), *(f(w) for w in (w1, w2, w3) for f in (lambda w: like(w, need_weights), bias))


def _channels_last(like):
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def glow_step_fwd(x, matrix, bias, w1, b1, w2, b2, w3, b3, logdet, kept, keep, flags, kind, gain, offset, out_gain,
                  clamp, eps, hard_min, hard_max, shift_gain):
    mixed = _channels_last(x)
    params, *maps = conv_net_fwd(mixed.narrow(1, 0, kept), w1, b1, w2, b2, w3, b3, 0.0, keep)
    y, total = affine_coupling_fwd(mixed, params, None, logdet, None, kept, flags, kind, gain, offset, out_gain, clamp,
                                   eps, hard_min, hard_max, shift_gain)
    return y, total, *((mixed, params) if keep else (_nothing(x), _nothing(x))), *maps


def glow_step_bwd(grad_y, grad_logdet, x, matrix, w1, w2, w3, mixed, params, h1, h2, kept, need_x, need_matrix,
                  need_weights, flags, kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain):
    _, *grads = conv_net_bwd(params, mixed.narrow(1, 0, kept), w1, w2, w3, h1, h2, 0.0, False, need_weights)
    return (_channels_last(x) if need_x else _nothing(x),
            *(x.new_empty(shape if need_matrix else (0,)) for shape in (matrix.shape, matrix.shape[:1])), *grads)


def mlp_fwd(x, params, activation, residual, keep):
    hidden = params[2::2]  # each weight's columns are kept in rows of whole lines, under silu with their slopes
    sizes = [(w.shape[1] + 15) // 16 * 16 * (2 if activation == 1 and not (residual and w is hidden[-1]) else 1)
             for w in hidden]
    return x.new_empty((x.shape[0], params[-2].shape[0])), x.new_empty((x.shape[0], sum(sizes)) if keep else (0,))


def mlp_bwd(grad, x, kept, params, activation, residual, need_x, need_params):
    return (x.new_empty(x.shape) if need_x else _nothing(x),
            [p.new_empty(p.shape) for p in params] if need_params else [])


def mlp_flow_fwd(x, context, params, steps, constants, inverse, save):
    batch, features = x.shape
    rows = sum(_overwritten(features, *steps[at:at + 3]) for at in range(0, len(steps), 6))
    if save == 2 and x.device.type == "cpu":
        rows += _kept(params, steps)
    return x.new_empty(x.shape), x.new_empty((batch,)), x.new_empty((rows, batch) if save else (0,))


def _overwritten(features, coupling, linears, flip):
    """How many features a step overwrites: all, or the second part, or with flip the first; a permutation none."""
    if coupling == 2:
        return 0
    return features if not coupling else features // 2 if flip else features - features // 2


def _kept(params, steps):
    """How many activations forward keeps: csrc/mlp_flow_program.h, add_linears."""
    rows = at = 0
    for coupling, linears, _, activation, _, _ in zip(*[iter(steps)] * 6, strict=True):
        hidden = params[at:at + 2 * linears - 2:2] if coupling == 1 and activation != 1 else ()
        rows += sum(w.shape[0] for w in hidden if w.shape[1] >= 32 and w.shape[0] % 16 == 0)
        at += 1 if coupling == 2 else 2 * (linears if coupling else 1)
    return rows


def mlp_flow_bwd(grad_z, grad_logdet, z, saved, context, params, steps, constants, inverse, need_x, need_context,
                 need_params):
    grad_context = need_context and context is not None
    return (z.new_empty(z.shape) if need_x else _nothing(z), z.new_empty(context.shape if grad_context else (0,)),
            [p.new_empty(p.shape) if p.is_floating_point() else _nothing(z) for p in params] if need_params else [])


def spline_fwd(x, params, logdet, kind, inverse, *constants):
    y = _empty_in_format_of(x, x.shape, _widen(x, params))
    return y, x.new_empty((x.shape[0],), dtype=_compute_dtype(x.dtype))


def spline_bwd(grad_y, grad_logdet, x, params, need_x, need_params, kind, inverse, *constants):
    return tuple(_empty_in_format_of(t, t.shape, t.dtype) if need else _nothing(x)
                 for t, need in ((x, need_x), (params, need_params)))


def activated_conv_fwd(x, weight, bias, stride, padding, transposed, activation, channels_last):
    sizes = [(size - 1) * stride - 2 * padding + taps if transposed else (size + 2 * padding - taps) // stride + 1
             for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True)]
    shape = (x.shape[0], weight.shape[1 if transposed else 0], *sizes)
    if channels_last:
        return x.new_empty((shape[0], *sizes, shape[1])).permute(0, 3, 1, 2)
    return x.new_empty(shape)


def activated_conv_bwd(grad, x, weight, stride, padding, transposed, activation, need_x, need_weights):
    return (_empty_in_format_of(x, x.shape, x.dtype) if need_x else _nothing(x),
            _empty_in_format_of(weight, weight.shape, weight.dtype) if need_weights else _nothing(x),
            x.new_empty((grad.shape[1],)) if need_weights else _nothing(x))


def wide_mlp_fwd(x, weights, biases, activation, keep):
    hidden = [x.new_empty((x.shape[0], w.shape[0])) for w in weights[:-1] for _ in range(activation)]
    return x.new_empty((x.shape[0], weights[-1].shape[0])), hidden if keep else []


def wide_mlp_bwd(grad, grads_hidden, x, weights, kept, activation, need_x, need_params):
    grads = [x.new_empty(shape) for w in weights for shape in (w.shape, w.shape[:1])]
    return x.new_empty(x.shape) if need_x else _nothing(x), grads if need_params else []


def bernoulli_log_prob_fwd(x, logits):
    return logits.new_empty((logits.shape[0],), dtype=_compute_dtype(logits.dtype))


def bernoulli_log_prob_bwd(grad, x, logits):
    return _empty_in_format_of(logits, logits.shape, logits.dtype)


def top_down_fwd(h, features, eps, seed, seed_value, offset, params, levels, save):
    batch, out, latents, rows = h.shape[0], h.shape[1], 0, 0
    outputs = iter([bias.shape[0] for bias in params[1::2]])
    for at, d in zip(range(0, len(levels), 11), features, strict=True):
        prior, posterior, merge = ([next(outputs) for _ in range(levels[at + k])] for k in (2, 5, 8))
        width = prior[-1] // 2
        latents += width
        # csrc/cpu/top_down.cpp, Work::add: what the level's block holds.
        rows += sum(map(_in_lines, (out + d.shape[1] + 16, out + width, width)))
        rows += 2 * sum(map(_in_lines, (*prior, *posterior, *merge[:-1])))
        out = merge[-1]
    terms = [h.new_empty((len(features), batch)) for _ in range(3)]
    saved = h.new_empty(((batch + 63) // 64 * 64 * (rows + _in_lines(out)) if save else 0,))
    return h.new_empty((batch, out)), h.new_empty((batch * latents,)), *terms, saved


def _in_lines(rows):
    return (rows + 15) // 16 * 16


def top_down_bwd(grad_next, grad_z, grad_kl, grad_log_q, grad_log_p, h, features, saved, params, levels, need_h,
                 need_features, need_params):
    return (h.new_empty(h.shape) if need_h else _nothing(h),
            [d.new_empty(d.shape) for d in features] if need_features else [],
            [p.new_empty(p.shape) for p in params] if need_params else [])
