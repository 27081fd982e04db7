"""MADE, masked autoregressive transforms, MAF and IAF, and NICE beside them."""

import math

import pytest
import torch
from flow_checks import check_bijection, check_gradients, integral, scattered
from torch import nn
from torch.nn.utils import prune

from fastflow import flows
from fastflow.flows.jacobian import jacobian
from fastflow.nn import ActNorm

FLOWS = {"maf": flows.MAF, "iaf": flows.IAF, "nice": flows.NICE}


def double(features, seed=0, **options):
    """A masked autoregressive transform in a random order, away from its start."""
    torch.manual_seed(seed)
    options = {"hidden": (7, 6), "order": torch.randperm(features), "activation": nn.Tanh, **options}
    return scattered(flows.MaskedAutoregressive(features, **options).double())


def plain_loop(transform, z, context=None):
    """The inverse by evaluating the whole network anew for every feature."""
    x = torch.zeros_like(z)
    for i in transform.network.order.tolist():
        candidates, logdet = transform.transformer.inverse(z, transform.network(x, context))
        x = torch.where(torch.arange(z.shape[1]) == i, candidates, x)
    return x, logdet


class Cubic:
    """A transformer of three parameters, feature-major: z = e^a x + b + e^c x^3, inverted by bisection."""

    params_per_feature, layout = 3, "interleave"

    def __call__(self, x, params):
        a, b, c = params.unflatten(1, (x.shape[1], 3)).unbind(2)
        return a.exp() * x + b + c.exp() * x**3, torch.log(a.exp() + 3 * c.exp() * x**2).sum(1)

    def inverse(self, z, params):
        low, high = torch.full_like(z, -1e3), torch.full_like(z, 1e3)
        for _ in range(70):
            middle = (low + high) / 2
            below = self(middle, params)[0] < z
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low, -self(low, params)[1]


@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("context_features", [None, 2])
def test_bijection(features, context_features):
    for seed in range(20):
        transform = double(features, seed, context_features=context_features,
                           transformer=flows.AffineTransformer(("tanh", "exp", "softplus", "additive")[seed % 4]))
        x = torch.randn(3, features, dtype=torch.float64)
        context = None if context_features is None else torch.randn(3, context_features, dtype=torch.float64)
        check_bijection(transform, x, context)


@pytest.mark.parametrize("layout", ["chunk", "interleave"])
@pytest.mark.parametrize(("features", "hidden"), [(1, (4,)), (2, (1,)), (6, (9, 3, 8)), (6, ()), (9, (4, 30))])
@pytest.mark.parametrize("context_features", [None, 3])
def test_masks_make_the_network_autoregressive(layout, features, hidden, context_features):
    """Jacobian and product of masks: a feature's params depend on those before it in the order, and, where the layers
    are wide enough, on all of them; on the context always."""
    order = torch.randperm(features)
    network = scattered(flows.MADE(features, 2, hidden, order=order, layout=layout, activation=nn.Tanh,
                                   context_features=context_features).double(), 0.5)
    x = torch.randn(1, features, dtype=torch.float64)
    context = None if context_features is None else torch.randn(1, context_features, dtype=torch.float64)
    raw = torch.autograd.functional.jacobian(lambda x: network(x, context)[0], x)[:, 0]
    matrix = raw.view(2, features, features) if layout == "chunk" else raw.view(features, 2, features).transpose(0, 1)
    in_order = matrix[:, order][:, :, order]
    allowed = torch.ones(features, features).tril(-1).bool()
    assert (in_order[:, ~allowed] == 0).all()
    reach = network.layers[0].mask.double()
    for layer in network.layers[1:]:
        reach = layer.mask.double() @ reach
    assert torch.equal(reach > 0, raw != 0)
    if all(size >= features for size in hidden):
        assert (in_order[:, allowed] != 0).all()
    if context is not None:
        by_context = torch.autograd.functional.jacobian(lambda c: network(x, c)[0], context)[:, 0]
        assert (by_context != 0).any(1).all()


def test_the_jacobian_is_triangular_in_the_order():
    transform = double(5)
    order = transform.network.order
    _, matrix = jacobian(lambda x: transform(x)[0], torch.randn(2, 5, dtype=torch.float64))
    in_order = matrix[:, order][:, :, order]
    assert (in_order.triu(1) == 0).all() and (in_order.diagonal(dim1=1, dim2=2) > 0).all()


@pytest.mark.parametrize("hidden", [(), (5,), (3, 40, 9)])
@pytest.mark.parametrize("transformer", [flows.AffineTransformer, Cubic])
@pytest.mark.parametrize("context_features", [None, 2])
def test_the_sweep_equals_the_plain_loop(hidden, transformer, context_features):
    transform = double(6, hidden=hidden, transformer=transformer(), context_features=context_features)
    z = torch.randn(4, 6, dtype=torch.float64)
    context = None if context_features is None else torch.randn(4, context_features, dtype=torch.float64)
    x, logdet = plain_loop(transform, z, context)
    torch.testing.assert_close(transform.inverse(z, context), (x, logdet), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(transform.inverse(z, context), (x, logdet), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(transform(x, context), (z, -logdet), rtol=1e-10, atol=1e-10)


def test_the_sweep_evaluates_every_hidden_unit_once():
    class Counting(nn.Tanh):
        seen = 0

        def forward(self, x):
            Counting.seen += x.shape[1]
            return super().forward(x)

    transform = double(8, hidden=(20, 30), activation=Counting)
    for mode in (torch.no_grad, torch.enable_grad):
        Counting.seen = 0
        with mode():
            transform.inverse(torch.randn(2, 8, dtype=torch.float64))
        assert Counting.seen == 50


@pytest.mark.parametrize("context_features", [None, 2])
@pytest.mark.parametrize("transformer", [flows.AffineTransformer, Cubic])
@pytest.mark.parametrize("change", ["hook", "prune", "wrapped", "network"])
def test_what_runs_in_a_layer_s_call_runs_in_both_directions(change, transformer, context_features):
    transform = double(4, context_features=context_features, transformer=transformer())
    network = transform.network
    if change == "network":
        network.register_forward_hook(lambda module, inputs, out: 0.5 * out)
    for index, layer in enumerate(network.layers):
        if change == "hook":
            layer.register_forward_hook(lambda module, inputs, out: 1.1 * out)
        elif change == "prune":
            prune.random_unstructured(layer, "weight", 0.5)
            with torch.no_grad():
                layer.weight_orig *= 0.9  # what the next call sees
        elif change == "wrapped":
            network.layers[index] = Halved(layer)
    context = None if context_features is None else torch.randn(3, 2, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    z, logdet = transform(x, context)
    back, minus = transform.inverse(z, context)
    torch.testing.assert_close((back, minus), (x, -logdet))


class Halved(nn.Module):
    """As a low-rank adapter stands before a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x):
        return 0.5 * self.layer(x)


def test_a_pruned_flow_trains_in_the_direction_of_its_sweep():
    flow = flows.IAF(4, n_layers=2, hidden=(8,))
    for layer in [m for m in flow.modules() if isinstance(m, nn.Linear)]:
        prune.random_unstructured(layer, "weight", 0.5)
    optimizer, x = torch.optim.SGD(flow.parameters(), lr=0.1), torch.randn(16, 4)
    for _ in range(2):
        optimizer.zero_grad()
        flow.log_prob(x).mean().neg().backward()
        optimizer.step()


def test_gradients():
    for options in ({}, {"context_features": 2}, {"hidden": ()}):
        transform = double(3, **options)
        context = torch.randn(2, 2, dtype=torch.float64) if "context_features" in options else None
        check_gradients(transform, torch.randn(2, 3, dtype=torch.float64), context)


def test_second_derivatives_and_functional_transforms():
    transform = double(3)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: transform.inverse(z), (z,), fast_mode=True)
    with torch.no_grad():
        by_rows = torch.func.vmap(torch.func.jacrev(lambda v: transform.inverse(v[None])[0][0]))(z.detach())
        forwards = torch.func.vmap(torch.func.jacfwd(lambda v: transform.inverse(v[None])[0][0]))(z.detach())
    _, matrix = jacobian(lambda t: transform.inverse(t)[0], z.detach())
    torch.testing.assert_close(by_rows, matrix.detach())
    torch.testing.assert_close(forwards, matrix.detach())


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("order", ["reverse", "random"])
def test_density_integrates_to_one(name, order):
    options = {} if name == "nice" else {"order": order}
    for features, n in ((1, 2001), (2, 301)):
        flow = FLOWS[name](features, n_layers=3, hidden=(8,), activation=nn.Tanh, context_features=1, **options)
        scattered(flow.double(), 0.1)
        for context in (torch.tensor([-1.0]), torch.tensor([1.5])):
            assert abs(integral(flow, 12, n, features, context.double()) - 1) < 1e-6


@pytest.mark.parametrize("name", FLOWS)
def test_samples_their_density_and_gradients(name):
    flow = scattered(FLOWS[name](3, n_layers=2, hidden=(6,), context_features=2))
    context = torch.randn(5, 2, requires_grad=True)
    x, log_prob = flow.sample_and_log_prob(4, context)
    assert x.shape == (4, 5, 3) and log_prob.shape == (4, 5)
    torch.testing.assert_close(flow.log_prob(x.flatten(0, 1), context.repeat(4, 1)), log_prob.flatten(),
                               rtol=1e-4, atol=1e-4)
    (log_prob.sum() + x.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in flow.parameters())
    assert context.grad.abs().sum() > 0
    assert not flow.sample(2, context).requires_grad and flow.rsample(2, context).requires_grad
    contexts = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert flow(torch.zeros(2, 3), contexts).unique().numel() == 2
    assert flow.sample(0, contexts).shape == (0, 2, 3) and flow(torch.zeros(0, 3), contexts[:0]).shape == (0,)


@pytest.mark.parametrize("name", FLOWS)
def test_starts_as_the_identity_and_follows_the_data(name):
    x = torch.randn(200, 3) * torch.tensor([1.0, 3.0, 0.2]) + 2
    flow = FLOWS[name](3)
    torch.testing.assert_close(flow(x), torch.distributions.Normal(0, 1).log_prob(x).sum(1))
    if name != "nice":
        flow.initialize(x)
        z, _ = flow.transform(x)
        assert z.mean(0).abs().max() < 1e-5 and (z.std(0, correction=0) - 1).abs().max() < 1e-5


def test_maf_fits_a_curved_density():
    """x2 ~ N(x1^2, 1/4) needs the order (x1, x2), in which one affine layer is exact: entropy 2 log(2 pi e) / 2 - log 2
    within 0.02 nats."""
    flow = flows.MAF(2, n_layers=1, hidden=(32,), activation=nn.Tanh, scale="exp")
    x1 = torch.randn(4096, 1)
    x = torch.cat([x1, x1**2 + 0.5 * torch.randn_like(x1)], 1)
    flow.initialize(x)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 200)
        optimizer.zero_grad()
        (-flow(x).mean()).backward()
        optimizer.step()
    fresh = torch.randn(20000, 1)
    fresh = torch.cat([fresh, fresh**2 + 0.5 * torch.randn_like(fresh)], 1)
    true = torch.distributions.Normal(0, 1).log_prob(fresh[:, 0])
    true = true + torch.distributions.Normal(fresh[:, 0]**2, 0.5).log_prob(fresh[:, 1])
    with torch.no_grad():
        assert 0 <= (true - flow(fresh)).mean() + 1e-3 < 0.03


def test_state_dict_brings_its_order():
    first, second = flows.MAF(5, n_layers=2, order="random"), flows.MAF(5, n_layers=2, order="random")
    scattered(first)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(first(x), second(x))
    torch.testing.assert_close(second.transform.inverse(second.transform(x)[0])[0], x, rtol=1e-4, atol=1e-4)


def test_a_transformer_that_is_a_module_and_actnorm_by_choice():
    class Module(nn.Module, Cubic):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x, params):
            return Cubic.__call__(self, x, params + self.gain)

    flow = flows.MAF(3, n_layers=2, hidden=(4,), transformer=Module, actnorm=False)
    assert sum(isinstance(m, Module) for m in flow.modules()) == 2
    assert not any(isinstance(m, ActNorm) for m in flow.modules())


@pytest.mark.parametrize("name", ["maf", "iaf"])
def test_compiles_without_breaks(name):
    flow = scattered(FLOWS[name](2, n_layers=1, hidden=(4,)))
    x = torch.randn(4, 2)
    compiled = torch.compile(flow, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), flow(x))


def test_nice_is_volume_preserving_but_for_its_diagonal():
    flow = scattered(flows.NICE(4).double())
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = flow.transform.transforms[-1].log_scale.sum()
    torch.testing.assert_close(flow.transform(x)[1], expected.expand(5))


def test_nan_stays_in_its_sample():
    """And in the inverse behind its place: the features before it don't see it."""
    transform = double(4, order=[0, 1, 2, 3])
    x = torch.randn(2, 4, dtype=torch.float64)
    x[0, 2] = math.nan
    for direction in (transform, transform.inverse):
        out, logdet = direction(x)
        assert logdet.isnan().tolist() == [True, False] and out[1].isfinite().all() and out[0].isnan().any()
    assert out[0].isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: flows.MADE(0), ValueError, "features"), (lambda: flows.MADE(2, 0), ValueError, "params_per_feature"),
    (lambda: flows.MADE(2, hidden=(0,)), ValueError, "hidden"),
    (lambda: flows.MADE(2, context_features=0), ValueError, "context_features"),
    (lambda: flows.MADE(2, order=[0, 0]), ValueError, "order"),
    (lambda: flows.MADE(2, layout="rows"), ValueError, "layout"),
    (lambda: flows.MADE(2)(torch.zeros(1, 3)), ValueError, "x"),
    (lambda: flows.MADE(2)(torch.zeros(1, 2).double()), TypeError, "weight|x"),
    (lambda: flows.MADE(2)(torch.zeros(1, 2), torch.zeros(1, 1)), ValueError, "context"),
    (lambda: flows.MADE(2, context_features=1)(torch.zeros(1, 2)), ValueError, "context"),
    (lambda: flows.MaskedAutoregressive(2, transformer=object()), TypeError, "transformer"),
    (lambda: flows.MaskedAutoregressive(2).inverse(torch.zeros(1, 3)), ValueError, "z"),
    (lambda: flows.MaskedAutoregressive(2).inverse(torch.zeros(1, 2).double()), TypeError, "weight|z"),
    (lambda: flows.MAF(2, hidden=64), TypeError, "hidden: expected a sequence of ints, got int"),
    (lambda: flows.NICE(2, hidden=64), TypeError, "hidden: expected a sequence of ints, got int"),
    (lambda: flows.ResidualFlow(2, hidden=64), TypeError, "hidden: expected a sequence of ints, got int"),
    (lambda: flows.MAF(0), ValueError, "features"), (lambda: flows.MAF(2, n_layers=-1), ValueError, "n_layers"),
    (lambda: flows.IAF(2, order="sorted"), ValueError, "order"), (lambda: flows.NICE(0), ValueError, "features"),
    (lambda: flows.NICE(2, n_layers=1.5), TypeError, "n_layers"),
    (lambda: flows.NICE(2)(torch.zeros(1, 3)), ValueError, "x|params")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
