"""accelerate and restore themselves: what is kept, when and how verification runs, copies, wrappers, the report."""

import copy
import importlib
import io
import pickle
import subprocess
import sys

import pytest
import torch
from adapter_checks import accelerated, close
from torch import nn

import fastflow
from fastflow.adapters import core, swap

pytest.importorskip("nflows")
from nflows import transforms  # noqa: E402
from nflows.nn import nets  # noqa: E402


class Stand(nn.Module):
    """A layer that is not of a known library: y = x * weight + buffer, with dropout."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 2.0]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return nn.functional.dropout(x * self.weight, 0.5, self.training)


class Fused(Stand):
    """The same, and its own mistake on demand."""

    wrong = None

    def forward(self, x):
        y = super().forward(x)
        if Fused.wrong == "output":
            return y + 1e-3
        if Fused.wrong == "float32":
            return y + 1e-3 * (y.dtype is torch.float32)
        if Fused.wrong == "float64":
            return y * (1 + 1e-8)
        if Fused.wrong == "gradient":
            return y + 1e-2 * (self.weight - self.weight.detach()).sum()
        if Fused.wrong == "error":
            raise RuntimeError("no such luck")
        return y



@pytest.fixture
def known():
    """Stand is known while the test runs."""
    swap.swap(Stand, methods=("forward",))(Fused)
    yield
    del swap.SWAPS[Stand], Fused._fastflow_swap, Fused.Checked, Fused._load_from_state_dict
    Fused.wrong = None


def coupling():
    return transforms.AffineCouplingTransform([0, 1, 0, 1], lambda i, o: nets.ResidualNet(i, o, hidden_features=8))


def test_a_swapped_layer_stays_the_same_object():
    layer = coupling()
    layer.custom = "mine"
    parameters, buffers = list(layer.parameters()), list(layer.buffers())
    hooked, keys, kind = [], list(layer.state_dict()), type(layer)
    layer.register_forward_hook(lambda *args: hooked.append(1))
    model = nn.ModuleDict({"flow": layer}).eval()
    report = fastflow.accelerate(model)
    assert model["flow"] is layer and isinstance(layer, kind) and type(layer).__name__ == kind.__name__
    assert type(layer).__module__ == "fastflow.adapters.nflows"
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(layer.buffers(), buffers, strict=True))
    assert list(layer.state_dict()) == keys and not layer.training and layer.custom == "mine"
    assert report.swapped == {"flow": "nflows AffineCouplingTransform"} and not report.verified
    layer(torch.randn(3, 4))
    assert hooked == [1] and report.verified == {"flow"}
    assert fastflow.restore(model) == ["flow"] and type(layer) is kind
    assert not [key for key in layer.__dict__ if key.startswith(swap.PREFIX)]
    assert fastflow.restore(model) == []


def test_verification_leaves_no_trace(known):
    """Buffers, the random stream and gradients are those of one call."""
    x, outputs = torch.ones(4, 2), []
    for verify in (None, False, True):
        layer = Stand()
        if verify is not None:
            report = fastflow.accelerate(layer, verify=verify)
        torch.manual_seed(3)
        y = layer(x)
        y.sum().backward()
        outputs.append((y, layer.calls, layer.weight.grad, torch.rand(1)))
    assert report.verified == {""} and type(layer) is Fused
    for found in outputs[1:]:
        for got, want in zip(found, outputs[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("wrong", ["output", "gradient", "error"])
@pytest.mark.parametrize("mode", ["first call", "no_grad", "inference_mode", "example"])
def test_a_layer_that_differs_becomes_its_original_again(known, wrong, mode):
    Fused.wrong = wrong
    layer = Stand().eval()
    x = torch.ones(4, 2)
    with pytest.warns(RuntimeWarning, match="keeps its original form"):
        if mode == "example":
            report = fastflow.accelerate(nn.Sequential(layer), example=x)
        else:
            report = fastflow.accelerate(nn.Sequential(layer))
            with {"first call": torch.enable_grad, "no_grad": torch.no_grad,
                  "inference_mode": torch.inference_mode}[mode]():
                assert torch.equal(layer(x), x * layer.weight)
    assert type(layer) is Stand and not report.swapped and not report.verified
    reason = "raises RuntimeError: no such luck" if wrong == "error" else "differs by"
    assert f"Stand: forward {reason}" in report.skipped["0"]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(("wrong", "dtype"), [("float32", torch.float32), ("float64", torch.float64)])
def test_a_layer_that_is_wrong_in_one_precision_alone(known, wrong, dtype, mode):
    """Also where it draws random numbers, which are others in float64."""
    Fused.wrong = wrong
    layer, x = Stand().to(dtype).train(mode), torch.randn(64, 2, dtype=dtype)
    report = fastflow.accelerate(layer)
    with pytest.warns(RuntimeWarning, match="keeps its original form"):
        layer(x)
    assert type(layer) is Stand and "differs by" in report.skipped[""]


class Kinked(Stand):
    """Gradients jump where x is 1, and the result is the small difference of large numbers."""

    def forward(self, x):
        return nn.functional.relu(x * self.weight - self.weight) + ((x + 1e4) * self.weight - 1e4 * self.weight)


class FusedKinked(Kinked):
    """The same but for the order of its roundings; on demand, with a mistake."""

    wrong = 0.0

    def forward(self, x):
        return nn.functional.relu((x - 1) * self.weight) + x * self.weight * (1 + self.wrong)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_rounding_matters_the_original_is_the_measure(dtype, wrong, monkeypatch):
    swap.swap(Kinked, methods=("forward",))(FusedKinked)
    monkeypatch.setattr(FusedKinked, "wrong", wrong)
    try:
        layer, x = Kinked().to(dtype), torch.randn(64, 2, dtype=dtype)
        x[:4] = 1 + 1.5 * torch.finfo(dtype).eps * torch.tensor([[-1.0, 1], [1, -1], [0, 0], [-1, 0]])
        report = fastflow.accelerate(layer)
        if wrong:
            with pytest.warns(RuntimeWarning, match="differs by"):
                layer(x)
        else:
            layer(x)
        assert bool(report.verified) == (not wrong)
    finally:
        del swap.SWAPS[Kinked], FusedKinked._fastflow_swap, FusedKinked.Checked, FusedKinked._load_from_state_dict


def test_a_wrong_layer_is_kept_without_verification(known):
    """So that the tests above have teeth."""
    Fused.wrong = "output"
    layer = Stand().eval()
    fastflow.accelerate(layer, verify=False)
    assert (layer(torch.ones(1, 2)) - layer.weight).abs().min() > 1e-4


def test_example_verifies_at_once_and_changes_nothing(known):
    layer = Stand()
    other = Stand()
    model = nn.Sequential(layer)
    model.unused = other
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.forward = lambda x: layer(x)
    report = fastflow.accelerate(model, example=(torch.ones(3, 2),))
    assert report.verified == {"0"} and type(layer) is Fused and type(other) is Fused.Checked
    assert torch.equal(torch.get_rng_state(), random) and layer.weight.grad is None
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_calls_that_prove_nothing_leave_the_layer_waiting(known):
    layer = Stand().eval()
    report = fastflow.accelerate(layer)
    with pytest.raises(RuntimeError):
        layer(torch.ones(3, 5))
    plain = coupling()
    report_of_coupling = fastflow.accelerate(plain)
    torch.func.vmap(plain)(torch.randn(2, 3, 4))
    assert not report_of_coupling.verified
    assert type(layer) is Fused.Checked and not report.verified
    layer(torch.ones(3, 2))
    assert report.verified == {""}


def test_copies_and_pickles_before_and_after_the_first_call():
    layer, x = coupling(), torch.randn(5, 4)
    want = layer(x)
    fastflow.accelerate(layer)
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
            assert type(other) is type(layer)
            for got, w in zip(other(x), want, strict=True):
                close(got, w, 1e-5)
            fresh = coupling()
            fresh.load_state_dict(other.state_dict())
            close(fresh(x)[0], want[0], 1e-6)
            assert fastflow.restore(other) == [""]
        layer(x)


def test_twice_and_on_a_wrapped_model():
    layer = coupling()
    wrapped = nn.DataParallel(layer)
    first, second = fastflow.accelerate(wrapped), fastflow.accelerate(wrapped)
    assert first.swapped == second.swapped == {"module": "nflows AffineCouplingTransform"}
    wrapped(torch.randn(3, 4))
    assert second.verified == {"module"}


def test_distributed_data_parallel(process_group):
    for before in (True, False):
        layer = coupling()
        plain = copy.deepcopy(layer)
        if before:
            fastflow.accelerate(layer)
        ddp = nn.parallel.DistributedDataParallel(layer)
        if not before:
            fastflow.accelerate(ddp)
        x = torch.randn(6, 4)
        for m in (ddp, plain):
            y, logabsdet = m(x)
            (y.square().sum() + logabsdet.sum()).backward()
        for got, want in zip(layer.parameters(), plain.parameters(), strict=True):
            close(got.grad, want.grad, 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("make", [coupling, lambda: transforms.LULinear(4)])
def test_traced_layers_are_the_hosts_and_can_be_saved(make, verify):
    layer = make().double()
    fused, x = copy.deepcopy(layer), torch.randn(6, 4, dtype=torch.float64)
    report = fastflow.accelerate(fused, verify=verify)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.trace(fused, x), saved)
    saved.seek(0)
    for got, want in zip(torch.jit.load(saved)(2 * x), layer(2 * x), strict=True):
        close(got, want, 1e-10)
    fused(x)
    assert report.verified == ({""} if verify else set())


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("verify", [True, False])
def test_a_layer_parametrized_after_it_was_swapped(verify):
    layer, plain = Stand().eval(), Stand().eval()
    swap.swap(Stand, methods=("forward",))(Fused)
    try:
        report = fastflow.accelerate(layer, verify=verify)
        for module in (layer, plain):
            nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
        x = torch.randn(3, 2)
        assert torch.equal(layer(x), plain(x)) and isinstance(layer, Fused)
        assert report.verified == ({""} if verify else set())
        fastflow.accelerate(layer)
        assert torch.equal(layer(x), plain(x)) and isinstance(layer, Fused)
        assert fastflow.restore(layer) == [""] and not isinstance(layer, Fused)
        assert torch.equal(layer(x), plain(x))
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        assert type(layer) is Stand and torch.equal(layer(x), plain(x))
    finally:
        del swap.SWAPS[Stand], Fused._fastflow_swap, Fused.Checked, Fused._load_from_state_dict


def test_fully_sharded_layers(process_group):
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = nn.Sequential(coupling(), coupling())
    model = Composed(model)
    plain, x = copy.deepcopy(model), torch.randn(8, 4)
    report = fastflow.accelerate(model)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    for layer in (*model.layers, model):
        fully_shard(layer, mesh=mesh)
    for verified in (set(report.swapped), set(report.swapped), set()):
        for m in (model, plain):
            m.zero_grad()
            m(x).sum().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            close(p.grad.full_tensor(), q.grad, 1e-5)
        assert report.verified >= verified and all(isinstance(layer, FSDPModule) for layer in model.layers)
        fastflow.restore(model)


class Composed(nn.Module):
    """The layers' z and log-determinants one after the other, in one tensor."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        total = 0.0
        for layer in self.layers:
            x, logdet = layer(x)
            total = total + logdet
        return torch.cat([x.square(), total[:, None]], 1)


def test_half_precision_and_autocast_are_the_hosts():
    layer = coupling()
    fused, _ = accelerated(layer)
    x = torch.randn(5, 4)
    fused(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(fused(x), layer(x), strict=True):
            close(got.float(), want.float(), 2e-2)
    for got, want in zip(fused.bfloat16()(x.bfloat16()), layer.bfloat16()(x.bfloat16()), strict=True):
        assert torch.equal(got, want)


def test_report_is_readable():
    model = nn.ModuleList([coupling(), coupling(), transforms.ReversePermutation(4)])
    report = fastflow.accelerate(model)
    text = str(report)
    assert "2 layers swapped, 0 of them verified" in text and "2 x nflows AffineCouplingTransform" in text
    assert report.skipped == {"2": "nflows ReversePermutation has no fused form"}
    assert repr(report) == "Report(swapped=2, skipped=1, verified=0)"


@pytest.mark.parametrize("function", [fastflow.accelerate, fastflow.restore])
def test_what_is_no_module_is_an_error(function):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got list"):
        function([coupling()])


def test_a_library_that_its_adapter_does_not_fit_is_reported(tmp_path, monkeypatch):
    """Its layers stay as they are, all of them, and those of other libraries are swapped."""
    for name, body in {
            "oldhost": "import torch\n__version__ = '0.3'\nclass Known(torch.nn.Identity): pass\n"
                       "class Apart(Known): pass\n",
            "oldhost_parts": "import oldhost\nfrom fastflow.adapters.swap import swap\n"
                             "@swap(oldhost.Apart)\nclass Apart(oldhost.Apart):\n    inverse = None\n",
            "oldhost_adapter": "import oldhost\nfrom fastflow.adapters import oldhost_parts\n"
                               "from fastflow.adapters.swap import swap\n"
                               "@swap(oldhost.Known)\nclass Known(oldhost.Known):\n    inverse = None\n"
                               "oldhost.Missing\n"}.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fastflow.adapters, "__path__", [*fastflow.adapters.__path__, str(tmp_path)])
    monkeypatch.setitem(core.HOSTS, "oldhost", "oldhost_adapter")
    library = importlib.import_module("oldhost")
    try:
        for _ in range(2):
            report = fastflow.accelerate(nn.ModuleList([library.Known(), coupling(), library.Apart()]))
            assert list(report.swapped) == ["1"] and "has no attribute 'Missing'" in report.skipped["0"]
            assert "the adapter does not fit oldhost 0.3" in report.skipped["0"]
            assert report.skipped["2"] == report.skipped["0"].replace("Known", "Apart")
    finally:
        del sys.modules["oldhost"]


def test_adapters_are_imported_only_for_libraries_in_use():
    code = ("import sys, torch, fastflow; assert not fastflow.accelerate(torch.nn.Linear(2, 2)).swapped;"
            f"assert not [n for n in {list(core.HOSTS)} if n in sys.modules];"
            "assert 'fastflow.adapters.nflows' not in sys.modules; print('lean')")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "lean\n", run.stderr
