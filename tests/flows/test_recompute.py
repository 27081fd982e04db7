"""A function run twice: what its graph keeps in between, and what it says when the second run differs."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastflow import flows
from fastflow.flows import memory
from fastflow.flows.recompute import recomputed

WEIGHT = torch.randn(3, 3, dtype=torch.float64).requires_grad_()


def step(x):
    return torch.tanh(x @ WEIGHT).exp()


def twice(first, x, second=None, around=contextlib.nullcontext):
    return recomputed(first, second or first, (x, None), around)


def ignoring(function):
    return lambda x, nothing: function(x)


def test_gradients_and_second_derivatives():
    x = torch.randn(4, 3, dtype=torch.float64)
    for order in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert order(lambda x, w: twice(ignoring(lambda x: torch.tanh(x @ w).exp()), x),
                     (x.clone().requires_grad_(), WEIGHT))


def test_it_runs_again_once_for_each_backward_and_inside_the_context():
    calls = []

    def counted(x):
        calls.append(torch.is_grad_enabled())
        return step(x)

    @contextlib.contextmanager
    def around():
        calls.append("in")
        yield
        calls.append("out")
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = twice(ignoring(counted), x, around=around).sum()
    grads = []
    for _ in range(2):
        grads.append(torch.autograd.grad(y, [x, WEIGHT], retain_graph=True))
    assert calls == [True] + 2 * ["in", True, "out"]
    torch.testing.assert_close(grads[0], torch.autograd.grad(step(x).sum(), [x, WEIGHT]))
    torch.testing.assert_close(grads[0], grads[1])


def test_a_step_may_take_gradients_on_its_way():
    def force(x):
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(torch.cos(leaf @ WEIGHT).sum(), leaf, create_graph=True)[0]
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(force(x).square().sum(), [x, WEIGHT])
    torch.testing.assert_close(torch.autograd.grad(twice(ignoring(force), x).square().sum(), [x, WEIGHT]), expected)


@pytest.mark.parametrize(("second", "message"), [
    (lambda x: x.sin().cos().sin(), "3 tensors, and 4 before"),
    (lambda x: x.repeat(2, 1).sin().cos().sin().exp(), r"tensor 0 is \(8, 3\)"),
    (lambda x: x.float().sin().cos().sin().exp(), "tensor 0 is .*float32"),
    (lambda x: x.sin().cos().sin().sin().exp(), "tensor 4 is"),
])
def test_another_second_run_is_refused(second, message):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = twice(ignoring(lambda x: x.sin().cos().sin().exp()), x, ignoring(second))
    with pytest.raises(RuntimeError, match=f"ran again in backward than before .*{message}"):
        y.sum().backward()


def test_a_kept_tensor_may_not_change():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True) * 1.0
    y = twice(ignoring(step), x).sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(("name", "keep_every", "alive"), [("none", None, 9), ("save_z", None, 8), ("invert", None, 1),
                                                           ("invert", 4, 2)])
def test_what_lives_between_forward_and_backward(name, keep_every, alive):
    """Not only what autograd is seen to save: no closure holds on to a z either, and none outlives the graph."""
    model = flows.RealNVP(6, n_layers=8, hidden=(8,))
    states = []
    for transform in model.transform.transforms:
        transform.register_forward_hook(lambda _, args, out: states.append(StorageWeakRef(out[0].untyped_storage())))
    mode = None if name == "none" else memory.Mode(name, model, keep_every)
    gc.disable()
    try:
        with memory.saving(mode):
            loss = model(torch.randn(4, 6)).sum()
        assert sum(not state.expired() for state in states) == alive
        loss.backward(retain_graph=True)
        del loss
        assert all(state.expired() for state in states)
    finally:
        gc.enable()


def test_backward_frees_as_it_goes():
    """Without retain_graph no z that has been used is left when backward reaches the first step."""
    model = flows.RealNVP(6, n_layers=8, hidden=(8,))
    kept = []
    for transform in model.transform.transforms:
        transform.register_forward_hook(lambda _, args, out: kept.append(weakref.ref(out[0])))
    first = next(model.transform.transforms[1].conditioner.parameters())
    left = []
    for name in ("save_z", "invert"):
        kept.clear()
        with memory.saving(memory.Mode(name, model)):
            loss = model(torch.randn(4, 6)).sum()
        states = [StorageWeakRef(r().untyped_storage()) for r in kept if r() is not None]
        handle = first.register_hook(lambda grad, states=states: left.append(sum(not s.expired() for s in states)))
        loss.backward()
        handle.remove()
    assert max(left) <= 2, left


def test_modules_may_be_shared_between_steps():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    from fastflow.nn import AffineCoupling

    layers = [AffineCoupling(net, flip=i % 2 == 1, scale="tanh") for i in range(4)]
    model = flows.Flow(flows.Compose(*layers), flows.StandardNormal(4)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).sum(), list(net.parameters()))
    for name in ("save_z", "invert"):
        with memory.saving(memory.Mode(name, model)):
            loss = model(x).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, list(net.parameters())), expected)
