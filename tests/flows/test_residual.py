"""Residual flows: the Lipschitz bound, the roulette's log-determinant and gradient, exactness, the inverse."""

import math

import pytest
import torch
from flow_checks import check_bijection, check_gradients, integral, scattered
from torch import nn

from fastflow import flows
from fastflow.nn import ActNorm


def block(features, seed=0, *, bound=0.7, context_features=None, hidden=(6,), size=0.5, **options):
    """A residual block in float64 and eval mode, away from its start."""
    torch.manual_seed(seed)
    net = flows.LipschitzMLP(features, hidden, bound=bound, context_features=context_features)
    return scattered(flows.InvertibleResidual(net, **options).double(), size).eval()


def test_gradients():
    check_gradients(block(3, size=1.0), torch.randn(2, 3, dtype=torch.float64))
    check_gradients(block(2, context_features=1), torch.randn(2, 2, dtype=torch.float64),
                    torch.randn(2, 1, dtype=torch.float64))


def test_second_derivatives_of_the_inverse():
    layer = block(2, hidden=(4,), size=1.0)
    z = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    weight = layer.net.layers[0].weight.detach().clone().requires_grad_()

    def inverse(z, weight):
        return torch.func.functional_call(_Inverse(layer), {"layer.net.layers.0.weight": weight}, (z,))

    assert torch.autograd.gradgradcheck(inverse, (z, weight), fast_mode=True)


class _Inverse(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z):
        return self.layer.inverse(z)


@pytest.mark.parametrize("activation", [flows.LipSwish, nn.ELU, nn.Tanh])
def test_the_lipschitz_bound_holds(activation):
    """Of any pair of points, and of the Jacobian's 2-norm, however large the weights are; a linear net reaches it."""
    for bound in (0.3, 0.97):
        net = scattered(flows.LipschitzMLP(4, (9, 7), bound=bound, activation=activation).double(), 3.0).eval()
        x, y = torch.randn(2, 500, 4, dtype=torch.float64)
        ratio = (net(x) - net(y)).norm(dim=1) / (x - y).norm(dim=1)
        assert ratio.max() <= bound
        _, matrix = flows.jacobian.jacobian(net, x)
        assert torch.linalg.matrix_norm(matrix.detach(), 2).max() <= bound
        linear = scattered(flows.LipschitzMLP(4, (), bound=bound).double(), 3.0).eval()
        norm = torch.linalg.matrix_norm(linear(torch.eye(4).double()) - linear(torch.zeros(1, 4).double()), 2)
        assert 0.99 * bound < norm <= bound * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (3, 7), (64, 64), (40, 200)])
def test_the_spectral_bound(shape):
    for seed in range(20):
        torch.manual_seed(seed)
        weight = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-6, 7, (1,))
        truth = torch.linalg.matrix_norm(weight, 2)
        for value in (flows.lipschitz.spectral_bound(weight), flows.lipschitz.spectral_bound(weight.float()).double()):
            assert 1 - 1e-5 < value / truth < 1.006
    orthogonal = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0]  # the worst case
    assert flows.lipschitz.spectral_bound(orthogonal) == pytest.approx(64 ** (1 / 1024))
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flows.lipschitz.spectral_bound, (weight,))
    small = flows.SpectralLinear(5, 3, 2.0)
    assert torch.equal(small.bounded_weight(), small.weight)  # what is within the bound is left alone
    with torch.no_grad():
        small.weight.zero_()
    small.bounded_weight().sum().backward()
    assert (small.weight.grad == 1).all()


def test_the_bound_holds_throughout_training():
    """Steps of Adam that push the norms far above the bound."""
    net = flows.LipschitzMLP(4, (32, 32), bound=0.9)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    each = 0.9 ** (1 / 3)
    for _ in range(25):
        x = torch.randn(64, 4)
        optimizer.zero_grad()
        (net(x) - 5 * x).square().mean().backward()
        optimizer.step()
        worst = max(torch.linalg.matrix_norm(layer.bounded_weight().detach(), 2) for layer in net.layers)
        assert worst < (1 + 1e-5) * each
    assert min(torch.linalg.matrix_norm(layer.weight.detach(), 2) for layer in net.layers) > each


@pytest.mark.parametrize(("n_exact_terms", "stop"), [(0, 0.4), (2, 0.5)])
def test_roulette_is_unbiased_in_value_and_gradient(n_exact_terms, stop):
    """Means over 200 calls of 100 probes within 4 standard errors of the exact log-determinant and its gradients."""
    layer = block(3, bound=0.6, n_exact_terms=n_exact_terms, stop=stop, exact_training_features=0).train()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = layer.net.layers[1].weight
    values, gradients = [], []
    for _ in range(200):  # the calls are independent; within one the probes share the number of terms
        logdet = layer(x.repeat(100, 1))[1].view(100, 2).mean(0)
        values.append(logdet.detach())
        by_x, by_weight = torch.autograd.grad(logdet.sum(), (x, weight))
        gradients.append(torch.cat([by_x.flatten(), by_weight.flatten()]))
    _, exact = layer.eval()(x)
    by_x, by_weight = torch.autograd.grad(exact.sum(), (x, weight))
    for sample, truth in ((torch.stack(values), exact.detach()),
                          (torch.stack(gradients), torch.cat([by_x.flatten(), by_weight.flatten()]))):
        error = sample.mean(0) - truth
        standard = sample.std(0) / math.sqrt(len(sample))
        assert (error.abs() <= 4 * standard + 1e-12).all(), error / standard
        assert (standard < 0.05).all() and (standard > 0).any()


def test_small_events_are_exact_in_training():
    """Eight elements, no random number; nine are estimated."""
    for features, exact in ((8, True), (9, False)):
        layer, x = block(features), torch.randn(3, features, dtype=torch.float64)
        want = layer(x)[1]
        state = torch.get_rng_state()
        got = layer.train()(x)[1]
        assert torch.equal(got, want) == torch.equal(torch.get_rng_state(), state) == exact != layer.estimates
    assert not flows.ResidualFlow(2).transform.transforms[1].estimates


def test_tabular_events_are_exact_in_eval():
    """The determinant up to 64 elements, so that the two directions are opposite; above, the series under probes."""
    for features, exact in ((64, True), (65, False)):
        layer = block(features, hidden=(32,), size=0.2)
        x = torch.randn(3, features, dtype=torch.float64)
        z, logdet = layer(x)
        truth = torch.linalg.slogdet(flows.jacobian.jacobian(lambda t: layer(t)[0], x)[1])[1]  # noqa: B023
        assert torch.equal(layer(x)[1], logdet) == exact
        assert torch.allclose(logdet, truth, rtol=1e-12) == exact
        assert torch.allclose(layer.inverse(z)[1], -truth, rtol=1e-9) == exact


RESIDUAL = [(lambda: flows.ResidualFlow(3, n_layers=2, hidden=(4,)), (3,)),
            (lambda: flows.ResidualFlowImage((1, 2, 2), 1, 1, 4, n_fc_blocks=1, fc_hidden=(4,)), (1, 2, 2))]


@pytest.mark.parametrize(("make", "shape"), RESIDUAL)
def test_models_can_be_sharded(make, shape, mesh):
    from torch.distributed.fsdp import fully_shard

    flow, x = scattered(make()).eval(), torch.rand(2, *shape) - 0.5
    want = flow(x).detach()
    fully_shard(flow, mesh=mesh)
    torch.testing.assert_close(flow(x), want)


@pytest.mark.parametrize(("make", "shape"), RESIDUAL)
def test_state_dicts_with_slopes_of_no_dimension_load(make, shape):
    flow, x = scattered(make()).eval(), torch.rand(2, *shape) - 0.5
    old = {name: value[0].clone() if name.endswith("beta") else value.clone()
           for name, value in flow.state_dict().items()}
    want = flow(x).detach()
    scattered(flow).load_state_dict(old)
    assert any(value.dim() == 0 for value in old.values()) and torch.equal(flow(x), want)


def test_roulette_weights_are_one_over_the_probability_of_being_reached():
    layer = block(2, n_exact_terms=3, stop=0.25).train()
    lengths = torch.zeros(12)
    for _ in range(4000):
        weights = layer._weights()
        assert weights[:3] == [1.0] * 3
        for index, weight in enumerate(weights[3:]):
            assert weight == pytest.approx(0.75 ** -(index + 1))
        lengths[:min(len(weights), 12)] += 1
    reached = lengths / 4000
    for k in range(3, 12):
        expected = 0.75 ** (k - 2)
        assert abs(reached[k] - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)


def test_the_gradient_s_memory_does_not_grow_with_the_terms():
    sizes = []
    for n_exact_terms in (2, 30):
        layer = block(3, n_exact_terms=n_exact_terms, stop=0.999, exact_training_features=0).train()
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        x = torch.randn(5, 3, dtype=torch.float64)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        sizes.append(total)
    assert sizes[0] == sizes[1]


def test_the_truncated_series_keeps_its_bound():
    layer = block(5, bound=0.7)
    x = torch.randn(4, 5, dtype=torch.float64)
    _, exact = layer(x)
    layer.exact_features = 0
    assert layer.truncation_bound(5, 6) == pytest.approx(5 * 0.7**7 / (7 * 0.3))
    for layer.n_eval_terms in (1, 6, 60):
        estimates = layer(x.repeat(3000, 1))[1].view(3000, 4)
        noise = 4 * estimates.std(0) / math.sqrt(3000)
        assert ((estimates.mean(0) - exact).abs() <= layer.truncation_bound(5) + noise).all()
    assert layer.truncation_bound(5) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_is_within_its_tolerance(dtype):
    """Close to the bound 1, where the iteration is slow: error within tolerance * L / (1 - L)."""
    layer = block(6, bound=0.97, size=2.0).to(dtype)
    z = torch.randn(50, 6, dtype=dtype)
    x, _ = layer.inverse(z)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert ((layer(x)[0] - z).abs() <= 2 * tolerance * (1 + x.abs())).all()


@pytest.mark.parametrize(("features", "n"), [(1, 4001), (2, 301)])
def test_density_integrates_to_one(features, n):
    flow = flows.ResidualFlow(features, n_layers=3, hidden=(8,), context_features=1).double().eval()
    scattered(flow, 0.3)
    for context in (torch.tensor([-1.0]), torch.tensor([1.0])):
        assert abs(integral(flow, 20, n, features, context.double()) - 1) < 1e-6


def test_the_inverse_converges_under_autocast():
    torch.manual_seed(0)
    flow, z = flows.ResidualFlow(3, n_layers=2, hidden=(16,), actnorm=False).eval(), torch.randn(20, 3)
    want = flow.transform.inverse(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(flow.transform.inverse(z), want)


def test_model_samples_and_gradients():
    flow = scattered(flows.ResidualFlow(3, n_layers=2, hidden=(8,), context_features=2))
    context = torch.randn(4, 2, requires_grad=True)
    flow.initialize(torch.randn(32, 3), torch.randn(32, 2))
    flow.eval()
    x, log_prob = flow.sample_and_log_prob(3, context)
    torch.testing.assert_close(flow.log_prob(x.flatten(0, 1), context.repeat(3, 1)), log_prob.flatten(),
                               rtol=1e-3, atol=1e-3)
    (x.sum() + log_prob.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters()) and context.grad.abs().sum() > 0
    assert flow.sample(2, context).shape == (2, 4, 3) and flow(torch.zeros(0, 3), context[:0]).shape == (0,)
    contexts = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    assert flow(torch.zeros(2, 3), contexts).unique().numel() == 2


def test_training_fits():
    """A correlation of 0.95, which ActNorm can't see, is worth 1.16 nats: 50 steps of the estimated likelihood find 0.8
    of them, by the exact one."""
    flow = flows.ResidualFlow(2, n_layers=3, hidden=(16,))
    x = torch.randn(256, 2) @ torch.tensor([[1.0, 0.95], [0.0, math.sqrt(1 - 0.95**2)]])
    flow.initialize(x)
    plain = flows.Flow(ActNorm(2), flows.StandardNormal(2))
    plain.initialize(x)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (-flow(x).mean()).backward()
        optimizer.step()
    assert flow.eval()(x).mean() > plain(x).mean() + 0.8


def test_any_contractive_net_on_images():
    """Half of a convolution with one-sided sums of absolute weights below 1, without bind or bound."""
    conv = nn.Conv2d(2, 2, 3, padding=1).double()
    with torch.no_grad():
        conv.weight.mul_(0.3 / conv.weight.abs().sum())
    layer = flows.InvertibleResidual(nn.Sequential(conv, nn.Tanh())).eval()
    check_bijection(layer, torch.randn(2, 2, 2, 4, dtype=torch.float64))


def test_a_net_without_parameters():
    x = torch.randn(3, 2, dtype=torch.float64)
    for net in (torch.sin, nn.Tanh()):  # whose slopes are cos x and 1 - tanh(x)^2
        slopes = torch.cos(x) if net is torch.sin else 1.0 - torch.tanh(x)**2
        torch.testing.assert_close(flows.InvertibleResidual(net)(x)[1], torch.log(1.0 + slopes).sum(1))


def test_what_does_not_contract_is_said():
    class Steep(nn.Module):
        def forward(self, x):
            return 3 * torch.tanh(x)

    with pytest.raises(RuntimeError, match="did not converge"):
        flows.InvertibleResidual(Steep(), max_iterations=50).eval().inverse(torch.tensor([[0.5]]))
    z = torch.tensor([[math.nan, 1.0], [1.0, 2.0]], dtype=torch.float64)
    x, logdet = block(2).inverse(z)
    assert x[0].isnan().any() and logdet[0].isnan() and x[1].isfinite().all() and logdet[1].isfinite()


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: flows.ResidualFlow(0), ValueError, "features"),
    (lambda: flows.ResidualFlow(2, n_layers=-1), ValueError, "n_layers"),
    (lambda: flows.ResidualFlow(2, bound=1.0), ValueError, "bound"),
    (lambda: flows.ResidualFlow(2, stop=0.0), ValueError, "stop"),
    (lambda: flows.ResidualFlow(2, n_probes=0), ValueError, "n_probes"),
    (lambda: flows.ResidualFlow(2, tolerance=0.0), ValueError, "tolerance"),
    (lambda: flows.LipschitzMLP(2, bound=-1), ValueError, "bound"),
    (lambda: flows.LipschitzMLP(2, (0,)), ValueError, "hidden"),
    (lambda: flows.SpectralLinear(2, 2, 0), ValueError, "bound"),
    (lambda: flows.InvertibleResidual(3), TypeError, "net"),
    (lambda: flows.ResidualFlow(2, actnorm=False)(torch.zeros(1, 3)), ValueError, "x"),
    (lambda: flows.ResidualFlow(2, actnorm=False)(torch.zeros(1, 2).double()), TypeError, "x|weight"),
    (lambda: flows.ResidualFlow(2, actnorm=False).transform.inverse(torch.zeros(1, 3)), ValueError, "z"),
    (lambda: flows.ResidualFlow(2, context_features=1)(torch.zeros(1, 2)), ValueError, "context"),
    (lambda: flows.ResidualFlow(2, context_features=1)(torch.zeros(3, 2), torch.zeros(1, 1)), ValueError, "context"),
    (lambda: flows.ResidualFlow(2)(torch.zeros(1, 2), torch.zeros(1, 2)), ValueError, "context")])
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
