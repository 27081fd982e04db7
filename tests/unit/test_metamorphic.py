"""Relations that hold whatever the numbers: concatenation, permutation, inversion, composition."""

import pytest
import torch
from cases import AFFINE_CASES, CASES, GAUSSIAN_CASES, Case, evaluate
from tolerances import assert_bitwise

from fastflow.functional import affine_coupling, gaussian_sample_kl

KINDS = ("exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive")
independent = pytest.mark.parametrize("case", [c for c in CASES if c.options.get("seed") is None], ids=str)


def batch_first(case, results):
    """Results with the batch leading, K samples behind it."""
    return {name: t.transpose(0, 1) if case.options.get("n_samples") and name in ("z", "logq") else t
            for name, t in results.items()}


def parts(case, tensors, index):
    """The operands of the samples in ``index``; what broadcasts along the batch stays."""
    out = {}
    for name, t in tensors.items():
        dim = case.batch_dim(name)
        out[name] = t if dim is None or t.shape[dim] == 1 else t.index_select(dim, index)
    return out


@independent
@pytest.mark.parametrize("batch", [5, 33])
def test_a_batch_is_its_samples(case, batch, backend, device):
    """f(cat(a, b)) = cat(f(a), f(b)), f(permuted) = permuted f, in values and gradients, for odd cuts of the batch."""
    tensors = case.tensors(torch.float64, device, batch=batch)
    whole = batch_first(case, evaluate(case, tensors)[0])
    order = torch.randperm(batch, device=device)
    for index in (torch.arange(2, device=device), torch.arange(2, batch, device=device), order):
        some = batch_first(case, evaluate(case, parts(case, tensors, index))[0])
        for name, t in some.items():
            torch.testing.assert_close(t, whole[name][index], rtol=1e-13, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", AFFINE_CASES, ids=str)
def test_channels_are_independent_given_their_params(case, backend, device):
    """A permutation of the channels (of x, raw and shift alike) permutes y and leaves the log-det."""
    shape = case.shapes["x"]
    scale = case.options.get("scale", "exp")
    if scale == "additive":
        return pytest.skip("additive has no raw scale")
    x, raw, shift = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(3))
    order = torch.randperm(shape[1], device=device)
    options = {"scale": scale, "inverse": case.options.get("inverse", False)}
    y, logdet = affine_coupling(x, (raw, shift), **options)
    permuted, same = affine_coupling(x[:, order], (raw[:, order], shift[:, order]), **options)
    torch.testing.assert_close(permuted, y[:, order], rtol=1e-14, atol=0)
    torch.testing.assert_close(same, logdet, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shift_first", [False, True])
@pytest.mark.parametrize("scale", KINDS)
def test_inverse_of_forward_and_forward_of_inverse(scale, shift_first, backend, device):
    """In float64 to 1e-11, in float32 to the conditioning of one layer; the carried log-det returns to where it
    began."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-5)):
        channels = 6 if scale == "additive" else 12
        x, params, carried = (torch.randn(s, dtype=torch.float64).to(device, dtype)
                              for s in ((17, 6, 3), (17, channels, 3), (17,)))
        options = {"scale": scale, "shift_first": shift_first}
        for inverse in (False, True):
            y, there = affine_coupling(x, params, inverse=inverse, logdet=carried, **options)
            back, again = affine_coupling(y, params, inverse=not inverse, logdet=there, **options)
            torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(again, carried, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", KINDS[:-1])
def test_packings_are_one_operation(scale, backend, device):
    """Chunked, interleaved, either order and the pair give the same numbers and the same gradients."""
    x, raw, shift = (torch.randn(3, 4, 5, dtype=torch.float64, device=device) for _ in range(3))
    packings = {
        ("chunk", "scale_shift"): torch.cat([raw, shift], 1), ("chunk", "shift_scale"): torch.cat([shift, raw], 1),
        ("interleave", "scale_shift"): torch.stack([raw, shift], 2).flatten(1, 2),
        ("interleave", "shift_scale"): torch.stack([shift, raw], 2).flatten(1, 2)}
    want = affine_coupling(x, (raw, shift), scale=scale)
    for (layout, order), params in packings.items():
        results = affine_coupling(x, params, scale=scale, layout=layout, order=order)
        for got, expected in zip(results, want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_two_couplings_add_their_log_dets(backend, device):
    x, first, second = (torch.randn(s, dtype=torch.float64, device=device) for s in ((4, 6), (4, 12), (4, 12)))
    y, one = affine_coupling(x, first)
    z, both = affine_coupling(y, second, logdet=one)
    z_alone, two = affine_coupling(y, second)
    assert_bitwise(z, z_alone)
    torch.testing.assert_close(both, one + two, rtol=1e-14, atol=1e-14)


def test_shift_first_is_a_shift_by_t_times_s(backend, device):
    x, raw, shift = (torch.randn(4, 6, dtype=torch.float64, device=device) for _ in range(3))
    y, _ = affine_coupling(x, (raw, shift), shift_first=True)
    other, _ = affine_coupling(x, (raw, shift * raw.exp()))
    torch.testing.assert_close(y, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", GAUSSIAN_CASES, ids=str)
def test_kl_to_itself_is_zero_and_shifts_with_both_means(case, backend, device):
    scale = case.options.get("scale", "logvar")
    mean = torch.randn(5, 7, dtype=torch.float64, device=device)
    raw = torch.rand(5, 7, dtype=torch.float64, device=device) + 0.1
    _, kl = gaussian_sample_kl((mean, raw), scale=scale, prior=(mean, raw), seed=1)
    assert_bitwise(kl, torch.zeros_like(kl))
    other = torch.rand(1, 7, dtype=torch.float64, device=device) + 0.1
    _, here = gaussian_sample_kl((mean, raw), scale=scale, prior=(mean[:1], other), seed=1)
    _, there = gaussian_sample_kl((mean + 2, raw), scale=scale, prior=(mean[:1] + 2, other), seed=1)
    torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


def test_noise_scales_the_sample(backend, device):
    """z - mean is linear in eps."""
    case = Case("eps", "gaussian_sample_kl", {"params": (4, 6, 5), "eps": (4, 3, 5)})
    t = case.tensors(torch.float64, device)
    mean = t["params"][:, :3]
    z, kl = case.call(t)
    doubled, same = case.call({**t, "eps": 2 * t["eps"]})
    torch.testing.assert_close(doubled - mean, 2 * (z - mean), rtol=1e-13, atol=1e-13)
    assert_bitwise(same, kl)
