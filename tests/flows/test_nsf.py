"""Spline couplings and neural spline flows: densities, contexts, the start, transformers, training."""

import math

import layouts
import pytest
import torch
from torch import nn

from fastflow import flows, functional
from fastflow.nn import MLP, SplineCoupling


def scattered(module, size=0.3):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("kind", ["rq", "linear"])
@pytest.mark.parametrize(("features", "n"), [(1, 6001), (2, 701)])
def test_density_integrates_to_one(features, n, kind):
    """By the midpoint rule, to what its own error is where the density jumps (linear) or bends (rq)."""
    torch.manual_seed(1)
    flow = scattered(flows.NSF(features, n_layers=4, n_bins=5, hidden=(8,), kind=kind, activation=nn.Tanh).double())
    axis = torch.linspace(-14, 14, n, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * features).reshape(-1, features)
    with torch.no_grad():
        total = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** features
    assert abs(total - 1) < (2e-4 if kind == "rq" else 2e-2)


@pytest.mark.parametrize("permutation", ["flip", "random"])
def test_it_starts_as_the_identity(permutation):
    x = torch.randn(50, 4)
    flow = flows.NSF(4, n_layers=3, permutation=permutation)
    expected = torch.distributions.Normal(0, 1).log_prob(x).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"clamp": 6.9}, {"clamp": 6.9, "min_derivative": 0.3}, {"kind": "linear"},
                                     {"min_derivative": 0.5, "tail_bound": 2.0}], ids=str)
def test_identity_params(options):
    coupling = SplineCoupling(nn.Identity(), n_bins=5, **options)
    x = torch.randn(100, 1, dtype=torch.float64)
    y, logdet = functional.spline(x, coupling.identity_params().double().expand(100, -1), **coupling.options)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logdet, torch.zeros(100, dtype=torch.float64), rtol=0, atol=1e-6)


def test_no_identity_where_slopes_are_above_one():
    with pytest.raises(ValueError, match="^min_derivative"):
        SplineCoupling(nn.Identity(), min_derivative=1.0).identity_params()


def test_context_is_respected():
    flow = scattered(flows.NSF(2, n_layers=3, n_bins=4, hidden=(8,), context_features=2).double())
    x, context = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    one, other = flow.log_prob(x, context), flow.log_prob(x, context.flip(0))
    assert not torch.allclose(one, other)
    torch.testing.assert_close(flow.log_prob(x.flip(0), context.flip(0)), one.flip(0))
    z, logdet = flow.transform(x, context)
    back, opposite = flow.transform.inverse(z, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logdet)
    assert flow.sample(7, context).shape == (7, 6, 2)
    with pytest.raises(ValueError, match="^context"):
        flow.log_prob(x)
    with pytest.raises(ValueError, match="^context"):
        flows.NSF(2).log_prob(x.float(), context.float())


class Constant(nn.Module):
    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x, context=None):
        self.seen = x
        return self.params


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("split", ["checkerboard", "channel", "full"])
def test_masked_formula(split, flip):
    """Each active element goes through the spline of its own params; passive ones stay and give no log-slope."""
    x, params = torch.randn(2, 3, 3, 4), torch.randn(2, 15, 3, 4)
    mask = {"checkerboard": torch.tensor([[(i + j) % 2 == 0 for j in range(4)] for i in range(3)]),
            "channel": torch.tensor([True, False, True])[:, None, None], "full": torch.rand(3, 3, 4) > 0.5}[split]
    layer = SplineCoupling(Constant(params), split=split if split == "checkerboard" else mask, flip=flip, n_bins=2)
    passive = (~mask if flip else mask).expand(3, 3, 4)
    for source in (x, layouts.channels_last(x)):
        z, logdet = layer(source)
        y = functional.spline(x, params)[0]
        torch.testing.assert_close(z, torch.where(passive, x, y))
        slopes = torch.stack([functional.spline(x[:, c, i, j, None], params[:, 5 * c:5 * c + 5, i, j])[1]
                              for c, i, j in (~passive).nonzero().tolist()]).sum(0)
        torch.testing.assert_close(logdet, slopes)
        assert torch.equal(layer.conditioner.seen, torch.where(passive, x, torch.zeros_like(x)))


def test_running_log_det_and_shapes_of_params():
    layer = scattered(SplineCoupling(MLP(2, 2 * 23, (4,))))
    x, carried = torch.randn(3, 4), torch.randn(3)
    z, logdet = layer(x, logdet=carried)
    torch.testing.assert_close(logdet, carried + layer(x)[1])
    torch.testing.assert_close(layer.inverse(z, logdet=logdet)[1], carried, rtol=1e-4, atol=1e-4)
    for split in ("channel", "checkerboard"):
        with pytest.raises(ValueError, match="^conditioner output"):
            SplineCoupling(Constant(torch.zeros(3, 46)), split=split, n_bins=9)(x)


def test_what_it_refuses():
    for call, name in ((lambda: flows.NSF(0), "features"),
                       (lambda: flows.NSF(2, autoregressive=True, n_bins=0), "n_bins"),
                       (lambda: flows.NSF(2, n_layers=-1), "n_layers"),
                       (lambda: flows.NSF(2, n_bins=0), "n_bins"),
                       (lambda: flows.NSF(2, tail_bound=-1.0), "tail_bound"),
                       (lambda: flows.NSF(2, n_bins=1000), "min_width"), (lambda: flows.NSF(2, kind="cubic"), "kind"),
                       (lambda: flows.NSF(2, permutation="sorted"), "permutation"),
                       (lambda: flows.NSF(2, tails="round"), "tails"),
                       (lambda: flows.NSF(2, tails=None, kind="linear"), "tails"),
                       (lambda: flows.SplineTransformer(4, kind="linear", tails="circular"), "tails"),
                       (lambda: flows.PeriodicShift(2, math.inf), "bound"),
                       (lambda: flows.PeriodicShift(0), "channels"),
                       (lambda: flows.PeriodicShift(2)(torch.zeros(3, 4)), "x"),
                       (lambda: SplineCoupling(nn.Identity(), split="half"), "split")):
        with pytest.raises(ValueError, match=f"^{name}"):
            call()


def test_the_transformer_of_autoregressive_layers():
    """Its params are interleaved, those of a feature side by side, and it does what the operation does."""
    transformer = flows.SplineTransformer(4, tail_bound=2.0)
    assert transformer.params_per_feature == 11 and transformer.layout == "interleave"
    x, params = torch.randn(5, 3).double(), torch.randn(5, 33).double()
    z, logdet = transformer(x, params)
    parts = [functional.spline(x[:, c:c + 1], params[:, 11 * c:11 * c + 11], tail_bound=2.0) for c in range(3)]
    torch.testing.assert_close(z, torch.cat([p[0] for p in parts], 1))
    torch.testing.assert_close(logdet, sum(p[1] for p in parts))
    back, opposite = transformer.inverse(z, params)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(opposite, -logdet)
    assert repr(transformer) == "SplineTransformer(4, kind='rq', tail_bound=2.0)"


@pytest.mark.parametrize("permutation", ["flip", "random"])
@pytest.mark.parametrize("features", [1, 2, 4])
def test_autoregressive(features, permutation):
    """Identity at first; then both directions, log-determinants against the Jacobian, the context, and gradients."""
    torch.manual_seed(0)
    flow = flows.NSF(features, n_layers=3, n_bins=5, hidden=(12,), context_features=2, autoregressive=True,
                     permutation=permutation).double()
    x = 1.5 * torch.randn(6, features, dtype=torch.float64)
    context = torch.randn(6, 2, dtype=torch.float64)
    z, logdet = flow.transform(x, context)
    torch.testing.assert_close(z, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logdet, torch.zeros(6, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    scattered(flow)
    assert flows.check_invertible(flow.transform, x, context, tolerance=1e-7).ok
    assert not torch.allclose(flow.log_prob(x, context), flow.log_prob(x, -context))
    samples, log_prob = flow.sample_and_log_prob(3, context)
    torch.testing.assert_close(log_prob[1], flow.log_prob(samples[1], context))
    assert torch.autograd.gradcheck(lambda t: flow.log_prob(t, context[:2]), x[:2].requires_grad_())


def test_it_learns_a_mixture_on_a_ring():
    """Eight Gaussians around a circle: after 300 short steps the KL divergence is below 0.08 nats."""
    torch.manual_seed(0)
    angles = torch.arange(8) * (math.pi / 4)
    centres = 2.0 * torch.stack([angles.cos(), angles.sin()], 1)
    target = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(8)),
        torch.distributions.Independent(torch.distributions.Normal(centres, 0.3), 1))
    flow = flows.NSF(2, n_layers=4, n_bins=8, hidden=(32, 32), tail_bound=4.0)
    flow.initialize(target.sample((1024,)))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):
        loss = -flow.log_prob(target.sample((256,))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    x = target.sample((5000,))
    with torch.no_grad():
        kl = (target.log_prob(x) - flow.log_prob(x)).mean()
    assert 0 <= kl < 0.08, kl


def angles(features=2, **options):
    torch.manual_seed(2)
    options = {"n_layers": 3, "n_bins": 4, "hidden": (8,), "activation": nn.Tanh, "tail_bound": math.pi, **options}
    return scattered(flows.NSF(features, **{"tails": "circular", **options}).double(), 0.2)


def midpoints(low, high, n):
    return low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("tails", ["circular", None])
def test_densities_on_boxes_and_tori_integrate_to_one(tails, autoregressive):
    flow = angles(tails=tails, autoregressive=autoregressive)
    axis = midpoints(-math.pi, math.pi, 250)
    with torch.no_grad():
        total = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().mean() * (2 * math.pi) ** 2
        x = flow.sample(1000)
    assert abs(total - 1) < (1e-4 if not autoregressive else 1e-3)  # which may jump where its networks' inputs do
    assert (x >= -math.pi).all() and (x < math.pi).all()


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("features", [1, 3])
def test_densities_of_angles_are_periodic(features, autoregressive):
    flow = angles(features, autoregressive=autoregressive, permutation="random", context_features=2)
    x = 2 * math.pi * (torch.rand(50, features, dtype=torch.float64) - 0.5)
    context = torch.randn(50, 2, dtype=torch.float64)
    turns = torch.randint(-2, 3, x.shape).double()
    torch.testing.assert_close(flow.log_prob(x + 2 * math.pi * turns, context), flow.log_prob(x, context), rtol=1e-9,
                               atol=1e-9)
    assert flows.check_invertible(flow.transform, x, context, tolerance=1e-8).ok
    at_the_seam = torch.cat([torch.full_like(x, math.pi), torch.full_like(x, -math.pi)])
    values = flow.log_prob(at_the_seam, context.repeat(2, 1))
    torch.testing.assert_close(values[:50], values[50:])


def test_the_density_of_couplings_goes_on_across_the_seam():
    """With its gradient: on both sides of it, in either angle, passive or active at first."""
    flow = angles()
    near = torch.tensor([[math.pi, 0.7], [-math.pi, 0.7], [0.7, math.pi], [0.7, -math.pi]], dtype=torch.float64)
    near = (near * (1 - 1e-10)).requires_grad_()
    values = flow.log_prob(near)
    grads, = torch.autograd.grad(values.sum(), near)
    torch.testing.assert_close(values[::2], values[1::2], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(grads[::2], grads[1::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tails", ["circular", None])
@pytest.mark.parametrize("autoregressive", [False, True])
def test_without_linear_tails_it_starts_as_the_uniform_law(autoregressive, tails):
    flow = flows.NSF(3, n_layers=2, tails=tails, tail_bound=2.0, autoregressive=autoregressive)
    x = 4.0 * torch.rand(20, 3) - 2.0
    torch.testing.assert_close(flow.log_prob(x), torch.full((20,), -3.0 * math.log(4.0)), rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.transform(x)[0], x, rtol=0, atol=1e-5)
    own = flows.NSF(3, tails=tails, base=flows.StandardNormal(3))
    assert isinstance(own.base, flows.StandardNormal)


def test_outside_of_the_box_there_is_no_density():
    flow = angles(tails=None, tail_bound=1.0)
    x = torch.tensor([[0.5, 1.01], [-1.01, 0.5], [math.inf, 0.5], [0.5, -math.inf], [1.0, -1.0]]).double()
    x.requires_grad_()
    values = flow.log_prob(x)
    assert torch.isneginf(values[:4]).all() and torch.isfinite(values[4])
    assert torch.isfinite(torch.autograd.grad(values.sum(), [x, *flow.parameters()])[0]).all()
    assert torch.isnan(flow.log_prob(torch.tensor([[0.5, math.nan]]).double())).all()


def test_box_flows_learn_densities_at_the_edge():
    """p = (1 + x)/2 on (-1, 1) by a full-batch fit to its quantiles, seen at the ends within 5 %."""
    torch.manual_seed(0)
    flow = flows.NSF(1, n_layers=1, n_bins=4, hidden=(), tail_bound=1.0, tails=None).double()
    x = (2.0 * midpoints(0.0, 1.0, 512).sqrt() - 1.0)[:, None]
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -flow.log_prob(x).mean()
        value.backward()
        return value
    optimizer.step(loss)
    at = torch.tensor([[-0.9], [0.0], [0.998]], dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(at).exp(), (1.0 + at[:, 0]) / 2.0, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("split", ["channel", "checkerboard"])
def test_a_periodic_conditioner_sees_cosines_and_sines(split):
    """Of the passive part alone, and the params are those of the layer without."""
    layer = SplineCoupling(Constant(torch.randn(2, 2 * 12, 3, 3) if split == "channel" else
                                    torch.randn(2, 4 * 12, 3, 3)), split=split, n_bins=4, tails="circular",
                           tail_bound=2.0, periodic=True)
    x = 4.0 * torch.rand(2, 4, 3, 3) - 2.0
    z, logdet = layer(x)
    seen = x[:, :2] if split == "channel" else torch.where(layer._passive(x)[0], x, 0.0)
    angle = math.pi / 2.0 * seen
    torch.testing.assert_close(layer.conditioner.seen, torch.cat([angle.cos(), angle.sin()], 1))
    torch.testing.assert_close(layer.inverse(z)[0], x, rtol=1e-4, atol=1e-4)
    assert "tails='circular', periodic=True" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_periodic_shifts(dtype):
    layer = flows.PeriodicShift(2, 3.3)
    layer = layer.double() if dtype == torch.float64 else layer
    with torch.no_grad():
        layer.shift.copy_(torch.tensor([2.0, -17.3]))
    x = (40.0 * torch.randn(200, 2, 3)).to(dtype)
    z, logdet = layer(x)
    low, high = (torch.tensor(end, dtype=dtype) for end in (-3.3, 3.3))
    assert z.dtype == dtype and (z >= low).all() and (z < high).all() and not logdet.any()
    turns = (x.double() + layer.shift.double()[:, None] - z.double()) / 6.6
    size = 0.5 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=size / 6.6)
    back = layer.inverse(z)[0]
    turns = (x.double() - back.double()) / 6.6
    torch.testing.assert_close(turns, turns.round(), rtol=0, atol=size / 6.6)
    grads = torch.autograd.grad(layer(x)[0].float().sum(), layer.shift)[0]
    torch.testing.assert_close(grads, torch.full_like(grads, 600.0))


def test_uniform_bases_have_the_digits_of_their_dtype():
    """A number that float32 can't hold is not what float32 made of it once the flow is in float64."""
    base = flows.NSF(2, tails=None, tail_bound=3.3).double().base
    assert base.low.tolist() == [-3.3, -3.3] and base.high.tolist() == [3.3, 3.3]
    assert base.log_prob(torch.zeros(1, 2).double()).item() == pytest.approx(-2 * math.log(6.6), rel=1e-14)
    loaded = flows.Uniform(-3.3, 3.3, (2,))
    loaded.load_state_dict({"low": torch.tensor([-1.0, -2.0]), "high": torch.tensor([1.0, 2.0])})
    assert loaded.double().low.tolist() == [-1.0, -2.0]
