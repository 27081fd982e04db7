"""Lambda, exact and estimated, and check_invertible: against layers whose log-determinant is known."""

import math

import pytest
import torch
from torch import nn

from fastflow import flows


def cubic(x):
    """Triangular with diagonal 1 + 3x^2: log|det| = sum log(1 + 3x^2)."""
    return x + x**3 + torch.nn.functional.pad(x[:, :-1].sin(), (1, 0))


def cubic_logdet(x):
    return torch.log(1 + 3 * x**2).sum(1)


class Net(nn.Module):
    """x + tanh(W x)/2, a small change of x."""

    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x):
        return x + 0.5 * torch.tanh(0.5 * self.linear(x))


def test_exact_log_determinant_and_newton_inverse():
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform = flows.Lambda(cubic)
    z, logdet = transform(x)
    torch.testing.assert_close(z, cubic(x))
    torch.testing.assert_close(logdet, cubic_logdet(x), rtol=1e-11, atol=1e-11)
    back, opposite = transform.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(opposite, -logdet, rtol=1e-8, atol=1e-8)


def test_exact_in_float32_is_computed_in_float64():
    torch.manual_seed(0)
    net, x = Net(3), torch.randn(5, 3)
    transform = flows.Lambda(net)
    z, logdet = transform(x)
    truth = flows.Lambda(Net(3).double())
    truth.function.load_state_dict(net.state_dict())
    assert z.dtype == logdet.dtype == torch.float32 and net.linear.weight.dtype == torch.float32
    torch.testing.assert_close(logdet.double(), truth(x.double())[1], rtol=1e-7, atol=1e-7)


def test_gradients_of_the_exact_mode():
    torch.manual_seed(0)
    net = Net(3).double()
    transform = flows.Lambda(net)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform, x)
    z = transform(x)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: transform.inverse(t)[0], z)
    loss = transform(x)[1].sum()
    (got,) = torch.autograd.grad(loss, net.linear.weight)
    step = 1e-6
    with torch.no_grad():
        net.linear.weight[1, 2] += step
        up = transform(x)[1].sum()
        net.linear.weight[1, 2] -= 2 * step
        down = transform(x)[1].sum()
    assert got[1, 2].item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6)


def test_second_derivatives_of_newton_s_inverse():
    scale = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([[0.7, 0.1], [-1.2, 0.4]], dtype=torch.float64, requires_grad=True)
    for part in (0, 1):
        assert torch.autograd.gradgradcheck(
            lambda z, scale, part=part: flows.Lambda(lambda x: torch.sinh(x) * scale).inverse(z)[part], (z, scale))


def test_a_given_inverse_is_used():
    transform = flows.Lambda(torch.exp, torch.log)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(transform.inverse(torch.exp(x))[0], torch.log(torch.exp(x)))


def test_shapes_other_than_vectors():
    transform = flows.Lambda(lambda x: torch.nn.functional.pixel_unshuffle(2.0 * x, 2))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    z, logdet = transform(x)
    assert z.shape == (2, 4, 2, 2)
    torch.testing.assert_close(logdet, torch.full((2,), 16 * math.log(2.0), dtype=torch.float64))


def test_the_estimate_has_no_bias_with_as_many_steps_as_dimensions():
    """Mean of many estimates within 4 standard errors of the exact value, and of its gradient."""
    torch.manual_seed(0)
    net = Net(5).double()
    x = torch.randn(1, 5, dtype=torch.float64)
    exact = flows.Lambda(net)(x)[1]
    (gradient,) = torch.autograd.grad(exact.sum(), net.linear.weight)
    estimate = flows.Lambda(net, mode="estimated", n_probes=1, n_steps=5)
    batch = x.expand(4000, -1).contiguous()
    values = estimate(batch)[1]
    error = (values.mean() - exact) / (values.std() / len(values) ** 0.5)
    assert abs(error.item()) < 4
    found = []
    for _ in range(40):
        (g,) = torch.autograd.grad(estimate(batch[:200])[1].mean(), net.linear.weight)
        found.append(g)
    found = torch.stack(found)
    z = (found.mean(0) - gradient) / (found.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4.5 and z.square().mean() < 2.5  # 25 entries


def test_the_estimate_without_gradients():
    with torch.no_grad():
        z, logdet = flows.Lambda(cubic, mode="estimated", n_probes=200, n_steps=4)(torch.full((1, 4), 0.1).double())
    assert not z.requires_grad and abs(logdet.item() - cubic_logdet(torch.full((1, 4), 0.1).double()).item()) < 0.2


class WrongSign(flows.Exp):
    def f(self, x):
        z, slope = super().f(x)
        return z, -slope


class WrongInverse(flows.Exp):
    def f_inverse(self, z):
        x, slope = super().f_inverse(z)
        return x + 1e-3, slope


def test_check_invertible_finds_what_is_wrong():
    x = torch.randn(4, 3, dtype=torch.float64)
    assert flows.check_invertible(flows.Exp(), x).ok
    flipped = flows.check_invertible(WrongSign(), x)
    assert not flipped.ok and flipped.sign_flipped and "sign" in str(flipped)
    shifted = flows.check_invertible(WrongInverse(), x)
    assert not shifted.ok and not shifted.sign_flipped and shifted.inverse_error == pytest.approx(1e-3)
    assert "NOT ok" in str(shifted) and "ok" in str(flows.check_invertible(flows.Exp(), x))


def test_check_invertible_on_models_and_context():
    torch.manual_seed(0)
    flow = flows.RealNVP(3, context_features=2, n_layers=2).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, context = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    assert flows.check_invertible(flow.transform, x, context).ok
    glow = flows.Glow((1, 4, 4), 2, 2, 16).double()
    assert flows.check_invertible(glow.transform, torch.rand(2, 1, 4, 4, dtype=torch.float64)).ok


def test_newton_solves_each_sample_to_its_own_size_and_none_at_all():
    transform = flows.Lambda(lambda x: x + 0.5 * torch.sin(x))
    z = torch.tensor([[1e-6], [1e6]], dtype=torch.float64)
    torch.testing.assert_close(transform(transform.inverse(z)[0])[0], z, rtol=1e-9, atol=0)
    assert [t.shape for t in transform.inverse(z[:0])] == [(0, 1), (0,)]


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: flows.Lambda(3), TypeError, "function"), (lambda: flows.Lambda(torch.exp, 3), TypeError, "inverse"),
    (lambda: flows.Lambda(torch.exp, mode="guess"), ValueError, "mode"),
    (lambda: flows.Lambda(torch.exp, n_probes=0), ValueError, "n_probes"),
    (lambda: flows.Lambda(lambda x: x[:, :1])(torch.zeros(2, 3)), ValueError, "function"),
    (lambda: flows.Lambda(lambda x: x[:, :1], mode="estimated")(torch.zeros(2, 3)), ValueError, "function"),
    (lambda: flows.Lambda(lambda x: x**2).inverse(torch.full((1, 1), -1.0)), RuntimeError, "converge")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
