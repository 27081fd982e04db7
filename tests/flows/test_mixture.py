"""Distribution functions of logistic mixtures: closed form, tails, inverse to rounding, gradients, densities."""

import itertools
import math

import pytest
import torch
from flow_checks import check_bijection, check_gradients, integral, scattered
from torch import nn

from fastflow import flows
from fastflow.nn import MLP, MixtureCoupling
from fastflow.nn.logistic_mixture import logistic_mixture

SIZES = {1: 0, 2: 1, 5: 2}  # features: passive ones


def coupling(features, seed=0, *, n_components=3, context_features=None, size=0.5, activation=nn.Tanh):
    torch.manual_seed(seed)
    passive = SIZES[features]
    net = MLP(passive, (features - passive) * (3 * n_components + 2), (6,), context_features=context_features,
              activation=activation)
    return scattered(MixtureCoupling(net, n_components=n_components), size).double()


def params(shape, n_components, spread, dtype=torch.float64):
    return spread * torch.randn(shape[0], shape[1] * (3 * n_components + 2), *shape[2:], dtype=dtype)


def test_it_is_the_mixtures_density():
    """Over a logistic base, without scale and shift, the density is the mixture written out."""
    layer = scattered(flows.LogisticMixture(2, 3).double(), 0.7)
    with torch.no_grad():
        layer.params.view(2, 11)[:, 9:] = 0.0
    x = torch.randn(50, 2, dtype=torch.float64) * 3
    weights, means, scales = layer.params.view(2, 11)[:, :9].unflatten(1, (3, 3)).unbind(1)
    u = (x[..., None] - means) / torch.exp(7 * torch.tanh(scales / 7))
    pdf = torch.sigmoid(u) * torch.sigmoid(-u) / torch.exp(7 * torch.tanh(scales / 7))
    expected = (weights.softmax(1) * pdf).sum(2).log().sum(1)
    flow = flows.Flow(layer, flows.StandardLogistic(2)).double()
    torch.testing.assert_close(flow.log_prob(x), expected)
    cdf = (weights.softmax(1) * torch.sigmoid(u)).sum(2)
    torch.testing.assert_close(layer(x)[0], torch.logit(cdf))


def test_samples_follow_the_mixture():
    layer = scattered(flows.LogisticMixture(1, 3), 0.7)
    draws = flows.Flow(layer, flows.StandardLogistic(1)).sample(20000).double()
    layer = layer.double()
    uniform = torch.sort(torch.sigmoid(layer(draws)[0]).flatten()).values.detach()
    deviation = (uniform - (torch.arange(20000) + 0.5) / 20000).abs().max()
    assert deviation < 1.95 / math.sqrt(20000)  # Kolmogorov's bound at a probability of 0.001


def test_tails_keep_their_precision():
    """Where sigmoids round to 0 or 1 and a density underflows, float32 agrees with float64."""
    x = torch.tensor([-1e4, -300.0, -60.0, -20.0, 20.0, 60.0, 300.0, 1e4], dtype=torch.float64)[:, None]
    raw = params((1, 1), 4, 1.0).expand(8, -1)
    z, logdet = logistic_mixture(x, raw)
    single, single_logdet = logistic_mixture(x.float(), raw.float())
    torch.testing.assert_close(single.double(), z, rtol=1e-5, atol=0)
    torch.testing.assert_close(single_logdet.double(), logdet, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(logistic_mixture(z, raw, inverse=True)[0], x, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n_components", "spread"), [(1, 3.0), (4, 0.5), (8, 2.0), (4, 6.0)])
def test_inverse_to_rounding(n_components, spread, dtype):
    """f(inverse(z)) is z but for the rounding of x, times the slope, and of f, also where f is flat between components
    far apart."""
    z = torch.randn(8000, 1, dtype=dtype) * 4
    raw = params((8000, 1), n_components, spread, dtype)
    x, opposite = logistic_mixture(z, raw, inverse=True)
    assert torch.isfinite(x).all() and torch.isfinite(opposite).all()
    again, logdet = logistic_mixture(x, raw)
    weights, means, scales = raw[:, :-2].chunk(3, 1)
    knots = means.abs() / torch.exp(7 * torch.tanh(scales / 7))  # what an element's u may lose
    allowed = 1 + z.abs() + torch.exp(logdet)[:, None] * x.abs() + knots.amax(1, keepdim=True)
    assert ((again - z).abs() / allowed).max() < 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(opposite, -logdet)


@pytest.mark.parametrize("features", SIZES)
def test_bijection(features):
    for seed in range(20):
        context_features = 2 if seed % 2 else None
        layer = coupling(features, seed, context_features=context_features)
        context = None if context_features is None else torch.randn(3, 2, dtype=torch.float64)
        check_bijection(layer, 2 * torch.randn(3, features, dtype=torch.float64), context, tolerance=1e-8)


@pytest.mark.parametrize("context_features", [None, 2])
def test_gradients(context_features):
    """Both directions, those of the inverse by the implicit function theorem, in x, context and parameters."""
    layer = coupling(5, context_features=context_features)
    context = None if context_features is None else torch.randn(2, 2, dtype=torch.float64)
    check_gradients(layer, torch.randn(2, 5, dtype=torch.float64), context)


def test_second_derivatives():
    z, raw = (t.requires_grad_() for t in (torch.randn(2, 2, dtype=torch.float64), params((2, 2), 2, 0.5)))
    for inverse in (False, True):
        assert torch.autograd.gradgradcheck(lambda z, raw, i=inverse: logistic_mixture(z, raw, inverse=i), (z, raw))


def test_density_integrates_to_one():
    for features, n in ((1, 4001), (2, 401)):
        layers = [coupling(features, seed, context_features=1, size=0.25) for seed in range(3)]
        flow = flows.Flow(flows.Compose(*itertools.chain(*((layer, flows.Reverse()) for layer in layers))),
                          flows.StandardNormal(features)).double()
        for context in (torch.tensor([-1.0]), torch.tensor([0.5])):
            assert abs(integral(flow, 20.0, n, features, context.double()) - 1) < 1e-4


def test_it_starts_near_the_identity_and_components_part():
    """Started alike, components would get the same gradient for ever."""
    layer = MixtureCoupling(MLP(1, 14, (4,)), n_components=4)
    with torch.no_grad():
        layer.conditioner.layers[-1].bias.copy_(layer.start_params())
    x = torch.randn(100, 2)
    z, logdet = layer(x)
    assert (z - x).abs().max() < 0.4 and logdet.abs().max() < 0.3
    (z.square().sum() / 2 - logdet.sum()).backward()
    grads = layer.conditioner.layers[-1].bias.grad[:12].view(3, 4)
    assert all(len(row.unique()) == 4 for row in grads)


def test_autoregressive():
    layer = flows.MaskedAutoregressive(3, (8,), transformer=flows.MixtureTransformer(3), context_features=2)
    assert torch.equal(layer.network.layers[-1].bias.view(3, 11), layer.transformer.start_params().expand(3, -1))
    layer = scattered(layer).double()
    context = torch.randn(4, 2, dtype=torch.float64)
    check_bijection(layer, torch.randn(4, 3, dtype=torch.float64), context, tolerance=1e-8)
    maf = flows.MAF(2, n_layers=2, transformer=lambda: flows.MixtureTransformer(3))
    assert maf.sample(3).shape == (3, 2)


def test_what_is_not_finite_stays_where_it_is():
    x = torch.zeros(3, 2)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    raw = params((3, 2), 3, 0.5, torch.float32)
    for inverse in (False, True):
        z = logistic_mixture(x, raw, inverse=inverse)[0]
        assert torch.isnan(z[0, 0]) and z[1, 1] == torch.inf and torch.isfinite(z).sum() == 4


def test_images_half_precision_and_running_log_dets():
    x, raw, carried = torch.randn(2, 3, 4, 5), params((2, 3, 4, 5), 2, 0.5, torch.float32), torch.randn(2)
    z, logdet = logistic_mixture(x, raw, logdet=carried)
    flat = [t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, raw)]
    expected, slopes = logistic_mixture(*flat)
    torch.testing.assert_close(z, expected.view(2, 4, 5, 3).permute(0, 3, 1, 2))
    torch.testing.assert_close(logdet, carried + slopes.view(2, -1).sum(1))
    torch.testing.assert_close(logistic_mixture(z, raw, inverse=True, logdet=logdet)[1], carried, rtol=0, atol=1e-4)
    assert logistic_mixture(x, raw.bfloat16())[0].dtype == torch.float32
    assert logistic_mixture(x[:0], raw[:0])[1].shape == (0,)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: MixtureCoupling(nn.Identity(), n_components=0), "n_components"),
    (lambda: MixtureCoupling(nn.Identity(), scale="additive"), "scale"),
    (lambda: MixtureCoupling(nn.Identity(), log_scale_bound=0.0), "log_scale_bound"),
    (lambda: logistic_mixture(torch.zeros(2, 2), torch.zeros(2, 9)), "params"),
    (lambda: logistic_mixture(torch.zeros(2, 2), torch.zeros(3, 10)), "params"),
    (lambda: logistic_mixture(torch.zeros(2), torch.zeros(2, 5)), "x"),
    (lambda: flows.LogisticMixture(3)(torch.zeros(2, 2)), "x"),
    (lambda: flows.MixtureTransformer(-1), "n_components"),
    (lambda: MixtureCoupling(MLP(1, 10), n_components=3)(torch.zeros(2, 2)), "conditioner output"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
