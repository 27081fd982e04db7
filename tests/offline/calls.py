"""Calls of every launcher, as data: {name: (function without arguments, widest access expected in bytes)}.

The tensors are small and on the CPU; only their dtypes, strides and alignment matter, since nothing runs.
"""

import itertools
from unittest import mock

import torch
from fastflow.kernels import affine_coupling, conv_net, gaussian, layout, plu_weight, slogdet, spline

KINDS = ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive")
SPLINES = ("rq", "linear")
SCALES = ("logvar", "logstd", "std", "softplus", "soft_tanh")
DTYPES = {"f32": (torch.float32,) * 2, "bf16": (torch.bfloat16,) * 2, "f16": (torch.float16,) * 2,
          "f64": (torch.float64,) * 2, "f32_bf16": (torch.float32, torch.bfloat16),
          "bf16_f32": (torch.bfloat16, torch.float32)}
MATRIX_SIZES = (1, 3, 8, 12, 24, 32)
SHIFT_FIRST, INVERSE = 4, 8


def scale_map(kind, bounded=False):
    """The scalars of a ScaleMap: plain, or with every constant in use."""
    if bounded:
        return KINDS.index(kind), 0.7, 0.2, 1.3, 1.5, 0.1, 0.5, 2.0, 0.5
    return KINDS.index(kind), 1.0, 0.0, 1.0, 1.0, 0.0, -float("inf"), float("inf"), 1.0


def affine_calls(kind, dtypes, flags=0, bounded=False):
    """Forward and backward, packed and contiguous."""
    x_dtype, params_dtype = DTYPES[dtypes]
    x = torch.zeros(4, 8, 16, 16, dtype=x_dtype)
    params = torch.zeros(4, 8 if kind == "additive" else 16, 16, 16, dtype=params_dtype)
    grad = torch.zeros(4, 8, 16, 16, dtype=torch.float32 if torch.float32 in DTYPES[dtypes] else x_dtype)
    total = torch.zeros(4, dtype=torch.float64 if x_dtype == torch.float64 else torch.float32)
    constants = scale_map(kind, bounded)
    name = f"{kind}{'_bounded' if bounded else ''}-{dtypes}-{flags}"
    return {
        f"affine_fwd-{name}": lambda: affine_coupling.affine_coupling_fwd(
            x, params, None, None, None, 0, flags, *constants),
        f"affine_bwd-{name}": lambda: affine_coupling.affine_coupling_bwd(
            grad, total, x, params, None, 0, True, True, False, flags, *constants)}


def gaussian_calls(scale, dtypes, prior):
    """Forward and backward with noise from a seed on the device; the prior one that the batch shares."""
    dtype, _ = DTYPES[dtypes]
    params = torch.zeros(4, 8, 16, 16, dtype=dtype)
    shared = (torch.zeros(1, 4, 16, 16, dtype=dtype),) * 2 if prior else (None, None)
    total = torch.zeros(4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    grad = torch.zeros(4, 4, 16, 16, dtype=dtype)
    index = SCALES.index(scale)
    name = f"{scale}-{dtypes}{'-prior' if prior else ''}"
    seed = torch.tensor(1)
    return {
        f"gaussian_fwd-{name}": lambda: gaussian.gaussian_fwd(
            params, None, *shared, None, seed, 0, 0, None, index, 0, 0, prior, False),
        f"gaussian_bwd-{name}": lambda: gaussian.gaussian_bwd(
            grad, total, total if prior else None, params, None, *shared, None, seed, 0, 0, None, index, 0, 0,
            True, False, prior, prior)}


def spline_calls(kind, bins, dtypes, inverse=False, soft=False, shape=(4, 8, 16, 16)):
    """Forward and backward, contiguous: the parameters of neighbouring positions side by side, or with a shape (B, C)
    those of one element."""
    x_dtype, params_dtype = DTYPES[dtypes]
    per_element = 3 * bins - 1 if kind == "rq" else bins
    x, params = torch.zeros(shape, dtype=x_dtype), torch.zeros(shape[0], per_element * shape[1], *shape[2:],
                                                               dtype=params_dtype)
    grad = torch.zeros(shape, dtype=torch.float32 if torch.float32 in DTYPES[dtypes] else x_dtype)
    total = torch.zeros(shape[0], dtype=torch.float64 if x_dtype == torch.float64 else torch.float32)
    constants = (SPLINES.index(kind), inverse, 3.0, 1e-3, 1e-3, 1e-3, 0.5 if soft else 1.0, 6.9 if soft else 0.0,
                 0.999 if soft else 1.0)
    name = f"{kind}_{bins}{'_inverse' * inverse}{'_soft' * soft}{'_rows' * (len(shape) == 2)}-{dtypes}"
    return {f"spline_fwd-{name}": lambda: spline.spline_fwd(x, params, total, *constants),
            f"spline_bwd-{name}": lambda: spline.spline_bwd(grad, total, x, params, True, True, *constants)}


def special_calls():
    """Layouts and sizes that take another path: several programs a sample, small rows, channels last, K samples."""
    constants = scale_map("sigmoid")
    large, large_params = torch.zeros(2, 40000), torch.zeros(2, 80000)
    image = torch.zeros(4, 16, 8, 8).to(memory_format=torch.channels_last)
    small = torch.zeros(600, 4)
    samples, prior = torch.zeros(3, 600, 2), torch.zeros(1, 2)
    latent = torch.zeros(2, 8, 64, 64)

    words = torch.zeros(8, 4, dtype=torch.int64)

    def forward(x, params, passive=None, kept=0):
        carried = torch.zeros(x.shape[0])
        return lambda: affine_coupling.affine_coupling_fwd(x, params, None, carried, passive, kept, 0, *constants)

    def backward(x, params, kept, grad=True):
        total = torch.zeros(x.shape[0])
        return lambda: affine_coupling.affine_coupling_bwd(x if grad else None, total, x, params, None, kept, True,
                                                           True, False, 0, *constants)

    return {
        "affine_fwd-two_stages": forward(large, large_params),
        "affine_fwd-channels_last_passive": forward(image[:, 8:], image, image[:, :8]),
        "affine_fwd-kept": forward(image, image, kept=8),
        "affine_bwd-kept": backward(image, image, -8),
        "affine_bwd-kept_of_logdet": backward(large, large, 20000, grad=False),
        "affine_fwd-small_rows": forward(small[:, :2], small),
        "gaussian_fwd-K_samples_odd": lambda: gaussian.gaussian_fwd(
            torch.zeros(4, 14), None, None, None, None, None, 3, 0, 3, 0, 0, 0, True, True),
        "gaussian_fwd-channel": lambda: gaussian.gaussian_fwd(
            latent, None, None, None, None, None, 3, 0, 2, 0, 0, 1, True, False),
        "gaussian_bwd-K_samples_large_batch": lambda: gaussian.gaussian_bwd(
            samples, torch.zeros(600), None, small, None, prior, prior, None, None, 3, 0, 3, 0, 0, 0,
            True, False, True, True),
        "philox4x32": lambda: gaussian.philox4x32(words, words[:, :2])}


def matrix_calls(size, dtype):
    weight = torch.eye(size, dtype=dtype).repeat(4, 1, 1)
    calls = {f"slogdet-{size}-{dtype}-{inverse}": lambda inverse=inverse: slogdet.slogdet_fwd(weight, inverse)
             for inverse in (False, True)}
    if dtype in (torch.float32, torch.float64) and size == 24:
        operands = weight, weight, weight[:, 0], weight[:, 0], torch.arange(size).repeat(4, 1)
        calls |= {f"plu_fwd-{dtype}": lambda: plu_weight.plu_weight_fwd(*operands),
                  f"plu_bwd-{dtype}": lambda: plu_weight.plu_weight_bwd(weight, *operands)}
    return calls


def conv_net_calls(dtypes, level=0, channels_last=True, tf32=True, hidden=512):
    """Forward and backward of Glow's conditioner as at a level of the model for CIFAR-10, batch 64. x and the
    parameters have dtypes of their own."""
    x_dtype, dtype = DTYPES[dtypes]
    batch, side, inner = 64, 16 >> level, 6 << level

    def zeros(*shape, dtype=dtype):
        t = torch.zeros(shape, dtype=dtype)
        return t.contiguous(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else t

    def in_precision(call):
        with mock.patch.object(layout, "convolutions_in_tf32", lambda: tf32):
            call()

    x, grad = (zeros(batch, c, side, side, dtype=x_dtype) for c in (inner, 2 * inner))
    w1, w2, w3 = zeros(hidden, inner, 3, 3), zeros(hidden, hidden, 1, 1), zeros(2 * inner, hidden, 3, 3)
    maps = conv_net._map(x, batch * side * side, hidden, conv_net._turns(x))
    name = f"{dtypes}-{level}{'' if channels_last else '-contiguous'}{'' if tf32 else '-ieee'}-{hidden}"
    return {
        f"conv_net_fwd-{name}": lambda: in_precision(lambda: conv_net.conv_net_fwd(
            x, w1, zeros(hidden), w2, zeros(hidden), w3, zeros(2 * inner), 0.0, True)),
        f"conv_net_bwd-{name}": lambda: in_precision(lambda: conv_net.conv_net_bwd(
            grad, x, w1, w2, w3, maps, maps, 0.0, True, True))}


def wide_calls():
    """Calls whose tensors are contiguous and aligned, so that every big access must be 16 bytes wide."""
    calls = {}
    for dtypes in ("f32", "bf16", "f64"):
        calls |= affine_calls("sigmoid", dtypes) | gaussian_calls("logvar", dtypes, True)
    return calls | spline_calls("rq", 8, "f32")


def quick_calls():
    """Every kernel, map, scale and dtype at least once."""
    calls = special_calls() | wide_calls()
    for kind in KINDS:
        calls |= affine_calls(kind, "f32", INVERSE)
    calls |= affine_calls("tanh", "f32_bf16", SHIFT_FIRST, bounded=True)
    calls |= affine_calls("softplus", "bf16_f32", SHIFT_FIRST | INVERSE, bounded=True)
    calls |= affine_calls("exp", "f16")
    calls |= spline_calls("rq", 16, "f64", inverse=True, soft=True, shape=(64, 48))
    calls |= spline_calls("linear", 8, "bf16_f32", shape=(600, 1))
    for scale in SCALES:
        calls |= gaussian_calls(scale, "f32", scale == "softplus")
    calls |= conv_net_calls("f32") | conv_net_calls("bf16_f32", 1) | conv_net_calls("f64", 1, False, hidden=128)
    calls |= conv_net_calls("f32", 1, tf32=False, hidden=130)
    calls |= matrix_calls(3, torch.float32) | matrix_calls(24, torch.float32) | matrix_calls(32, torch.float64)
    return calls


def all_calls():
    """Every kernel x map or scale x direction x dtype combination."""
    calls = quick_calls()
    for dtypes in DTYPES:
        for kind in KINDS:
            for flags in (0, SHIFT_FIRST, INVERSE, SHIFT_FIRST | INVERSE):
                calls |= affine_calls(kind, dtypes, flags)
            calls |= affine_calls(kind, dtypes, 0, bounded=True)
        calls |= spline_calls("rq", 8, dtypes) | spline_calls("rq", 16, dtypes, inverse=True, shape=(64, 48))
        calls |= spline_calls("rq", 8, dtypes, inverse=True, soft=True) | spline_calls("rq", 16, dtypes, soft=True)
        calls |= spline_calls("linear", 8, dtypes, inverse=True, shape=(64, 48))
        for scale in SCALES:
            for prior in (False, True):
                calls |= gaussian_calls(scale, dtypes, prior)
    for dtypes, level, channels_last, hidden in itertools.product(("f32", "bf16", "bf16_f32", "f16"), range(3),
                                                                  (True, False), (128, 200, 512)):
        calls |= conv_net_calls(dtypes, level, channels_last, hidden=hidden)
    for size in MATRIX_SIZES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            calls |= matrix_calls(size, dtype)
    return calls
