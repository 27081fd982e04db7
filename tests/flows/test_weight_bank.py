"""Factorising all 1x1 weights together changes how often, and nothing else."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from fastflow import flows, functional
from fastflow.nn import ActNorm, InvertibleConv1x1, WeightBank


def model():
    """Two size classes, plain and PLU, with and without normalisation, one layer run backwards."""
    return flows.Compose(
        InvertibleConv1x1(4), InvertibleConv1x1(4, actnorm=ActNorm(4)), InvertibleConv1x1(4, "plu"), flows.Squeeze(),
        InvertibleConv1x1(16, "plu", actnorm=ActNorm(16)), InvertibleConv1x1(16)).double()


def scattered(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.fixture
def calls(monkeypatch):
    """How often each factorising function ran, by the shape of its first argument."""
    seen = []
    for name in ("slogdet", "slogdet_inverse", "plu_weight"):
        original = getattr(functional, name)

        def spy(*args, name=name, function=original):
            seen.append((name, tuple(args[0].shape)))
            return function(*args)
        monkeypatch.setattr(functional, name, spy)
    return seen


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_equal_values_and_gradients(direction):
    plain = scattered(model())
    banked = WeightBank(copy.deepcopy(plain))
    x = torch.randn((2, 4, 4, 4) if direction == "forward" else (2, 16, 2, 2), dtype=torch.float64)
    grads = []
    for module in (plain, banked):
        z, logdet = module(x) if direction == "forward" else module.inverse(x)
        ((z * z).sum() + logdet.sum()).backward()
        grads.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(z, plain(x)[0] if direction == "forward" else plain.inverse(x)[0])
    assert len(grads[0]) == len(list(plain.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_one_factorisation_per_size_class(calls):
    bank, x = WeightBank(model()), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    z, _ = bank(x)
    assert sorted(calls) == [("plu_weight", (1, 4, 4)), ("plu_weight", (1, 16, 16)), ("slogdet", (1, 16, 16)),
                             ("slogdet", (2, 4, 4))]
    calls.clear()
    bank.inverse(z)
    assert sorted(calls) == [("plu_weight", (1, 4, 4)), ("plu_weight", (1, 16, 16)), ("slogdet_inverse", (2, 16, 16)),
                             ("slogdet_inverse", (3, 4, 4))]


def test_glow_banks_by_itself(calls):
    glow = flows.Glow((3, 8, 8), n_levels=2, n_steps=3, hidden_channels=4)
    glow(torch.rand(2, 3, 8, 8))
    assert sorted(calls) == [("slogdet", (3, 12, 12)), ("slogdet", (3, 24, 24))]
    calls.clear()
    WeightBank(glow)(torch.rand(2, 3, 8, 8))
    assert sorted(calls) == [("slogdet", (3, 12, 12)), ("slogdet", (3, 24, 24))]
    calls.clear()
    glow.sample(2)
    assert sorted(calls) == [("slogdet_inverse", (3, 12, 12)), ("slogdet_inverse", (3, 24, 24))]


def test_any_method_and_both_directions(calls):
    both = flows.Compose(InvertibleConv1x1(3), flows.Inverse(InvertibleConv1x1(3)))
    flow = flows.Flow(both, flows.StandardNormal((3,)))
    bank = WeightBank(flow)
    x = torch.randn(4, 3)
    torch.testing.assert_close(bank(x), flow(x))
    calls.clear()
    with bank.factorized(inverse=True):
        flow.sample(2)
    assert sorted(calls) == [("slogdet", (2, 3, 3)), ("slogdet_inverse", (2, 3, 3))]


def test_what_a_transform_has_besides_its_two_directions_is_the_model_s():
    glow = flows.Glow((1, 8, 8), n_levels=2, n_steps=1, hidden_channels=8)
    flow, x = flows.Flow(WeightBank(glow.transform), glow.base), torch.rand(9, 1, 8, 8) - 0.5
    flow.initialize(x)
    assert all(norm.initialized for norm in glow.modules() if isinstance(norm, ActNorm))
    z = flow.transform(x)[0]
    torch.testing.assert_close(flow.unpack(z), glow.unpack(z))
    rest = WeightBank(flows.Compose(flows.Squeeze(), InvertibleConv1x1(8)))
    split = flows.Compose(flows.Squeeze(), flows.Split((4, 4, 4), rest=rest))
    assert split.noise_shape((1, 8, 8)) == (64,) and split.data_shape((64,)) == (1, 8, 8)
    torch.testing.assert_close(split.inverse(split(x)[0])[0], x)
    bare = WeightBank(InvertibleConv1x1(3))  # which has initialize alone
    assert hasattr(bare, "initialize") and not any(map(hasattr, [bare] * 3, ("unpack", "noise_shape", "data_shape")))


def test_nothing_is_kept():
    plain = model()
    bank, x = WeightBank(plain), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    before = bank(x)[0]
    bank.load_state_dict(scattered(WeightBank(model())).state_dict())
    assert not torch.allclose(bank(x)[0], before)
    torch.testing.assert_close(bank(x), plain(x))
    other = {k: v + 0.1 if v.is_floating_point() else v for k, v in bank.state_dict().items()}
    swapped = torch.func.functional_call(bank, other, (x,))
    torch.testing.assert_close(bank(x), plain(x))
    bank.load_state_dict(other)
    torch.testing.assert_close(swapped, bank(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(bank))(x), bank(x))


def test_calls_that_overlap_leave_no_trace():
    """As of two threads: the second to enter is the last to leave, and must not put back the first one's factors."""
    bank = WeightBank(model())
    first, second = bank.factorized(), bank.factorized()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert all(layer._bank is None for layer in bank.model.modules() if isinstance(layer, InvertibleConv1x1))


@pytest.mark.parametrize("wrap", [lambda layers: layers, WeightBank])
def test_another_threads_call_without_gradients_takes_none_from_this_one(wrap):
    bank = WeightBank(model())
    x, entered, done = torch.randn(2, 4, 4, 4, dtype=torch.float64), threading.Event(), threading.Event()

    @torch.no_grad()
    def evaluate():
        with bank.factorized():
            entered.set()
            assert done.wait(60)

    other = threading.Thread(target=evaluate)
    other.start()
    try:
        assert entered.wait(60)
        z, logdet = wrap(bank.model)(x)
        got = torch.autograd.grad(z.square().sum() + logdet.sum(), list(bank.parameters()))
    finally:
        done.set()
        other.join()
    z, logdet = bank(x)
    want = torch.autograd.grad(z.square().sum() + logdet.sum(), list(bank.parameters()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_an_exception_leaves_no_trace():
    class Failing(nn.Module):
        def forward(self, x, context=None):
            raise RuntimeError("stop")

    layer = InvertibleConv1x1(3)
    bank = WeightBank(nn.Sequential(layer, Failing()))
    with pytest.raises(RuntimeError, match="stop"):
        bank.model[1](None)
    with pytest.raises(AttributeError), bank.factorized():
        assert layer._bank is not None
        torch.missing_name  # noqa: B018
    assert layer._bank is None


def test_singular_weight():
    layers = nn.ModuleList([InvertibleConv1x1(3), InvertibleConv1x1(3)])
    with torch.no_grad():
        layers[0].weight.zero_()
    with WeightBank(layers).factorized():
        assert layers[0](torch.randn(2, 3))[1].tolist() == [-torch.inf, -torch.inf]
        assert torch.isfinite(layers[1](torch.randn(2, 3))[1]).all()


def test_compiles_to_one_graph():
    bank = WeightBank(scattered(model()))
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 4, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), bank(x))


def test_sharded_weights_are_refused(mesh):
    from torch.distributed.fsdp import fully_shard

    glow = flows.Glow((1, 4, 4), n_levels=1, n_steps=2, hidden_channels=4)
    x = torch.rand(2, 1, 4, 4)
    expected = glow(x)
    fully_shard(glow, mesh=mesh)  # one group: unsharded when the flow runs
    torch.testing.assert_close(glow(x), expected)
    glow = flows.Glow((1, 4, 4), n_levels=1, n_steps=2, hidden_channels=4)
    fully_shard(glow.transform.levels[0].steps[1], mesh=mesh)
    with pytest.raises(TypeError, match=r"levels\.0\.steps\.1\.conv\.weight"):
        glow(x)
    layers = nn.ModuleList([InvertibleConv1x1(3)])
    fully_shard(layers[0], mesh=mesh)
    with pytest.raises(TypeError, match=r"0\.weight"), WeightBank(layers).factorized():
        pass
