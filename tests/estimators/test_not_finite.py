"""Estimators where f, its gradients or the logits are infinite or NaN, and one-class latents."""

import math

import pytest
import torch

from fastflow import estimators
from fastflow.estimators import (
    ARM,
    NVIL,
    REBAR,
    REINFORCE,
    RLOO,
    VIMCO,
    Bernoulli,
    Categorical,
    DisARM,
    MovingAverage,
    UnorderedSet,
    baseline_network,
    measure,
)

LOGITS = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
ONE_EACH = torch.eye(3, dtype=torch.float64)[:, None]


def of_class(values):
    """f (N, B) that is ``values`` of the class."""
    return lambda b: torch.tensor(values, dtype=b.dtype)[b.argmax(-1)]


@pytest.mark.parametrize("least", [-math.inf, -1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vimco_of_a_weight_of_zero(least, dtype):
    """Value and gradient by the formula, sample by sample."""
    f = torch.tensor([-1.0, least, 0.5], dtype=torch.float64)
    bound = torch.logsumexp(f, 0) - math.log(3)
    signals = []
    for j in range(3):
        replaced = f.clone()
        replaced[j] = f[torch.arange(3) != j].mean()
        signals.append(bound - (torch.logsumexp(replaced, 0) - math.log(3)))
    signals = torch.stack(signals)
    assert signals.isfinite().all()
    q = Categorical(LOGITS.to(dtype)).detached()
    estimate = VIMCO().at(q, of_class(f.tolist()), ONE_EACH.to(dtype))
    torch.testing.assert_close(estimate.value[0], bound.to(dtype))
    gradient, = torch.autograd.grad(estimate.value.sum(), q.logits)
    expected = (signals[:, None] * (torch.eye(3) - torch.softmax(LOGITS, 1))).sum(0)
    torch.testing.assert_close(gradient[0], expected.to(dtype))


@pytest.mark.parametrize("estimator", [REINFORCE(), RLOO(), ARM(), DisARM(), REBAR().double(), UnorderedSet()],
                         ids=lambda e: type(e).__name__)
def test_an_infinite_f_makes_an_infinite_value(estimator):
    """As its mean is; the gradient is not finite either. Rows beside it are what they are without it."""
    torch.manual_seed(0)
    q = Categorical(LOGITS.expand(2, 3)).detached()

    def f(b):
        return torch.where(torch.arange(2) == 0, -math.inf, b[..., 1] + 2.0 * b[..., 2])

    estimate = estimator(q, f, 3)
    assert estimate.value[0] == -math.inf and estimate.value[1].isfinite()
    gradient, = torch.autograd.grad(estimate.value.sum(), q.logits)
    assert not gradient[0].isfinite().all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("make", [MovingAverage, lambda: NVIL(baseline_network((3,)))], ids=["average", "nvil"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_averages_survive_a_batch_that_is_not_finite(make, bad):
    estimator, q = make(), Bernoulli(torch.zeros(2, 3)).detached()
    estimator(q, lambda b: b.sum(-1), 4)
    before = {name: value.clone() for name, value in estimator.named_buffers()}
    estimator(q, lambda b: b.sum(-1) * bad, 4)
    assert len(before) == 2 and all(torch.equal(before[name], value) for name, value in estimator.named_buffers())
    estimator(q, lambda b: b.sum(-1), 4)
    assert all(value.isfinite() and value != before[name] for name, value in estimator.named_buffers())


def test_nothing_but_masked_pairs_gives_nwj_no_gradient():
    scores = torch.full((3, 3), -math.inf).fill_diagonal_(2.0).requires_grad_()
    value = estimators.nwj(scores)
    gradient, = torch.autograd.grad(value, scores)
    assert value == 2.0
    torch.testing.assert_close(gradient, torch.eye(3) / 3)


def test_what_is_not_finite_is_not_unbiased():
    """In the gradient of a parameter too."""
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = measure(RLOO(), Bernoulli(torch.zeros(1, 2).double()), lambda b: b.sum(-1) + (weight * 0).sqrt(), 2, 5,
                    parameters=[weight])
    assert math.isnan(found.largest_deviation) and not found.is_unbiased()


def test_an_exact_estimate_in_float32_is_unbiased():
    found = measure(RLOO(), Bernoulli(torch.zeros(1, 2)), lambda b: 0.0 * b.sum(-1) + 1.0, 2, 5)
    assert found.largest_deviation == 0.0 and found.is_unbiased()


def test_measuring_in_inference_mode():
    with torch.inference_mode():
        found = measure(REBAR(), Bernoulli(torch.zeros(1, 2)), lambda b: b.sum(-1), 2, 20)
    torch.testing.assert_close(found.exact, torch.full((1, 2), 0.25))


@pytest.mark.parametrize("name", tuple(estimators.ESTIMATORS))
def test_a_single_class_is_certain(name):
    q = Categorical(torch.zeros(2, 2, 1)).detached()
    estimate = estimators.create(name, (2, 1))(q, lambda b: 3.0 * b.sum((2, 3)), 2)
    torch.testing.assert_close(estimate.value, torch.full((2,), 6.0))
    gradient, = torch.autograd.grad(estimate.value.sum(), q.logits, allow_unused=True)
    assert gradient is None or gradient.abs().max() < 1e-6
