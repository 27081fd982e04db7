"""The Gaussian kernels, called directly, against the reference and its float64 autograd."""

import math

import layouts
import pytest
import torch
from fastflow.kernels import gaussian as kernels
from fastflow.kernels import gaussian_backward
from tolerances import GRADIENT_FACTOR, assert_bitwise, assert_by_ratio

from fastflow import reference
from fastflow.reference import SCALES

REDUCTIONS = ("sample", "channel", "none")


def randn(*shape, dtype=torch.float32, positive=False):
    value = torch.randn(shape, dtype=torch.float64)
    return (value.abs() + 0.4 if positive else value).to(dtype)


def call(params, raw=None, prior=None, *, scale="logvar", layout="chunk", order="mean_scale", eps=None, seed=None,
         offset=0, n_samples=None, reduce="sample", save_eps=False, grads=None, needs=(True,) * 4):
    """((z, kl, logq, drawn), gradients of params, raw, prior mean, prior raw) by the kernels."""
    tensor = seed if isinstance(seed, torch.Tensor) else None
    consts = (0 if seed is None or tensor is not None else seed, offset, n_samples, SCALES.index(scale),
              (layout == "interleave") + 2 * (order == "scale_mean"), REDUCTIONS.index(reduce))
    operands = (params, raw, *(prior or (None, None)), eps, tensor)
    results = kernels.gaussian_fwd(*operands, *consts, True, save_eps)
    if grads is None:
        return results, ()
    needs = [need and t is not None for need, t in zip(needs, operands, strict=False)]
    return results, kernels.gaussian_bwd(*grads, *operands, *consts, *needs)


def expected(params, raw, prior, eps, grads, dtype, **options):
    operands = [t if t is None else t.to(dtype or t.dtype) for t in (params, raw, *(prior or (None, None)))]
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands]
    results = reference.gaussian_sample_kl(
        leaves[0] if raw is None else tuple(leaves[:2]), prior=None if prior is None else tuple(leaves[2:]),
        eps=eps if dtype is None else eps.to(dtype), return_logq=True, **options)
    through = [(o, g.to(o.dtype)) for o, g in zip(results, grads, strict=True) if g is not None]
    used = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([o for o, _ in through], used, [g for _, g in through], allow_unused=True))
    return [o.detach() for o in results], [None if t is None else next(found) for t in leaves]


def check(params, raw=None, prior=None, *, seed=None, offset=0, eps=None, **options):
    """Values and gradients by the error-ratio rule; noise from a seed is first held against the reference's."""
    k = options.get("n_samples")
    mean_shape = (params.shape[0], params.shape[1] // (2 if raw is None else 1), *params.shape[2:])
    shape = mean_shape if k is None else (k, *mean_shape)
    results, _ = call(params, raw, prior, seed=seed, offset=offset, eps=eps, save_eps=True, **options)
    noise = eps
    if eps is None:
        noise = results[3]
        drawn = reference.philox_normal(shape, seed, offset, batch_dim=0 if k is None else 1)
        assert noise.shape == shape
        assert not noise.numel() or (noise - drawn).abs().max() < 1e-6
    grads = [torch.randn(t.shape, dtype=torch.float64).to(t.dtype) for t in results[:3]]
    _, found = call(params, raw, prior, seed=seed, offset=offset, eps=eps, grads=grads, **options)
    eager, eager_grads = expected(params, raw, prior, noise, grads, None, **options)
    truth, true_grads = expected(params, raw, prior, noise, grads, torch.float64, **options)
    eager[0] = eager[0].to(results[0].dtype)  # drawn noise is float32 and does not widen z
    for name, out, near, exact in zip(("z", "kl", "logq"), results, eager, truth, strict=False):
        terms = 0.0 if name == "z" else math.sqrt(params.numel() / max(out.numel(), 1))
        assert_by_ratio(out, near, exact, magnitude=terms, what=f"{options} {name}")
        assert out.is_contiguous()
    for name, out, near, exact in zip(("params", "raw", "prior_mean", "prior_raw"), found, eager_grads, true_grads,
                                      strict=True):
        if near is not None:
            # One element with a large exp() decides the maximum: allow it a few roundings.
            few = 4.0 * exact.abs().max().item() if exact.numel() else 0.0
            assert_by_ratio(out, near, exact, factor=GRADIENT_FACTOR, magnitude=few, what=f"{options} {name}")
    return results, found


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("n_samples", [None, 3])
def test_every_scale_and_reduction(scale, reduce, n_samples):
    positive = scale == "std"
    options = {"scale": scale, "reduce": reduce, "n_samples": n_samples}
    check(randn(3, 8, 2, 6, positive=positive), seed=-12345678901, **options)
    prior = randn(1, 3, 7, positive=positive), randn(1, 3, 7, positive=positive)
    check(randn(4, 6, 7, positive=positive), None, prior, layout="interleave", order="scale_mean", offset=2**33 + 1,
          seed=torch.arange(8)[::2] * 10**12 + 5, **options)


@pytest.mark.parametrize("scale", SCALES)
def test_float64_and_priors_of_their_own(scale):
    def operand(*shape):
        return randn(*shape, dtype=torch.float64, positive=scale == "std")

    check(operand(3, 4), operand(3, 4), (operand(3, 4), operand(3, 4)), seed=torch.tensor(2**62 + 3), scale=scale)
    check(operand(3, 8), None, (operand(1, 4), operand(3, 4)), eps=operand(2, 3, 4), n_samples=2, scale=scale)


@pytest.mark.parametrize("dtype, raw_dtype", [(torch.bfloat16,) * 2, (torch.float16,) * 2,
                                              (torch.bfloat16, torch.float32)])
def test_low_precision(dtype, raw_dtype):
    check(randn(2, 4, 4, dtype=dtype), randn(2, 4, 4, dtype=raw_dtype), (randn(1, 4, 4, dtype=dtype),) * 2, seed=3)


@pytest.mark.parametrize("make", layouts.ALL, ids=layouts.by_name)
def test_layouts(make):
    options = {"n_samples": 2, "reduce": "channel", "scale": "softplus"}
    check(make(randn(3, 4, 2, 4)), make(randn(3, 4, 2, 4)), (make(randn(3, 4, 2, 4)), make(randn(1, 4, 2, 4))),
          eps=make(randn(2, 3, 4, 2, 4)), **options)


@pytest.mark.parametrize("make", layouts.ALL, ids=layouts.by_name)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_incoming_gradients_of_any_strides(make, reduce):
    params = randn(3, 8, 4)
    results, _ = call(params, seed=1, reduce=reduce)
    grads = [make(randn(*t.shape)) if t.dim() > 1 else randn(2 * t.numel())[::2] for t in results[:3]]
    _, dense = call(params, seed=1, reduce=reduce, grads=[g.contiguous() for g in grads])
    _, strided = call(params, seed=1, reduce=reduce, grads=grads)
    assert_bitwise(strided[0], dense[0])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 3), (2, 4, 0), (3, 2), (5, 14)])
@pytest.mark.parametrize("n_samples", [None, 0, 2])
def test_zero_and_odd_sizes(shape, n_samples):
    prior = tuple(randn(1, shape[1] // 2, *shape[2:]) for _ in range(2))
    check(randn(*shape), None, prior, seed=7, n_samples=n_samples)


@pytest.mark.parametrize("reduce, expected_sums", [("sample", 2), ("channel", 2), ("none", 1)])
def test_large_samples_share_their_sums(launches, monkeypatch, reduce, expected_sums):
    for name, small in (("ONE_PROGRAM", 256), ("CHUNK", 128), ("LARGEST_TILE", 128)):
        monkeypatch.setattr(kernels, name, small)
    params = randn(2, 4, 15, 20)
    results, _ = call(params, seed=1, reduce=reduce)
    assert launches == ["gaussian_fwd_kernel"] + ["row_sums_kernel"] * expected_sums
    exact = reference.gaussian_sample_kl(params.double(), seed=1, reduce=reduce, return_logq=True)
    for out, truth in zip(results[1:3], exact[1:], strict=True):
        assert (out.double() - truth).abs().max() <= 2e-6 * truth.abs().max()


def test_a_prior_that_a_large_batch_shares(launches, monkeypatch):
    monkeypatch.setattr(gaussian_backward, "PRIOR_ROWS", 32)
    params, prior = randn(80, 6), (randn(1, 3), randn(1, 3))
    grads = [randn(80, 3), randn(80), randn(80)]
    _, found = call(params, None, prior, seed=4, eps=None, grads=grads)
    assert launches[-3:] == ["gaussian_bwd_kernel", "shared_prior_bwd_kernel", "column_sums_kernel"]
    noise = reference.philox_normal((80, 3), 4)
    eager, truth = (expected(params, None, prior, noise, grads, dtype)[1] for dtype in (None, torch.float64))
    for out, near, exact in zip(found[2:], eager[2:], truth[2:], strict=True):
        assert_by_ratio(out, near, exact, factor=GRADIENT_FACTOR, magnitude=math.sqrt(80))


def test_missing_gradients_and_needs():
    params, prior = randn(2, 8), (randn(1, 4), randn(2, 4))
    _, full = call(params, None, prior, seed=1, grads=[None, randn(2), None])
    _, none = call(params, None, prior, seed=1, grads=[randn(2, 4), None, None])
    assert full[1].shape == (0,) and not none[2].any() and not none[3].any()
    assert none[0].abs().min() > 0
    _, some = call(params, None, prior, seed=1, grads=[randn(2, 4), randn(2), None], needs=(False, False, True, False))
    assert [g.numel() for g in some] == [0, 0, 4, 0]


def test_the_stream_does_not_depend_on_tiles_dtype_or_layout(monkeypatch):
    params = randn(2, 8, 4, 8)
    expected_results, _ = call(params, seed=9, n_samples=2, save_eps=True)
    monkeypatch.setattr(kernels, "LARGEST_TILE", 64)
    tiled, _ = call(params, seed=9, n_samples=2, save_eps=True)
    assert_bitwise(tiled[0], expected_results[0])
    assert_bitwise(tiled[3], expected_results[3])
    torch.testing.assert_close(tiled[1], expected_results[1], rtol=1e-6, atol=0.0)
    last = params.to(memory_format=torch.channels_last)
    assert_bitwise(call(last, seed=9, n_samples=2, save_eps=True)[0][3], expected_results[3])
    double, _ = call(params.double(), seed=9, n_samples=2, save_eps=True)
    assert_bitwise(double[3].float(), expected_results[3])
    first, _ = call(params, seed=9, n_samples=1, save_eps=True)
    assert_bitwise(first[3][0], expected_results[3][0])
