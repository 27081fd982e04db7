"""A function run twice: what its graph keeps in between, what it says when the second run differs, and buffers that the
first run moves."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastflow import flows
from fastflow.flows import memory, moving
from fastflow.flows.recompute import recomputed
from fastflow.nn import AffineCoupling

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
    layers = [AffineCoupling(net, flip=i % 2 == 1, scale="tanh") for i in range(4)]
    model = flows.Flow(flows.Compose(*layers), flows.StandardNormal(4)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).sum(), list(net.parameters()))
    for name in ("save_z", "invert"):
        with memory.saving(memory.Mode(name, model)):
            loss = model(x).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, list(net.parameters())), expected)


class Norm(nn.Module):
    """Normalises by the running mean that it has just updated, in training too; ``move`` says how it does that."""

    def __init__(self, move):
        super().__init__()
        self.move = move
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.move(self, x.detach().mean(0) / self.calls)
        return x - self.mean


def in_place(norm, mean):
    norm.mean.mul_(0.5).add_(mean)


def exchanged(norm, mean):
    norm.mean = 0.5 * norm.mean + mean


def past_the_version(norm, mean):
    norm.mean.data.mul_(0.5).add_(mean)


class Renorm(nn.BatchNorm1d):
    """A batch normalisation with a forward of its own, which reads what it updates."""

    def forward(self, x):
        if self.training:
            self.num_batches_tracked += 1
        y = F.batch_norm(x, self.running_mean, self.running_var, training=self.training, momentum=self.momentum)
        return y + self.running_mean


class FirstBatch(nn.Module):
    """Shifts by what the first batch had for a mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("known", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        if not self.known:
            self.mean.copy_(x.detach().mean(0))
            self.known.fill_(True)
        return x - self.mean


def norms():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = pytest.importorskip("nflows.transforms").BatchNorm(8)

        def forward(self, x):
            return self.norm(x)[0]

    class OverImages(nn.InstanceNorm1d):
        def forward(self, x):
            return super().forward(x.unflatten(1, (4, 2))).flatten(1)

    return {"instance": lambda: OverImages(4, track_running_stats=True), "nflows": Normalized,
            "in place": lambda: Norm(in_place), "exchanged": lambda: Norm(exchanged),
            "past the version": lambda: Norm(past_the_version), "renorm": lambda: Renorm(8, affine=False),
            "batch": lambda: nn.BatchNorm1d(8, momentum=None), "first batch": FirstBatch}


NORMS = ["instance", "nflows", "in place", "exchanged", "past the version", "renorm", "batch", "first batch"]


def normalized(kind, shared=False):
    """Three couplings with such a norm each, or one for all."""
    torch.manual_seed(3)
    make = norms()[kind]
    norm = make()
    layers = [AffineCoupling(nn.Sequential(nn.Linear(2, 8), norm if shared else make(), nn.Tanh(), nn.Linear(8, 4)),
                             flip=i % 2 == 1, scale="tanh") for i in range(3)]
    return flows.Flow(flows.Compose(*layers), flows.StandardNormal(4)).double(), norm


def losses_of(model, mode, batches):
    losses = []
    for x in batches:
        with memory.saving(mode):
            losses.append(-model(x).mean())
    return losses


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("kind", NORMS)
def test_buffers_move_once_and_a_second_run_finds_them_as_the_first_did(kind, shared):
    """Over steps, with gradients of several batches added up, and with backward after several passes and twice."""
    torch.manual_seed(4)
    batches = list(torch.randn(7, 9, 4, dtype=torch.float64) + 2.0)
    results = []
    for name in ("none", "save_z"):
        model, _ = normalized(kind, shared)
        mode = None if name == "none" else memory.Mode(name, model)
        parameters, found = list(model.parameters()), []
        for x in batches[:2]:  # steps
            loss, = losses_of(model, mode, [x])
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            found += [*grads, *torch.autograd.grad(loss, parameters)]
            with torch.no_grad():
                torch._foreach_sub_(parameters, [0.1 * g for g in grads])
        for x in batches[2:4]:  # accumulated
            losses_of(model, mode, [x])[0].backward()
        found += [p.grad.clone() for p in parameters]
        for loss in losses_of(model, mode, batches[4:6]):
            found += torch.autograd.grad(loss, parameters)
        with memory.saving(mode):  # backward inside, and two passes
            loss = -model(batches[6]).mean() - model(batches[0]).mean()
            found += torch.autograd.grad(loss, parameters)
        results.append((found, [b.clone() for b in model.buffers()]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert any(b.any() for b in results[0][1])


def test_the_second_run_leaves_the_tensors_themselves():
    """A buffer that autograd has saved elsewhere is neither written nor exchanged for good."""
    model, norm = normalized("in place", shared=True)
    with memory.saving(memory.Mode("save_z", model)):
        loss = model(torch.randn(9, 4, dtype=torch.float64)).sum()
    before = norm.mean, norm.mean._version
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    (loss + (weight * norm.mean).sum()).backward()
    assert norm.mean is before[0] and norm.mean._version == before[1]
    torch.testing.assert_close(weight.grad, norm.mean)


def test_only_what_moves_is_copied(monkeypatch):
    copied = []
    monkeypatch.setattr(moving, "_copy", lambda t, copy=moving._copy: (copied.append(t), copy(t))[1])

    def copies(model, mode):
        copied.clear()
        losses_of(model, mode, [torch.randn(9, 4).to(next(model.parameters()))])[0].backward()
        return len(copied)

    glow = flows.RealNVP(4, n_layers=3)
    assert copies(glow, memory.Mode("save_z", glow)) == 0
    model, _ = normalized("in place")
    model.register_buffer("table", torch.zeros(1000))
    mode = memory.Mode("save_z", model)
    copies(model, mode)
    # Of mean and calls: at the start, after the first two steps have moved them, and for each second run.
    assert copies(model, mode) == copies(model, mode) == 3 * 2 + 2 * 2 + 3 * 2
    model.eval()
    assert copies(model, mode) <= 3 * 2 and not any(t is model.table for t in copied)


def test_what_begins_to_move_later_is_seen():
    model, norm = normalized("in place", shared=True)
    mode, x = memory.Mode("save_z", model), torch.randn(9, 4, dtype=torch.float64)
    norm.move = lambda norm, mean: None
    norm.eval()
    losses_of(model, mode, [x])[0].backward()
    norm.train()
    losses_of(model, mode, [x])[0].backward()
    assert norm.calls == 3 and not norm.mean.any()
    norm.move = in_place
    for _ in range(2):
        before = norm.calls.clone()
        loss, = losses_of(model, mode, [x])
        mean = norm.mean.clone()
        loss.backward()
        assert norm.calls == before + 3 and torch.equal(norm.mean, mean) and mean.any()


@pytest.mark.parametrize("kind", ["instance", "nflows", "in place", "exchanged", "past the version"])
def test_invert_refuses_what_moves_buffers(kind):
    model, _ = normalized(kind)
    mode, x = memory.Mode("invert", model), torch.randn(9, 4, dtype=torch.float64)
    for _ in range(2 if kind != "past the version" else 1):
        with pytest.raises(ValueError, match=r"memory: 'invert' can't run transform\.transforms\.0\.conditioner\.1.* "
                                             r"moves its buffer '(running_)?mean', .*; use 'save_z'"):
            losses_of(model, mode, [x])
    assert memory.active() is None


def test_invert_runs_counters():
    class Counted(nn.Linear):
        def __init__(self):
            super().__init__(2, 4)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)
    model = flows.Flow(flows.Compose(*[AffineCoupling(Counted(), flip=i == 1) for i in range(2)]),
                       flows.StandardNormal(4))
    for n in (1, 2):
        losses_of(model, memory.Mode("invert", model), [torch.randn(5, 4)])[0].backward()
        assert all(m.calls == n for m in model.modules() if isinstance(m, Counted))
