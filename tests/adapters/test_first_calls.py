"""First calls of swapped layers: by several threads, of data that prove nothing, and layers without values."""

import threading
import warnings
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from adapter_checks import close
from torch import nn

import fastflow
from fastflow.adapters import swap


class Stand(nn.Module):
    """A layer that is not of a known library."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x):
        return x * self.weight


class Wrong(Stand):
    """Another one's result."""

    meet = staticmethod(lambda: None)

    def forward(self, x):
        Wrong.meet()
        return super().forward(x) + 1.0


@pytest.fixture
def known():
    """Stand is known while the test runs."""
    swap.swap(Stand, methods=("forward",))(Wrong)
    yield
    del swap.SWAPS[Stand], Wrong._fastflow_swap, Wrong.Checked, Wrong._load_from_state_dict
    Wrong.meet = staticmethod(lambda: None)


def test_two_threads_put_one_layer_back(known):
    layer, x, found, barrier = Stand(), torch.ones(3, 2), [], threading.Barrier(2, timeout=30)
    report = fastflow.accelerate(layer)
    Wrong.meet = staticmethod(barrier.wait)  # both are in the fused form before either is settled
    threads = [threading.Thread(target=lambda: found.append(layer(x))) for _ in range(2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2 and all(torch.equal(y, x * layer.weight) for y in found)
    assert type(layer) is Stand and list(report.skipped) == [""] and not report.verified
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1


@pytest.mark.parametrize("x", [torch.ones(0, 2), torch.full((3, 2), float("nan")), torch.full((3, 2), float("inf")),
                               torch.tensor([[1.0, 1.0], [1.0, float("nan")]]), torch.tensor([[1.0, 3e38]])],
                         ids=["empty", "nan", "inf", "one nan", "inf in the result"])
def test_numbers_that_are_not_finite_prove_nothing(known, x):
    layer = Stand()
    report = fastflow.accelerate(layer)
    layer(x)
    assert type(layer) is Wrong.Checked and not report.verified and not report.skipped
    with pytest.warns(RuntimeWarning, match="keeps its original form"):
        layer(torch.ones(3, 2))
    assert type(layer) is Stand


def test_layers_on_the_meta_device_are_left_alone():
    transforms = pytest.importorskip("nflows.transforms", reason="nflows is not installed")
    from nflows.nn import nets

    model = nn.Sequential(transforms.LULinear(3), transforms.ActNorm(3), transforms.AffineCouplingTransform(
        [0, 1, 0], lambda i, o: nets.ResidualNet(i, o, hidden_features=8))).to("meta")
    kinds = [type(layer) for layer in model]
    report = fastflow.accelerate(model)
    assert [type(layer) for layer in model] == kinds and not report.swapped
    assert [report.skipped[name].split(": ")[1] for name in "012"] == ["it is on the meta device"] * 3


def test_swapped_layers_go_to_the_meta_device_and_back():
    transforms = pytest.importorskip("nflows.transforms", reason="nflows is not installed")
    model = nn.Sequential(transforms.ActNorm(3), transforms.LULinear(3)).eval()
    state = {key: t.clone() for key, t in model.state_dict().items()}
    fastflow.accelerate(model)
    model.to("meta")
    assert len(fastflow.accelerate(model).swapped) == 2
    image = transforms.OneByOneConvolution(3)
    fastflow.accelerate(image, verify=False)
    x = torch.ones(2, 3, 4, 4, device="meta")
    assert image.to("meta")(x)[0].shape == image.inverse(x)[0].shape == x.shape
    model.load_state_dict(state, assign=True)
    assert model[0](torch.ones(4, 3))[0].shape == (4, 3)


class Partly(nn.Module):
    """A layer beside an expanded buffer, which changes in a call, and a lazy layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.lazy = Stand(), nn.LazyLinear(2)
        self.register_buffer("calls", torch.zeros(2, 1).expand(2, 3))

    def forward(self, x):
        self.calls[:, :1] += 1
        return self.lazy(self.inner(x))


def test_an_example_for_a_model_with_expanded_and_lazy_tensors(known):
    model, x = Partly(), torch.ones(3, 2)
    calls = model.calls
    with pytest.warns(RuntimeWarning, match="keeps its original form"):
        report = fastflow.accelerate(model, example=x)
    assert list(report.skipped) == ["inner"] and type(model.inner) is Stand
    assert model.calls is calls and torch.equal(calls, torch.zeros(2, 3)) and calls.stride() == (1, 0)
    assert type(model.lazy) is nn.Linear and model.lazy.in_features == 2 and model(x).shape == (3, 2)


class Keeping(nn.Module):
    """A layer that writes into a cache, a list, a dict and a submodule of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.log, self.seen, self.python = Stand(), [1], {"x": 0}, threading
        self.cache, self.ordered = SimpleNamespace(weight=None), OrderedDict(a=1)

    def forward(self, x):
        self.log.append(len(x))
        self.seen["x"], self.seen["y"], self.cache.weight = x, x, self.inner.weight * 2
        self.ordered.move_to_end("a")
        self.ordered["b"] = self.add = nn.Identity()
        return self.inner(x) * self.cache.weight


@pytest.mark.filterwarnings("ignore:a .*Stand keeps its original form")
def test_an_example_leaves_nothing_in_what_the_layers_keep(known):
    model = Keeping()
    kept = model.log, model.seen, model.cache, model.ordered
    fastflow.accelerate(model, example=torch.ones(3, 2))
    assert all(a is b for a, b in zip(kept, (model.log, model.seen, model.cache, model.ordered), strict=True))
    assert model.log == [1] and model.seen == {"x": 0} and vars(model.cache) == {"weight": None}
    assert model.ordered == {"a": 1} and [name for name, _ in model.named_children()] == ["inner"]
    model(torch.ones(3, 2))
    assert model.log == [1, 3] and list(model.ordered) == ["a", "b"]


def test_an_example_leaves_the_hosts_cache_empty():
    transforms = pytest.importorskip("nflows.transforms", reason="nflows is not installed")
    torch.manual_seed(0)
    layer, other = (transforms.LULinear(4, using_cache=True, identity_init=False).eval() for _ in range(2))
    x = torch.randn(6, 4)
    fastflow.accelerate(layer, example=x)
    layer.load_state_dict(other.state_dict())
    for m in (layer, other):
        y, logabsdet = m(x)
        (y.square().sum() + logabsdet.sum()).backward()
    close(y, layer(x)[0], 1e-6)
    for got, want in zip(layer.parameters(), other.parameters(), strict=True):
        close(got.grad, want.grad, 1e-5)


def test_a_lazy_network_in_a_layer_is_verified_once_it_has_values():
    transforms = pytest.importorskip("nflows.transforms", reason="nflows is not installed")

    class Network(nn.Sequential):
        def forward(self, x, context=None):
            return super().forward(x)

    layer, x = transforms.AffineCouplingTransform([0, 1, 0], lambda i, o: Network(nn.LazyLinear(o))), torch.randn(4, 3)
    report = fastflow.accelerate(layer, example=x)
    assert not report.verified
    layer(x)
    assert report.verified == {""}
