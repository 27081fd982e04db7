"""Bounds on mutual information against the closed form of correlated Gaussians."""

import math

import pytest
import torch
from torch import nn

from fastflow import estimators

RHO, D = 0.8, 2
EXACT = -0.5 * D * math.log(1 - RHO**2)  # 1.0216512475


def draws(repeats, n, rho=RHO):
    x, noise = torch.randn(2, repeats, n, D, dtype=torch.float64)
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def log_conditional(x, y, rho=RHO):
    """log p(y | x) over the last dimension."""
    return torch.distributions.Normal(rho * x, math.sqrt(1 - rho**2)).log_prob(y).sum(-1)


def log_marginal(y):
    return torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(-1)


def scores(x, y, rho=RHO):
    """(repeats, N, N) log p(y_j | x_i)."""
    return log_conditional(x[:, :, None], y[:, None], rho)


def moments(bound, matrices):
    values = torch.stack([bound(m) for m in matrices])
    return values.mean(), values.std() / math.sqrt(len(values))


def test_the_closed_form():
    assert math.isclose(EXACT, 1.0216512475, rel_tol=1e-9)


def test_info_nce_is_below_and_rises():
    found = []
    for n in (2, 8, 64):
        mean, error = moments(estimators.info_nce, scores(*draws(2000 // n + 200, n)))
        assert mean <= EXACT + 4 * error and mean <= math.log(n)
        found.append(mean)
    assert found[0] < found[1] < found[2] and EXACT - found[2] < 0.06
    torch.testing.assert_close(estimators.info_nce(torch.zeros(5, 5)), torch.tensor(0.0))


def test_upper_and_lower_bounds_enclose():
    matrices = scores(*draws(400, 64))
    lower, upper = estimators.info_nce, estimators.leave_one_out_upper
    high, error = moments(upper, matrices)
    assert EXACT - 4 * error <= high < EXACT + 0.3
    assert all(upper(m) > lower(m) for m in matrices)


def test_nwj_is_tight_at_the_optimal_critic():
    x, y = draws(3000, 16)
    optimal = 1.0 + scores(x, y) - log_marginal(y)[:, None]
    mean, error = moments(estimators.nwj, optimal)
    assert (mean - EXACT).abs() < 4 * error
    mean, error = moments(estimators.nwj, optimal + 0.5)  # any other critic is below: this one by exp(.5) - 1.5
    assert (mean - (EXACT + 1.5 - math.exp(0.5))).abs() < 4 * error and mean + 4 * error < EXACT
    small = torch.tensor([[1.0, 0.5], [0.2, 2.0]])
    torch.testing.assert_close(estimators.nwj(small), torch.tensor(1.5 - (math.exp(-0.5) + math.exp(-0.8)) / 2))


def test_barber_agakov_is_tight_at_the_true_conditional():
    x, y = (t[0] for t in draws(1, 100_000))
    entropy = 0.5 * D * math.log(2 * math.pi * math.e)
    log_q = log_conditional(y, x)  # the pair is exchangeable: p(x | y) has the same form
    error = log_q.std() / math.sqrt(len(x))
    assert (estimators.barber_agakov(log_q, entropy) - EXACT).abs() < 4 * error
    # With rho' the gap is the mean KL of the conditionals.
    other, s2, t2 = 0.5, 1 - RHO**2, 1 - 0.5**2
    gap = 0.5 * D * ((s2 + (RHO - other) ** 2) / t2 - 1 - math.log(s2 / t2))
    log_q = log_conditional(y, x, other)
    error = log_q.std() / math.sqrt(len(x))
    assert (estimators.barber_agakov(log_q, entropy) - (EXACT - gap)).abs() < 4 * error and gap > 0.1


def test_barber_agakov_upper_is_tight_at_the_true_marginal():
    x, y = (t[0] for t in draws(1, 100_000))
    log_p = log_conditional(x, y)
    terms = log_p - log_marginal(y)
    assert (estimators.barber_agakov_upper(log_p, log_marginal(y)) - EXACT).abs() < 4 * terms.std() / math.sqrt(len(x))
    wide = torch.distributions.Normal(0.0, 1.5).log_prob(y).sum(-1)
    gap = 0.5 * D * (1 / 1.5**2 - 1 + 2 * math.log(1.5))  # KL(p(y) || r)
    error = (log_p - wide).std() / math.sqrt(len(x))
    assert (estimators.barber_agakov_upper(log_p, wide) - (EXACT + gap)).abs() < 4 * error


def test_a_trained_critic_approaches_from_below():
    class Bilinear(nn.Module):
        """With squares of both sides the family holds the optimum."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, D, dtype=torch.float64))

        def forward(self, x, y):
            return (self.weight[0] * x * y + self.weight[1] * x * x + self.weight[2] * y * y).sum(-1)

    critic = Bilinear()
    optimizer = torch.optim.Adam(critic.parameters(), 0.1)
    for _ in range(120):
        x, y = (t[0] for t in draws(1, 128))
        optimizer.zero_grad()
        (-estimators.info_nce(estimators.pairwise_scores(critic, x, y))).backward()
        optimizer.step()
    x, y = draws(100, 128)
    with torch.no_grad():
        mean, error = moments(estimators.info_nce, [estimators.pairwise_scores(critic, *pair)
                                                   for pair in zip(x, y, strict=True)])
    assert mean <= EXACT + 4 * error and EXACT - mean < 0.15


def test_pairs_are_in_their_places():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    matrix = estimators.pairwise_scores(lambda a, b: (a * b).sum(-1), x, y)
    torch.testing.assert_close(matrix, x @ y.T)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: estimators.info_nce(torch.zeros(2, 3)), "scores"),
    (lambda: estimators.nwj(torch.zeros(1, 1)), "scores"),
    (lambda: estimators.leave_one_out_upper(torch.zeros(1, 1)), "log_p"),
    (lambda: estimators.barber_agakov_upper(torch.zeros(3), torch.zeros(2)), "log_r"),
    (lambda: estimators.pairwise_scores(lambda a, b: a, torch.zeros(2, 1), torch.zeros(3, 1)), "y:"),
    (lambda: estimators.pairwise_scores(lambda a, b: a, torch.zeros(2, 1), torch.zeros(2, 1)), "critic output"),
])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
