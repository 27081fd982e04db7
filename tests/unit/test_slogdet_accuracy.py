"""The accuracy of slogdet beside torch.linalg's in the same dtype, from condition number 1e1 to 1e7."""

import pytest
import torch

from fastflow.functional import slogdet, slogdet_inverse

OP = "slogdet"
CONDITIONS = [1e1, 1e3, 1e5, 1e7]


def matrices(size, condition, dtype, device, count=50):
    """``count`` matrices U diag(1 .. 1/condition) V with random orthogonal U and V, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(size)
    u, v = (torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))[0] for _ in "uv")
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return (u * spectrum @ v).to(device, dtype)


def errors(function, w, truth):
    """Median over the matrices of |log|det| - truth| and of the largest relative error of the gradient."""
    leaf = w.detach().requires_grad_()
    value = function(leaf)[1]
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    value_truth, grad_truth = truth
    in_value = (value.detach().double() - value_truth).abs().median().item()
    scale = grad_truth.abs().amax((1, 2))
    in_grad = ((grad.double() - grad_truth).abs().amax((1, 2)) / scale).median().item()
    return in_value, in_grad, value_truth.abs().median().item()


def measure(size, condition, dtype, device):
    w = matrices(size, condition, dtype, device)
    wide = w.double()
    truth = torch.linalg.slogdet(wide)[1], torch.linalg.inv(wide).mT
    return (errors(slogdet, w, truth), errors(lambda t: slogdet_inverse(t)[:2], w, truth),
            errors(torch.linalg.slogdet, w, truth))


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: f"{c:g}")
@pytest.mark.parametrize("size", [3, 12, 24, 48, 64, 96, pytest.param(192, marks=pytest.mark.slow)])
def test_median_error_is_at_most_one_and_a_half_times_torch_s(size, condition, backend, device):
    """In float32; up to 48, where float64 inside costs little, far below torch's wherever rounding leaves room."""
    if backend == "reference" and size > 48:
        pytest.skip("the reference is torch.linalg in the same dtype there")
    ours, with_inverse, torchs = measure(size, condition, torch.float32, device)
    rounding = torch.finfo(torch.float32).eps
    for mine in (ours, with_inverse):
        value_floor, grad_floor = rounding * mine[2], rounding
        assert mine[0] <= 1.5 * torchs[0] + value_floor and mine[1] <= 1.5 * torchs[1] + grad_floor, (mine, torchs)
        if size <= 48:
            assert mine[0] <= 0.01 * torchs[0] + value_floor, (mine, torchs)
            assert mine[1] <= 0.01 * torchs[1] + grad_floor, (mine, torchs)


@pytest.mark.parametrize("size", [3, 12, 48])
def test_float64_is_as_accurate_as_torch_s_float64(size, backend, device):
    """Without a wider dtype to compare with: log|det| of A and of its rows reversed agree as well as torch's do."""
    w = matrices(size, 1e7, torch.float64, device)
    def asymmetry(function):
        return (function(w)[1] - function(w.flip(-2))[1]).abs().median().item()

    def against_spectrum(function):
        exact = torch.logspace(0, -7, size, dtype=torch.float64, device=device).log().sum()
        return (function(w)[1] - exact).abs().median().item()

    floor = 1e-15 * size
    assert asymmetry(slogdet) <= 1.5 * asymmetry(torch.linalg.slogdet) + floor
    assert against_spectrum(slogdet) <= 1.5 * against_spectrum(torch.linalg.slogdet) + floor
