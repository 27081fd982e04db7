"""Forward-mode AD of estimators: the tangent is that of the gradient estimate, or it is refused."""

import pytest
import torch
from discrete_problems import bits, coupled
from torch.func import jvp

from fastflow import estimators
from fastflow.estimators import Bernoulli


def value(estimator, logits, k):
    torch.manual_seed(1)
    return estimator(Bernoulli(logits), coupled, k).value.sum()


@pytest.mark.parametrize(("name", "k"), [("unordered-set", 1), ("unordered-set", 3), ("unordered-set", 8), ("rloo", 2),
                                         ("vimco", 2), ("disarm", 2), ("enumeration", 1)])
def test_the_tangent_is_that_of_the_gradient(name, k):
    logits, direction = bits().logits.detach(), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    estimator = estimators.create(name, (3,)).double()
    gradient, = torch.autograd.grad(value(estimator, leaf, k), leaf)
    found, tangent = jvp(lambda logits: value(estimator, logits, k), (logits,), (direction.expand_as(logits),))
    torch.testing.assert_close(tangent, (gradient * direction).sum())
    torch.testing.assert_close(found, value(estimator, logits, k))


@pytest.mark.parametrize("name", ["rebar", "relax"])
def test_controls_that_take_gradients_of_their_own_refuse(name):
    estimator, logits = estimators.create(name, (3,)).double(), bits().logits.detach()
    with pytest.raises(NotImplementedError, match=f"^{name.upper()}: expected its gradient to be taken by backward"):
        jvp(lambda logits: value(estimator, logits, 2), (logits,), (logits,))
