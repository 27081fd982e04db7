"""Layers whose buffers say how they compute: eager calls and torch.compile see what a state dict or a write brings,
before the graph was made and after."""

import pytest
import torch
from adapter_checks import close
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastflow

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")


def dense(i, o, *rest):
    return nn.Sequential(nn.Linear(i, 8), nn.ReLU(), nn.Linear(8, o))


def freia(seed):
    modules = pytest.importorskip("FrEIA.modules")
    return modules.AllInOneBlock([(6,)], subnet_constructor=dense, permute_soft=seed == 2), lambda m, x: m((x,))[0][0]


def freia_rev(seed):
    return freia(seed)[0], lambda m, x: m((x,), rev=True)[0][0]


def one_by_one(seed):
    library = pytest.importorskip("normflows")
    return library.flows.Invertible1x1Conv(6, True), lambda m, x: m.inverse(x.view(-1, 6, 2, 2))[0]


def masked(seed):
    library = pytest.importorskip("normflows")
    mask = torch.tensor([[1.0, 0, 1, 0, 1, 0], [0.0, 1, 1, 1, 0, 0], [1.0, 0.5, 0, 0, 1, 1]][seed])
    return library.flows.MaskedAffineFlow(mask, dense(6, 6), dense(6, 6)), lambda m, x: m(x)[0]


def actnorm(seed):
    library = pytest.importorskip("normflows")
    norm = library.flows.ActNorm(6)
    if seed != 1:
        norm(torch.randn(9, 6) * 2)
    return norm, lambda m, x: m(x)[0]


def nflows(kind, seed, **options):
    transforms = pytest.importorskip("nflows.transforms")
    from nflows.nn.nets import ResidualNet

    mask = [[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]][seed]
    return getattr(transforms, kind)(mask, lambda i, o: ResidualNet(i, o, 8), **options), lambda m, x: m(x)[0]


def coupling(seed):
    return nflows("AffineCouplingTransform", seed)


def spline(seed):
    return nflows("PiecewiseRationalQuadraticCouplingTransform", seed, tails="linear", tail_bound=3.0)


def convolution(seed):
    transforms = pytest.importorskip("nflows.transforms")
    return transforms.OneByOneConvolution(6, using_cache=False), lambda m, x: m(x.view(-1, 6, 2, 2))[0]


def zuko(seed):
    library = pytest.importorskip("zuko")
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]][seed]).bool()
    return library.flows.coupling.GeneralCouplingTransform(6, mask=mask), lambda m, x: m().call_and_ladj(x)[0]


EVERY = (freia, freia_rev, one_by_one, masked, actnorm, coupling, spline, convolution)


@pytest.mark.parametrize("make", EVERY)
def test_a_state_dict_before_and_after_compiling(make):
    """The third state dict brings what the fused form does not have, where there is such a thing."""
    torch.manual_seed(0)
    fused, call = make(0)
    fastflow.accelerate(fused, verify=False)
    compiled, x = torch.compile(call, backend="eager"), torch.randn(8, 24)
    x = x.view(-1, 24) if make in (one_by_one, convolution) else x.view(-1, 6)
    for seed in (1, 2, 0):
        other, _ = make(seed)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(0.1 * torch.randn_like(p) if p.requires_grad else 0.0)
        fused.load_state_dict(other.state_dict())
        close(compiled(fused, x), call(other, x), 1e-5)


@pytest.mark.parametrize("make", [freia, one_by_one, masked, coupling, spline, convolution])
def test_a_write_and_functional_call(make):
    torch.manual_seed(0)
    (fused, call), (other, _) = make(0), make(1)
    fastflow.accelerate(fused, verify=False)
    compiled = torch.compile(call, backend="eager")
    x = torch.randn(8, 24).view(-1, 24) if make in (one_by_one, convolution) else torch.randn(32, 6)
    compiled(fused, x)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fused

        def forward(self, x):
            return call(self.layer, x)

    state, model = {f"layer.{key}": value for key, value in other.state_dict().items()}, Call()
    step = torch.compile(lambda x: torch.func.functional_call(model, state, (x,)), backend="eager")
    close(step(x), call(other, x), 1e-5)
    with torch.no_grad():
        for mine, its in zip((*fused.parameters(), *fused.buffers()), (*other.parameters(), *other.buffers()),
                             strict=True):
            mine.copy_(its)
    close(compiled(fused, x), call(other, x), 1e-5)


def in_place(tensor, value):
    tensor.copy_(value)


def through_data(tensor, value):
    tensor.data.copy_(value)


def through_numpy(tensor, value):
    tensor.detach().numpy()[...] = value.detach().numpy()


@pytest.mark.parametrize(("write", "inference"), [(through_data, False), (through_numpy, False), (in_place, True)],
                         ids=["data", "numpy", "inference tensors"])
@pytest.mark.parametrize("make", [*EVERY, zuko])
def test_a_write_that_no_version_counts(make, write, inference):
    torch.manual_seed(0)
    with torch.inference_mode(inference):
        fused, call = make(0)
        fastflow.accelerate(fused, verify=False)
        x = torch.randn(8, 24).view(-1, 24) if make in (one_by_one, convolution) else torch.randn(32, 6)
        call(fused, x)
        for seed in (1, 2):
            other, _ = make(seed)
            for mine, its in zip((*fused.parameters(), *fused.buffers()), (*other.parameters(), *other.buffers()),
                                 strict=True):
                write(mine, its)
            close(call(fused, x), call(other, x), 1e-5)


def test_a_mode_that_records_operations_sees_no_question_of_values():
    fused, call = masked(0)
    fastflow.accelerate(fused, verify=False)
    x = torch.randn(8, 6)
    want = call(fused, x)

    def under(b, x):
        return torch.func.functional_call(fused, {"b": b}, (x,))[0]
    graph = make_fx(under)(fused.b, x)
    close(graph(fused.b, x), want, 1e-6)
