"""gaussian_sample_kl: samples, KL and log q in every scale, packing, reduction and dtype, against torch.distributions
and the float64 truth."""

import itertools
import math

import numpy as np
import pytest
import range_checks
import torch
from cases import Case, check_by_ratio, cotangents_of
from torch.distributions import Normal, kl_divergence

from fastflow import reference
from fastflow.functional import gaussian_sample_kl
from fastflow.reference import SCALES

# sigma of raw, written apart from the library.
SIGMA = {
    "logvar": lambda r: torch.sqrt(torch.exp(r)),
    "logstd": torch.exp,
    "std": lambda r: r,
    "softplus": lambda r: torch.log(1 + torch.exp(r)) + 1e-4,
    "soft_tanh": lambda r: torch.exp(5 * torch.tanh(r / 5)),
}
by_scale = pytest.mark.parametrize("scale", SCALES)


def gaussian(scale, shape, dtype=torch.float64, device="cpu"):
    """Random (mean, raw) leaves."""
    mean, raw = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    raw = raw.abs() + 0.3 if scale == "std" else raw
    return [t.to(device, dtype).requires_grad_() for t in (mean, raw)]


@by_scale
@pytest.mark.parametrize("n_samples", [None, 3])
@pytest.mark.parametrize("with_prior", [False, True])
def test_against_torch_distributions(scale, n_samples, with_prior, backend, device):
    """Values and gradients of z, KL and log q from the definitions alone."""
    shape = (4, 3, 5)
    mean, raw = gaussian(scale, shape, device=device)
    prior = gaussian(scale, (1, *shape[1:]), device=device) if with_prior else None
    eps = torch.randn(shape if n_samples is None else (n_samples, *shape), dtype=torch.float64, device=device)
    z, kl, logq = gaussian_sample_kl((mean, raw), scale=scale, prior=prior, eps=eps, n_samples=n_samples,
                                     return_logq=True, reduce="none")
    q = Normal(mean, SIGMA[scale](raw), validate_args=False)
    p = Normal(prior[0], SIGMA[scale](prior[1])) if with_prior else Normal(torch.zeros_like(mean), 1.0)
    want_z, event = mean + q.scale * eps, 1 if n_samples is None else 2
    want = {"z": want_z, "kl": kl_divergence(q, p),
            # With eps held fixed, log q(z) depends on the parameters through sigma alone.
            "logq": (Normal(torch.zeros_like(eps), 1.0).log_prob(eps) - q.scale.log()).flatten(event).sum(-1)}
    sources = [mean, raw, *(prior or ())]
    for (name, expected), out in zip(want.items(), (z, kl, logq), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        cotangent = torch.randn_like(out)
        got, should = (torch.autograd.grad(t, sources, cotangent, allow_unused=True, retain_graph=True)
                       for t in (out, expected))
        for g, s in zip(got, should, strict=True):
            zeros = torch.zeros(())
            torch.testing.assert_close(zeros if g is None else g, torch.zeros_like(g) if s is None and g is not None
                                       else zeros if s is None else s, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(logq, q.log_prob(z).flatten(event).sum(-1), rtol=1e-9, atol=1e-9)


@by_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("reduce", "n_samples"), [("sample", None), ("channel", 2), ("none", None)])
def test_every_option_by_the_ratio_rule(scale, dtype, reduce, n_samples, fused, device):
    for (layout, order), prior in itertools.product(
            (("chunk", "mean_scale"), ("chunk", "scale_mean"), ("interleave", "scale_mean")), (0, 1, 3)):
        shapes = {"params": (3, 4, 7)}
        if prior:
            shapes |= {"prior_mean": (prior, 2, 7), "prior_raw": (prior, 2, 7)}
        case = Case(f"{layout} {order} {reduce} {n_samples} {prior}", "gaussian_sample_kl", shapes,
                    {"scale": scale, "layout": layout, "order": order, "reduce": reduce, "n_samples": n_samples,
                     "seed": 3, "return_logq": True})
        tensors = case.tensors(dtype, device)
        results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert results["z"].dtype == dtype and results["kl"].dtype == results["logq"].dtype == compute
        assert all(g.dtype == dtype for g in grads.values())


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 9), (2, 3, 4, 5), (2, 2, 3, 4, 5), (1, 1)], ids=str)
def test_ranks_and_reductions(shape, backend, device):
    mean, raw = gaussian("logvar", shape, torch.float32, device)
    each = gaussian_sample_kl((mean, raw), seed=1, reduce="none")[1]
    assert each.shape == shape
    channel = gaussian_sample_kl((mean, raw), seed=1, reduce="channel")[1]
    sample = gaussian_sample_kl((mean, raw), seed=1)[1]
    assert channel.shape == shape[:2] and sample.shape == shape[:1]
    torch.testing.assert_close(channel, each.flatten(2).sum(2) if len(shape) > 2 else each, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sample, each.flatten(1).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mean", "raw", "eps", "prior", "z"), [
    ("float32", "bfloat16", None, None, "float32"), ("bfloat16", "float32", None, None, "float32"),
    ("bfloat16", "float16", None, None, "bfloat16"), ("float16", "bfloat16", None, None, "float16"),
    ("bfloat16", "bfloat16", "float32", None, "float32"), ("bfloat16", "bfloat16", "bfloat16", "float32", "float32"),
    ("float16", "float16", "bfloat16", "bfloat16", "float16"), ("float64", "float64", "float64", "float64", "float64")])
def test_dtype_mixes(mean, raw, eps, prior, z, backend, device):
    kinds = {"mean": mean, "raw": raw, "eps": eps, "prior_mean": prior, "prior_raw": prior}
    shapes = {name: (1, 6) if name.startswith("prior") else (4, 6) for name, kind in kinds.items() if kind}
    case = Case("mix", "gaussian_sample_kl", shapes, {} if eps else {"seed": 2})
    tensors = {name: t.to(getattr(torch, kinds[name])) for name, t in case.tensors(torch.float64, device).items()}
    results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
    assert results["z"].dtype == getattr(torch, z)
    assert results["kl"].dtype == (torch.float64 if mean == "float64" else torch.float32)
    assert {name: g.dtype for name, g in grads.items()} == {name: tensors[name].dtype for name in case.differentiable}


def test_kl_does_not_depend_on_the_samples(backend, device):
    params = torch.randn(5, 8, 3, device=device)
    kls = [gaussian_sample_kl(params, seed=seed, n_samples=k)[1]
           for seed, k in ((1, None), (2, None), (1, 1), (3, 7), (4, 0))]
    assert all(torch.equal(kl, kls[0]) for kl in kls)


@pytest.mark.parametrize("batches", [(1, 6), (6, 1)])
def test_prior_halves_of_different_batch(batches, backend, device):
    """One of the prior's tensors shared by the batch, the other not: as if both were whole."""
    mean, raw = gaussian("logvar", (6, 3, 5), device=device)
    prior = [gaussian("logvar", (batch, 3, 5), device=device)[i] for i, batch in enumerate(batches)]
    whole = [t.detach().expand(6, 3, 5).clone().requires_grad_() for t in prior]
    results = [gaussian_sample_kl((mean, raw), prior=p, seed=1) for p in (prior, whole)]
    torch.testing.assert_close(results[0][1], results[1][1])
    got, want = (torch.autograd.grad(kl.sum(), [mean, raw, *p]) for (_, kl), p in zip(results, (prior, whole),
                                                                                     strict=True))
    want = [g if g.shape == w.shape else w.sum(0, keepdim=True) for g, w in zip(got, want, strict=True)]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_shared_half_precision_prior_gets_the_sum_of_exact_gradients(backend, device):
    """Near the optimum the rows' gradients cancel: rounded before they are added they would be some percent off."""
    mean, raw = (t.detach().bfloat16() for t in gaussian("logvar", (512, 1), device=device))
    best = (mean.double().square() + raw.double().exp()).mean().log()
    shared = best.reshape(1, 1).bfloat16().requires_grad_()
    z, kl = gaussian_sample_kl((mean, raw), prior=(torch.zeros_like(mean), shared), seed=1)
    (grad,) = torch.autograd.grad(kl.sum(), shared)
    exact = shared.detach().double().requires_grad_()
    truth = gaussian_sample_kl((mean.double(), raw.double()), prior=(torch.zeros_like(mean).double(), exact), seed=1)[1]
    assert z.dtype == grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), torch.autograd.grad(truth.sum(), exact)[0], rtol=5e-3, atol=0)


def test_seeds_of_numpy_and_both_kinds_of_noise(backend, device):
    params = torch.randn(2, 6, device=device)
    got, want = (gaussian_sample_kl(params, seed=seed)[0] for seed in (np.int64(-3), -3))
    assert torch.equal(got, want)
    for function in (gaussian_sample_kl, reference.gaussian_sample_kl):
        with pytest.raises(ValueError, match="^eps and seed"):
            function(params, eps=torch.zeros(2, 3, device=device), seed=1)


def test_given_noise_carries_no_gradient(backend, device):
    params, eps = torch.randn(3, 8, device=device), torch.randn(3, 4, device=device, requires_grad=True)
    z, kl = gaussian_sample_kl(params, eps=eps)
    assert not z.requires_grad and not kl.requires_grad


# lv, KL(N(0, e^lv) || N(0, 1)), and the relative error of expm1(lv) - lv in float32 as published measurements have it.
NEAR_ZERO = [(1e-1, 2.585459e-3, 1e-6), (1e-2, 2.508354e-5, 2.8e-5), (1e-3, 2.500834e-7, 1.4e-4),
             (1e-4, 2.500083e-9, 3.2e-4)]


@pytest.mark.parametrize(("lv", "true", "error"), NEAR_ZERO)
def test_kl_near_zero(lv, true, error, backend, device):
    """1 + lv - exp(lv) is off by 230% in float32 at lv = 1e-4 and negative below; this form is not."""
    for raw, scale in ((lv, "logvar"), (lv / 2, "logstd")):
        mean = torch.zeros(1, 1, device=device)
        kl = gaussian_sample_kl((mean, torch.full_like(mean, raw)), scale=scale, seed=1)[1].item()
        exact = 0.5 * (math.expm1(lv) - lv) if lv > 1e-3 else 0.25 * lv**2 * (1 + lv / 3)
        assert exact == pytest.approx(true, rel=1e-6)
        assert kl == pytest.approx(exact, rel=2 * error + 1e-6) and kl >= 0
    wide = gaussian_sample_kl((mean.double(), mean.double() + lv), seed=1)[1].item()
    assert wide == pytest.approx(exact, rel=1e-7)


@by_scale
def test_kl_is_not_negative_and_zero_only_at_the_prior(scale, backend, device):
    """200,000 Gaussians from far to very near the prior; all-zero parameters (in log scales) give exactly 0."""
    magnitude = torch.logspace(-8, 1, 200_000, device=device)[:, None]
    mean = torch.randn(200_000, 1, device=device) * magnitude
    raw = torch.randn(200_000, 1, device=device) * magnitude
    prior = None
    if scale in ("std", "softplus"):
        raw = raw + 1.0 if scale == "softplus" else (1.0 + raw).abs() + 1e-6
        prior = torch.zeros(1, 1, device=device), torch.ones(1, 1, device=device)
    kl = gaussian_sample_kl((mean, raw), scale=scale, prior=prior, seed=1)[1]
    # Eager's expm1(d) - d is off by a rounding of d, which at |d| < 1e-6 is more than d^2/2.
    assert kl.min() >= -1e-14 and torch.isfinite(kl).all()
    zeros = torch.zeros(3, 4, device=device)
    raw = torch.ones_like(zeros) if scale in ("std", "softplus") else zeros
    prior = None if scale != "softplus" else (zeros[:1], raw[:1])
    assert_zero = gaussian_sample_kl((zeros, raw), scale=scale, prior=prior, seed=1)[1]
    assert torch.equal(assert_zero, torch.zeros(3, device=device))


def test_kl_gradient_near_zero_has_no_cancellation(fused, device):
    """d KL / d lv = expm1(lv)/2, right to a rounding at lv = 1e-6, where (exp(lv) - 1)/2, as eager autograd has it, is
    off by 5%."""
    for lv in (1e-2, 1e-4, 1e-6, -1e-6, 1e-8):
        raw = torch.full((1, 1), lv, device=device, requires_grad=True)
        (grad,) = torch.autograd.grad(gaussian_sample_kl((torch.zeros_like(raw), raw), seed=1)[1].sum(), raw)
        assert grad.item() == pytest.approx(0.5 * math.expm1(raw.item()), rel=1e-6)


@by_scale
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigma_kl_and_their_gradients_over_the_whole_range(scale, dtype, fused, device):
    range_checks.check_gaussian(scale, dtype, device)


def test_long_sums(backend, device):
    """KL and log q over 65,536 elements per sample."""
    case = Case("long", "gaussian_sample_kl", {"mean": (2, 65536), "raw": (2, 65536)}, {"seed": 1, "return_logq": True})
    tensors = case.tensors(torch.float32, device)
    results, _ = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
    mean, raw = tensors["mean"].double(), tensors["raw"].double()
    truth = 0.5 * (mean**2 + torch.expm1(raw) - raw).sum(1)
    assert ((results["kl"].double() - truth).abs() / truth).max() < 5e-7
