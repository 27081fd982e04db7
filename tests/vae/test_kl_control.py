"""Free bits, capacity, balance and least rates: exact values and gradients."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastflow import functional, vae


def gates(kl, least, **options):
    kl = kl.clone().requires_grad_()
    rate = vae.free_bits(kl, least, **options)
    return rate.detach(), torch.autograd.grad(rate.sum(), kl)[0]


KL = torch.tensor([[[0.1, 0.5], [0.2, 0.1]], [[0.3, 0.9], [0.0, 0.4]]])  # (B, D, S)


@pytest.mark.parametrize(("per", "least", "expected", "gate"), [
    # Batch means of elements are (.2, .7, .1, .25), of channels (.9, .35), of the group 1.25.
    ("dim", 0.25, [0.25 + 0.5 + 0.25 + 0.25, 0.25 + 0.9 + 0.25 + 0.25], [[0, 1], [0, 0]]),
    ("channel", 0.5, [0.6 + 0.5, 1.2 + 0.5], [[1, 1], [0, 0]]),
    ("group", 1.0, [0.9, 1.6], [[1, 1], [1, 1]]),
    ("group", 1.3, [1.3, 1.3], [[0, 0], [0, 0]]),
])
def test_free_bits_gate_the_batch_mean(per, least, expected, gate):
    rate, gradient = gates(KL, least, per=per)
    torch.testing.assert_close(rate, torch.tensor(expected))
    assert torch.equal(gradient, torch.tensor(gate, dtype=KL.dtype).expand(2, 2, 2))
    units = {"dim": KL.flatten(1), "channel": KL.sum(2), "group": KL.sum((1, 2))[:, None]}[per]
    torch.testing.assert_close(rate.mean(), units.mean(0).clamp(min=least).sum())


def test_free_bits_of_each_example():
    rate, gradient = gates(KL, 0.25, batch_mean=False)
    torch.testing.assert_close(rate, KL.clamp(min=0.25).sum((1, 2)))
    assert torch.equal(gradient, (KL > 0.25).to(KL.dtype))
    torch.testing.assert_close(vae.free_bits(KL[..., 0], 0.0), KL[..., 0].sum(1))


@pytest.mark.parametrize("batch_mean", [True, False])
def test_free_bits_do_not_hide_what_is_not_a_number(batch_mean):
    assert vae.free_bits(torch.tensor([[math.nan, 1.0]]), 0.1, batch_mean=batch_mean).isnan().all()


def test_free_bits_of_gaussians():
    """Below the floor the encoder's KL gradient is exactly zero, above it exactly the KL's own."""
    params = torch.tensor([[0.1, 2.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    kl = functional.gaussian_sample_kl(params, reduce="none")[1]
    gradient, = torch.autograd.grad(vae.free_bits(kl, 0.5).sum(), params)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 2.0, 0.0, 0.0]], dtype=torch.float64))


def test_capacity():
    kl = torch.tensor([1.0, 4.0], requires_grad=True)
    loss = vae.capacity(kl, 3.0, 10.0)
    torch.testing.assert_close(loss, torch.tensor([20.0, 10.0]))
    assert torch.autograd.grad(loss.sum(), kl)[0].tolist() == [-10.0, 10.0]


def test_kl_balance():
    kl = torch.tensor([[1.0, 3.0], [0.5, 0.3]], requires_grad=True)
    rate, coefficients = vae.kl_balance(kl)
    strength = torch.tensor([2.01, 0.41])
    torch.testing.assert_close(coefficients, strength / strength.mean())
    torch.testing.assert_close(rate, (coefficients[:, None] * kl).sum(0))
    torch.testing.assert_close(torch.autograd.grad(rate.sum(), kl)[0], coefficients[:, None].expand(2, 2))
    of_each = strength / torch.tensor([1.0, 4.0])
    torch.testing.assert_close(vae.kl_balance(kl, (1, 4))[1], of_each / of_each.mean())
    torch.testing.assert_close(vae.kl_balance(torch.full((3, 2), 0.7))[0], torch.full((2,), 2.1))


def test_levels_whose_latents_say_the_same_are_in_balance():
    """Whatever their sizes; a level whose latents say less than the others' is spared."""
    sizes = (8, 32, 128)
    kl = 0.2 * torch.tensor(sizes, dtype=torch.float64)[:, None].expand(3, 4) - 0.01  # NVAE adds the 0.01
    torch.testing.assert_close(vae.kl_balance(kl, sizes)[1], torch.ones(3, dtype=torch.float64))
    quiet = vae.kl_balance(kl * torch.tensor([[0.1], [1.0], [1.0]]), sizes)[1]
    assert quiet[0] < 0.2 < 1.0 < quiet[1]


def test_the_sum_over_ranks_opens_one_gate(monkeypatch):
    """Each of two ranks is on its own side of the floor; both take the mean of all."""
    other = KL * 3
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.add_(torch.cat([other.flatten(1).sum(0),
                                                                              torch.tensor([2.0])])))
    _, gradient = gates(KL, 0.25)
    together = torch.cat([KL, other]).mean(0)
    assert torch.equal(gradient[0], (together > 0.25).float()) and gradient.sum() > 2


def on_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = KL[rank:rank + 1].clone().requires_grad_()
    rate = vae.free_bits(rows, 0.25)
    rate.sum().backward()
    torch.save((rate.detach(), rows.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_batch(tmp_path):
    mp.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    rate, gradient = gates(KL, 0.25)
    torch.testing.assert_close(torch.cat([f[0] for f in found]), rate)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), gradient)


@pytest.mark.parametrize("least", [0.01, 0.3, 4.0, 1000.0])
def test_delta_posterior_keeps_its_rate(least):
    raw = torch.linspace(-40, 40, 161, dtype=torch.float64)
    raw_mean = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)[:, None]
    mean, logvar = vae.delta_gaussian(raw_mean, raw, least)
    kl = 0.5 * (mean**2 + torch.expm1(logvar) - logvar)
    assert (kl >= least * (1 - 1e-12)).all()
    torch.testing.assert_close(kl[:2], torch.full_like(kl[:2], least), rtol=1e-12, atol=1e-15)  # reached, not passed
    assert (kl[2] > least + 1).all()
    scale = raw.clone().requires_grad_()
    gradient, = torch.autograd.grad(vae.delta_gaussian(raw_mean, scale, least)[0].sum(), scale)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_delta_posterior_keeps_a_small_rate_in_float32():
    least = 1e-6
    mean, logvar = (t.double() for t in vae.delta_gaussian(torch.zeros(401), torch.linspace(-20, 20, 401), least))
    kl = 0.5 * (mean**2 + torch.expm1(logvar) - logvar)
    assert (kl >= least * (1 - 1e-4)).all()


@pytest.mark.parametrize(("correlation", "length"), [(0.9, 6), (-0.5, 2), (0.7, 1), (0.0, 5)])
def test_ar1_least_rate_is_the_minimum(correlation, length):
    """Of KL(independent q || prior): at the reciprocal of the precision's diagonal, by its closed form."""
    index = torch.arange(length, dtype=torch.float64)
    covariance = correlation ** (index[:, None] - index).abs()
    precision = torch.linalg.inv(covariance)
    variance = 1 / precision.diagonal()
    least = 0.5 * ((precision.diagonal() * variance).sum() - length - variance.log().sum() + torch.logdet(covariance))
    assert math.isclose(vae.ar1_least_rate(correlation, length), least, rel_tol=1e-10, abs_tol=1e-12)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: vae.free_bits(torch.zeros(2, 3), -1.0), "least"),
    (lambda: vae.free_bits(torch.zeros(2), 0.1), "kl"),
    (lambda: vae.free_bits(torch.zeros(2, 3), "a"), "^least: expected a number, got str"),
    (lambda: vae.free_bits(torch.zeros(2, 3), 0.1, per="row"), "per"),
    (lambda: vae.kl_balance(torch.zeros(2)), "kl"),
    (lambda: vae.kl_balance(torch.zeros(2, 3), (1,)), "sizes"),
    (lambda: vae.delta_gaussian(torch.zeros(1), torch.zeros(1), 0.0), "least"),
    (lambda: vae.ar1_least_rate(1.0, 3), "correlation"),
    (lambda: vae.ar1_least_rate(0.5, 0), "length"),
    (lambda: vae.Capacity(math.nan, 1.0), "^target"),
    (lambda: vae.Capacity(1.0, -5.0), "^gamma"),
    (lambda: vae.capacity(torch.zeros(3), 1.0, -5.0), "^gamma"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
