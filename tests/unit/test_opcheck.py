"""torch.library.opcheck on every operator of the compiled library: schema, no mutation, fake implementation (shapes,
dtypes and strides), and tracing with dynamic shapes."""

import inspect
import itertools

import layouts
import pytest
import torch
from cases import no_kernel
from sweeps import rest_slow
from torch.utils import _pytree as pytree

from fastflow import extension, reference

# The scalars of a ScaleMap: kind, gain, offset, out_gain, clamp, eps, hard_min, hard_max, shift_gain.
EXP = (0, 1.0, 0.0, 1.0, 1.0, 0.0, -float("inf"), float("inf"), 1.0)
TANH = (2, 0.5, 0.1, 1.5, 2.0, 0.1, 0.2, 3.0, 0.5)
ADDITIVE = (6, 1.0, 0.0, 1.0, 1.0, 0.0, -float("inf"), float("inf"), 1.0)
INTERLEAVED, SHIFT_IN_FRONT, SHIFT_FIRST, INVERSE = 1, 2, 4, 8
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # plain operands: autograd is the Function's


def r(*shape, dtype=torch.float32, layout=layouts.contiguous):
    return layout(torch.randn(shape).to(dtype))


def forward_samples():
    for shape in ((3, 4), (2, 3, 4, 5), (2, 2, 2, 3, 2), (0, 4, 2)):
        doubled = (shape[0], 2 * shape[1], *shape[2:])
        for layout in (layouts.contiguous, layouts.channels_last, layouts.padded):
            x, p = r(*shape, layout=layout), r(*doubled, layout=layout)
            yield x, p, None, None, None, 0, 0, *EXP
            yield p, p, None, None, None, shape[1], SHIFT_FIRST, *EXP
            yield p, x, None, r(shape[0]), None, -shape[1], 0, *ADDITIVE
            yield x, r(*shape), r(*shape, layout=layout), r(shape[0]), r(*shape, layout=layout), 0, INVERSE, *TANH
        yield r(*shape, dtype=torch.bfloat16), r(*doubled, dtype=torch.bfloat16), None, None, None, 0, INTERLEAVED, *EXP
        yield r(*shape, dtype=torch.bfloat16), r(*doubled), None, None, None, 0, SHIFT_IN_FRONT | SHIFT_FIRST, *TANH
        yield r(*shape, dtype=torch.float64), r(*shape, dtype=torch.float64), None, None, None, 0, 0, *ADDITIVE
    for shape in layouts.AMBIGUOUS_SHAPES:
        for layout in (layouts.contiguous, layouts.channels_last, layouts.channel_slice):
            yield r(*shape, layout=layout), r(*shape), r(*shape), None, r(*shape), 0, 0, *EXP


def backward_samples():
    for shape in ((3, 4), (2, 3, 4, 5), (0, 4, 2)):
        doubled = (shape[0], 2 * shape[1], *shape[2:])
        for layout in (layouts.contiguous, layouts.channels_last, layouts.permuted):
            x, p = r(*shape, layout=layout), r(*doubled, layout=layout)
            yield r(*shape), r(shape[0]), x, p, None, 0, True, True, False, 0, *EXP
            pair = r(*shape), r(*shape, layout=layout)
            yield r(*doubled, layout=layout), None, x, *pair, 0, True, True, True, INVERSE, *TANH
            yield r(*doubled, layout=layout), None, p, *pair, -shape[1], True, True, True, INVERSE, *TANH
            yield None, r(shape[0]), p, p, None, shape[1], True, False, False, 0, *EXP
        yield None, r(shape[0]), r(*shape), r(*doubled), None, 0, False, True, False, INTERLEAVED, *EXP
        yield r(*shape), None, r(*shape), r(*shape), r(*shape), 0, True, False, False, SHIFT_FIRST, *EXP
        yield r(*shape), None, r(*shape, dtype=torch.bfloat16), r(*shape), None, 0, True, True, False, 0, *ADDITIVE


def slogdet_samples():
    for shape in ((4, 4), (3, 5, 5), (2, 3, 2, 2), (0, 4, 4), (2, 0, 0), (2, 50, 50)):
        for want_inverse in (False, True):
            yield r(*shape), want_inverse
            yield r(*shape, dtype=torch.float64, layout=layouts.transposed), want_inverse
    yield r(3, 6, 6, dtype=torch.bfloat16), True


def plu_samples():
    for n, c in ((3, 5), (1, 1), (0, 4), (2, 0)):
        for dtype in (torch.float32, torch.float64):
            yield (r(n, c, c, dtype=dtype), r(n, c, c, dtype=dtype, layout=layouts.transposed), r(n, c, dtype=dtype),
                   torch.ones(n, c, dtype=dtype), torch.arange(c).expand(n, c))


def plu_backward_samples():
    for operands in plu_samples():
        yield r(*operands[0].shape, dtype=operands[0].dtype, layout=layouts.padded), *operands


def gaussian_samples():
    seed, seeds = torch.tensor(3), torch.arange(3)
    for shape in ((3, 4), (3, 2, 4, 5), (0, 4, 2)):
        doubled = (shape[0], 2 * shape[1], *shape[2:])
        for reduce in (0, 1, 2):
            yield r(*doubled), None, None, None, None, None, 5, 0, None, 0, 0, reduce, False, True
            pair, prior = (r(*shape), r(*shape)), (r(1, *shape[1:]), r(1, *shape[1:]))
            yield *pair, *prior, None, seed, 0, 7, 2, 1, 0, reduce, True, False
        yield r(*doubled), None, None, None, r(2, *shape), None, 0, 0, 2, 3, INTERLEAVED, 0, True, True
        half = r(*doubled, dtype=torch.bfloat16, layout=layouts.channels_last)
        yield half, None, None, None, None, None, 5, 0, None, 4, SHIFT_IN_FRONT, 1, True, True
    yield r(3, 4), r(3, 4), None, None, None, seeds, 0, 0, None, 0, 0, 0, True, True


def gaussian_backward_samples():
    seed = torch.tensor(3)
    for shape in ((3, 4), (3, 2, 4, 5), (0, 4, 2)):
        doubled, kls = (shape[0], 2 * shape[1], *shape[2:]), (shape[:1], shape[:2], shape)
        for reduce in (0, 1, 2):
            yield r(*shape), r(*kls[reduce]), None, r(*doubled, layout=layouts.channels_last), None, None, None, None, \
                None, 5, 0, None, 0, 0, reduce, True, False, False, False
            yield r(2, *shape), r(*kls[reduce]), r(2, shape[0]), r(*shape), r(*shape), r(1, *shape[1:]), \
                r(1, *shape[1:]), None, seed, 0, 7, 2, 1, 0, reduce, True, True, True, True
        pair, eps = (r(*shape), r(*shape)), r(*shape)
        yield None, r(shape[0]), None, *pair, None, None, eps, None, 0, 0, None, 0, 0, 0, False, True, False, False


def head_samples():
    for shape in ((4, 4), (3, 7, 5)):
        yield r(*shape), r(*shape), torch.Generator().get_state()


def head_backward_samples():
    for shape in ((4, 4), (3, 7, 5)):
        yield r(*shape), r(), r(*shape), r(*shape), r(*shape)


def philox_samples():
    yield torch.randint(0, 2**32, (7, 4)), torch.randint(0, 2**32, (7, 2))
    yield torch.randint(0, 2**32, (0, 4)), torch.randint(0, 2**32, (0, 2))


def conv_net_samples():
    for x in (r(3, 5, 4, 6), r(2, 3, 4, 4, layout=layouts.channels_last), r(2, 2, 1, 5, dtype=torch.float64),
              r(0, 3, 4, 4), r(2, 3, 0, 4), r(2, 0, 3, 3)):
        dtype, channels = x.dtype, x.shape[1]
        for keep in (False, True):
            yield (x, r(16, channels, 3, 3, dtype=dtype, layout=layouts.channels_last), r(16, dtype=dtype),
                   r(16, 16, 1, 1, dtype=dtype), r(16, dtype=dtype), r(7, 16, 3, 3, dtype=dtype), r(7, dtype=dtype),
                   0.1, keep)


def conv_net_backward_samples():
    for x, w1, _, w2, _, w3, _, slope, keep in conv_net_samples():
        maps = [r(x.shape[0] * x.shape[2] * x.shape[3], 16, dtype=x.dtype) for _ in "12"]
        yield r(x.shape[0], 7, *x.shape[2:], dtype=x.dtype), x, w1, w2, w3, *maps, slope, keep, True
        yield r(x.shape[0], 7, *x.shape[2:], dtype=x.dtype), x, w1, w2, w3, *maps, slope, True, False


def glow_step_samples():
    for x in (r(2, 5, 4, 6, layout=layouts.channels_last), r(2, 4, 3, 3), r(2, 2, 1, 5, dtype=torch.float64),
              r(0, 3, 4, 4), r(2, 3, 0, 4)):
        dtype, channels, kept = x.dtype, x.shape[1], x.shape[1] // 2
        network = (r(16, kept, 3, 3, dtype=dtype, layout=layouts.channels_last), r(16, dtype=dtype),
                   r(16, 16, 1, 1, dtype=dtype), r(16, dtype=dtype),
                   r(2 * (channels - kept), 16, 3, 3, dtype=dtype), r(2 * (channels - kept), dtype=dtype))
        for keep in (False, True):
            yield (x, r(channels, channels, dtype=dtype), r(channels, dtype=dtype) if keep else None, *network,
                   r(len(x), dtype=dtype) if keep else None, kept, keep, 6, *reference.ScaleMap.glow().scalars)


def glow_step_backward_samples():
    for x, matrix, _, w1, _, w2, _, w3, _, _, kept, keep, *rest in glow_step_samples():
        maps = [r(x.shape[0] * x.shape[2] * x.shape[3], 16, dtype=x.dtype) for _ in "12"]
        mixed = r(*x.shape, dtype=x.dtype, layout=layouts.channels_last)
        params = r(len(x), len(w3), *x.shape[2:], dtype=x.dtype, layout=layouts.channels_last)
        for needs in ((True, True, True), (False, True, False), (True, False, False), (False, False, True)):
            yield (r(*x.shape, dtype=x.dtype), r(len(x), dtype=x.dtype) if keep else None, x, matrix, w1, w2, w3, mixed,
                   params, *maps, kept, *needs, *rest)


def activated_conv_samples():
    for x, transposed in ((r(3, 5, 6, 7), False), (r(2, 16, 4, 3, layout=layouts.channels_last), True),
                          (r(2, 16, 5, 5, dtype=torch.float64), False), (r(0, 3, 4, 4), False),
                          (r(2, 16, 3, 3, layout=layouts.padded), True)):
        channels = (x.shape[1], 5) if transposed else (32, x.shape[1])
        for bias in (None, r(channels[1 if transposed else 0], dtype=x.dtype)):
            for layout in (layouts.contiguous, layouts.channels_last):
                yield (x, r(*channels, 4, 3, dtype=x.dtype, layout=layout), bias, 2, 1, transposed, 2,
                       layout is layouts.channels_last)


def activated_conv_backward_samples():
    for x, weight, bias, stride, padding, transposed, activation, channels_last in activated_conv_samples():
        shape = reference.activated_conv(x, weight, bias, stride=stride, padding=padding, transposed=transposed).shape
        layout = layouts.channels_last if channels_last else layouts.contiguous
        for needs in ((True, True), (True, False), (False, True)):
            yield (r(*shape, dtype=x.dtype, layout=layout), x, weight, stride, padding, transposed, activation, *needs)


def mlp_samples():
    for batch, sizes, residual, activation, dtype in ((3, (4, 5, 2), False, 0, torch.float32),
                                                      (100, (3, 17, 17, 17, 9), True, 1, torch.float32),
                                                      (2, (3, 6, 4), False, 1, torch.float64),
                                                      (0, (2, 4, 1), True, 2, torch.float64),
                                                      (2, (3, 1), False, 0, torch.float32)):
        params = [t for i, o in zip(sizes, sizes[1:], strict=False)
                  for t in (r(o, i, dtype=dtype, layout=layouts.transposed), r(o, dtype=dtype))]
        for keep in (False, True):
            yield r(batch, sizes[0], dtype=dtype, layout=layouts.padded), params, activation, residual, keep


def mlp_backward_samples():
    for x, params, activation, residual, keep in mlp_samples():
        hidden, dtype = params[2::2], x.dtype
        kept = sum((w.shape[1] + 15) // 16 * 16 * (1 + (activation == 1 and not (residual and w is hidden[-1])))
                   for w in hidden)
        for needs in ((keep, True), (True, keep)):
            yield (r(x.shape[0], params[-1].shape[0], dtype=dtype, layout=layouts.permuted), x,
                   r(x.shape[0], kept, dtype=dtype), params, activation, residual, *needs)


def wide_mlp_samples():
    for sizes, dtype in (((5, 33, 4), torch.float32), ((3, 8, 6, 2), torch.float64), ((4, 2), torch.float32)):
        weights = [r(b, a, dtype=dtype, layout=layouts.transposed) for a, b in zip(sizes, sizes[1:], strict=False)]
        for batch in (7, 0):
            for activation, keep in ((1, True), (2, True), (2, False)):
                yield (r(batch, sizes[0], dtype=dtype, layout=layouts.padded), weights,
                       [r(size, dtype=dtype) for size in sizes[1:]], activation, keep)


def wide_mlp_backward_samples():
    for x, weights, biases, activation, _ in wide_mlp_samples():
        kept = [r(len(x), w.shape[0], dtype=x.dtype) for w in weights[:-1] for _ in range(activation)]
        for needs in ((True, True), (True, False), (False, True)):
            for by_hidden in ([], [r(*h.shape, dtype=x.dtype, layout=layouts.permuted) for h in kept[::activation]]):
                yield r(len(x), len(biases[-1]), dtype=x.dtype), by_hidden, x, weights, kept, activation, *needs


def flow_samples():
    for batch, features, context, dtype in ((3, 4, None, torch.float32), (70, 5, 2, torch.float64), (0, 2, None,
                                                                                                 torch.float32)):
        code, constants, params = [0] * 6, [], [r(features, dtype=dtype), r(features, dtype=dtype)]
        for flip, kind in ((0, EXP), (1, TANH)):
            active = features // 2 if flip else features - features // 2
            code += [1, 2, flip, flip, flip * INTERLEAVED, kind[0]]
            constants += kind[1:]
            params += [r(6, features - active + (context or 0), dtype=dtype, layout=layouts.transposed),
                       r(6, dtype=dtype), r(2 * active, 6, dtype=dtype), r(2 * active, dtype=dtype)]
        beside = None if context is None else r(batch, context, dtype=dtype, layout=layouts.padded)
        yield batch, features, dtype, beside, params, code, constants


def flow_forward_samples():
    for batch, features, dtype, *rest in flow_samples():
        for inverse, save in ((False, 2), (True, 0), (True, 1)):
            yield r(batch, features, dtype=dtype, layout=layouts.permuted), *rest, inverse, save


def flow_backward_samples():
    for batch, features, dtype, context, *rest in flow_samples():
        saved = r(2 * features, batch, dtype=dtype)
        for needs in ((True, True, True), (False, False, True), (True, False, False)):
            yield r(batch, features, dtype=dtype, layout=layouts.permuted), r(batch, dtype=dtype), \
                r(batch, features, dtype=dtype), saved, context, *rest, needs[0], *needs
        yield None, r(1, dtype=dtype).expand(batch), r(batch, features, dtype=dtype), saved, context, *rest, False, \
            True, True, True


# Kind, inverse, bound, the three minima, gain, clamp, end derivative.
RQ, SOFT = (0, False, 3.0, 1e-3, 1e-3, 1e-3, 1.0, 0.0, 1.0), (0, True, 5.0, 0.0, 0.0, 0.0, 1.0, 6.9, 0.999)
LINEAR = (1, False, 1.0, 0.0, 1e-3, 1e-3, 0.5, 0.0, 1.0)


def spline_samples():
    for shape in ((3, 4), (2, 3, 4, 5), (0, 4, 2), (2, 0, 3)):
        params = (shape[0], 5 * shape[1], *shape[2:])  # two rational-quadratic bins, or five linear ones
        for layout in (layouts.contiguous, layouts.channels_last, layouts.padded):
            yield r(*shape, layout=layout), r(*params, layout=layout), r(shape[0]), *RQ
        yield r(*shape, dtype=torch.bfloat16), r(*params), None, *SOFT
        yield r(*shape, dtype=torch.float64), r(*params, dtype=torch.float64), None, *LINEAR


def spline_backward_samples():
    for x, params, _, *constants in spline_samples():
        y = torch.randn_like(x)
        yield y, r(x.shape[0]), x, params, True, True, *constants
        yield y, None, x, params, True, False, *constants
        yield None, r(x.shape[0]), x, params, False, True, *constants


def bernoulli_samples():
    for shape, repeats in (((3, 5), 2), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), 3), ((0, 4), 1), ((2, 0), 2), ((4,), 3)):
        for layout in (layouts.contiguous, layouts.channels_last, layouts.padded):
            yield r(*shape, layout=layout), r(repeats * shape[0], *shape[1:], layout=layout)
    yield r(3, 5, dtype=torch.bfloat16), r(6, 5)
    yield r(3, 5, dtype=torch.float64), r(3, 5, dtype=torch.float64)


def bernoulli_backward_samples():
    for x, logits in bernoulli_samples():
        yield r(logits.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32), x, logits


def top_down_samples():
    """(h, features, parameters, levels, noise) of a ladder's level with a residual merge and a residual level."""
    sizes = ((5, 4), (4, 6), (6, 4), (7, 5), (5, 2), (8, 2), (6, 4))  # in and out of each linear
    code = [2, 4, 1, 1, 0, 2, 1, 0, 1, 1, 1, 0, 4, 1, 1, 0, 1, 1, 0, 1, 1, 0]
    for batch, dtype in ((3, torch.float32), (70, torch.float64), (0, torch.float32)):
        params = [t for i, o in sizes for t in (r(o, i, dtype=dtype, layout=layouts.transposed), r(o, dtype=dtype))]
        yield (r(batch, 5, dtype=dtype), [r(batch, 4, dtype=dtype), r(batch, 3, dtype=dtype, layout=layouts.padded)],
               params, code, [r(batch, 2, dtype=dtype), r(batch, 1, dtype=dtype)])


def top_down_forward_samples():
    for h, features, params, code, eps in top_down_samples():
        yield h, features, eps, None, 0, 0, params, code, True
        yield h, features, [], None, 7, 3, params, code, False
        yield h, features, [], torch.tensor(5), 0, 0, params, code, True


def top_down_backward_samples():
    for h, features, params, code, _ in top_down_samples():
        batch, rows = len(h), 304  # csrc/cpu/top_down.cpp, Work: lines of the two blocks and of the last state
        saved = r((batch + 63) // 64 * 64 * rows, dtype=h.dtype)
        term = r(2, batch, dtype=h.dtype)
        for needs in ((True, True, True), (False, False, True), (True, True, False)):
            yield r(batch, 4, dtype=h.dtype), r(3 * batch, dtype=h.dtype), term, term, term, h, features, saved, \
                params, code, *needs
            yield None, None, term, None, None, h, features, saved, params, code, *needs


SAMPLES = {"affine_coupling_fwd": forward_samples, "affine_coupling_bwd": backward_samples,
           "slogdet_fwd": slogdet_samples, "plu_weight_fwd": plu_samples, "plu_weight_bwd": plu_backward_samples,
           "gaussian_fwd": gaussian_samples, "gaussian_bwd": gaussian_backward_samples, "philox4x32": philox_samples,
           "latent_head_fwd": head_samples, "latent_head_bwd": head_backward_samples,
           "conv_net_fwd": conv_net_samples, "conv_net_bwd": conv_net_backward_samples,
           "glow_step_fwd": glow_step_samples, "glow_step_bwd": glow_step_backward_samples,
           "activated_conv_fwd": activated_conv_samples, "activated_conv_bwd": activated_conv_backward_samples,
           "mlp_fwd": mlp_samples, "mlp_bwd": mlp_backward_samples,
           "wide_mlp_fwd": wide_mlp_samples, "wide_mlp_bwd": wide_mlp_backward_samples,
           "mlp_flow_fwd": flow_forward_samples, "mlp_flow_bwd": flow_backward_samples,
           "spline_fwd": spline_samples, "spline_bwd": spline_backward_samples,
           "bernoulli_log_prob_fwd": bernoulli_samples, "bernoulli_log_prob_bwd": bernoulli_backward_samples,
           "top_down_fwd": top_down_forward_samples, "top_down_bwd": top_down_backward_samples}


def move(sample, device):
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), sample)


def compiled_operator(fused, name):
    lacking = {"cpu": (), "triton": (*extension.CPU_ALONE, *extension.WITHOUT_TRITON),
               "cuda": (*extension.CPU_ALONE, *extension.WITHOUT_CUDA)}[fused]
    if name in lacking:
        pytest.skip(f"{name} has no {fused} kernel")
    return extension.load(fused)[name]


def samples(name, backend):
    """What the backend takes of SAMPLES[name]."""
    for sample in SAMPLES[name]():
        size = sample[0].shape[-1] if name == "slogdet_fwd" else 0
        if not (size and no_kernel(backend, "slogdet", size)):
            yield sample


def test_every_operator_is_checked():
    assert set(SAMPLES) == set(extension.NAMES) and all(inspect.isgeneratorfunction(s) for s in SAMPLES.values())


@pytest.mark.parametrize("share", rest_slow(range(3), [0]))
@pytest.mark.parametrize("name", SAMPLES)
def test_schema_and_fake(name, share, fused, device):
    """Every sample, a third in each test; the slow tracing check on some of them."""
    for i, sample in itertools.islice(enumerate(samples(name, fused)), share, None, 3):
        checks = CHECKS if i % 7 == 0 else CHECKS[:2]
        torch.library.opcheck(compiled_operator(fused, name), move(sample, device), test_utils=checks)


@pytest.mark.parametrize("name", SAMPLES)
def test_fake_strides_dtypes_and_no_aliasing(name, fused, device):
    """What torch.compile plans by: exact sizes, strides and dtypes of every result, checked here because opcheck of
    some torch versions skips strides on the CPU; and no result shares memory with an operand."""
    op = compiled_operator(fused, name)
    mode = torch._subclasses.FakeTensorMode()
    for sample in samples(name, fused):
        sample = move(sample, device)
        real = op(*sample)
        with mode:
            fake = op(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, sample))
        pairs = zip(pytree.tree_leaves(real), pytree.tree_leaves(fake), strict=True)
        operands = {a.untyped_storage().data_ptr() for a in pytree.tree_leaves(sample)
                    if isinstance(a, torch.Tensor) and a.numel()}
        for i, (got, planned) in enumerate(pairs):
            assert got.shape == planned.shape and got.dtype == planned.dtype, (name, i)
            assert got.numel() == 0 or got.stride() == planned.stride(), (name, i, got.stride(), planned.stride())
            assert got.numel() == 0 or got.untyped_storage().data_ptr() not in operands


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_take_meta_tensors(name, fused):
    for sample in SAMPLES[name]():
        if any(isinstance(a, torch.Tensor) and a.numel() == 0 for a in sample):
            continue
        real = compiled_operator(fused, name)(*move(sample, "cuda" if fused != "cpu" else "cpu"))
        meta = compiled_operator(fused, name)(*move(sample, "meta"))
        for got, planned in zip(pytree.tree_leaves(real), pytree.tree_leaves(meta), strict=True):
            assert planned.is_meta and got.shape == planned.shape and got.dtype == planned.dtype
        break
