"""Estimators in compiled graphs, and those with networks in half precision."""

import copy

import pytest
import torch

from fastflow.estimators import NVIL, RELAX, Bernoulli, MovingAverage, NeuralBaseline, baseline_network


@pytest.mark.parametrize("make", [MovingAverage, lambda: NVIL(baseline_network((3,), ()))])
def test_backward_of_a_compiled_call_knows_the_averages_before_it(make):
    """The baseline that weighs the score is that of the call's beginning, though the call moves the buffers in place
    before its backward: three calls in a row give the gradients and the averages of eager mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    own = make()
    other, weight = copy.deepcopy(own), torch.tensor([5.0, -2.0, 3.0])
    logits, samples = torch.randn(4, 3), torch.bernoulli(torch.full((3, 2, 4, 3), 0.4))

    def value(estimator, logits, b):
        estimate = estimator.at(Bernoulli(logits), lambda b: (b * weight).sum(-1), b)
        return estimate.value.sum() + estimate.auxiliary

    places = [b.data_ptr() for b in other.buffers()]  # kept, for a CUDA graph and DDP read them there
    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    for b in samples:
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        for call, estimator, leaf in ((value, own, leaves[0]), (compiled, other, leaves[1])):
            call(estimator, leaf, b).backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
    for (name, mine), theirs in zip(own.named_buffers(), other.buffers(), strict=True):
        assert mine.abs() > 0.1, name
        torch.testing.assert_close(theirs, mine)
    assert [b.data_ptr() for b in other.buffers()] == places


@pytest.mark.parametrize("estimator", [NeuralBaseline, NVIL, RELAX])
def test_networks_in_half_precision(estimator):
    """A bfloat16 network takes the float32 logits rounded: the estimate is that of a float32 network with its weights,
    to bfloat16's precision, and every parameter gets a gradient of its own dtype."""
    torch.manual_seed(0)
    half = estimator(baseline_network((3,), (8,))).bfloat16()
    whole = copy.deepcopy(half).float()
    logits, grads = torch.randn(5, 3), []
    for module in (half, whole):
        torch.manual_seed(1)
        leaf = logits.clone().requires_grad_()
        estimate = module(Bernoulli(leaf), lambda b: (b * torch.tensor([1.0, -2.0, 0.5])).sum(-1) ** 2, 4)
        assert estimate.value.dtype == torch.float32
        (estimate.value.sum() + estimate.auxiliary).backward()
        assert all(p.grad.dtype == p.dtype for p in module.parameters())
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.03, atol=0.03)


def test_a_network_in_float64_refuses_float32_logits():
    with pytest.raises(RuntimeError, match="dtype"):
        NeuralBaseline(baseline_network((3,)).double())(Bernoulli(torch.zeros(2, 3)), lambda b: b.sum(-1))
