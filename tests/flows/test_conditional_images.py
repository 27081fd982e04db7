"""Image flows under a context, a vector or an image; Flow++ and RealNVP on integers."""

import copy
import math

import pytest
import torch
from flow_checks import scattered

from fastflow import flows
from fastflow.flows import memory
from fastflow.nn import ConvNet, ConvResNet, GatedAttentionNet

SMALL_PP = {"n_checkerboard": 2, "n_channel": 1, "n_final": 1, "n_components": 2, "hidden_channels": 8, "n_blocks": 1,
            "n_heads": 2, "dropout": 0.0, "dequantization_couplings": 2, "dequantization_blocks": 1}
MODELS = {
    "glow": lambda **kw: flows.Glow((3, 8, 8), 2, 2, 8, **kw),
    "glow-plu-haar": lambda **kw: flows.Glow((3, 8, 8), 2, 2, 8, parametrization="plu", squeeze="haar", **kw),
    "glow-additive": lambda **kw: flows.Glow((3, 8, 8), 2, 2, 8, scale="additive", **kw),
    "realnvp": lambda **kw: flows.RealNVPImage((3, 8, 8), 3, 2, 8, 1, **kw),
    "flowpp": lambda **kw: flows.FlowPP((3, 8, 8), **SMALL_PP, **kw),
}
CONTEXTS = {"vector": ({"context_features": 5}, (5,)), "image": ({"context_channels": 2}, (2, 8, 8))}


@pytest.mark.parametrize("kind", CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_context_is_respected(name, kind):
    options, shape = CONTEXTS[kind]
    model = scattered(MODELS[name](**options), 0.05).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64) * 0.98 - 0.49
    context = torch.randn(4, *shape, dtype=torch.float64, requires_grad=True)
    model.initialize(x, context)
    z, logdet = model.transform(x, context)
    back, opposite = model.transform.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(opposite, -logdet, rtol=1e-7, atol=1e-7)
    log_prob = model(x, context)
    assert (model(x, context.flip(0)) != log_prob).all()
    torch.testing.assert_close(model(x.flip(0), context.flip(0)), log_prob.flip(0))
    (grad,) = torch.autograd.grad(log_prob[1], context)
    assert grad[1].abs().sum() > 0 and grad[[0, 2, 3]].abs().sum() == 0
    draws = model.sample(2, context, temperature=0.2, generator=torch.Generator().manual_seed(1))
    assert draws.shape == (2, 4, 3, 8, 8)
    other = model.sample(2, context + 1, temperature=0.2, generator=torch.Generator().manual_seed(1))
    assert (draws - other).abs().flatten(2).amax(2).gt(0).all()
    for bad in (None, context[:, :1], context[:2]):
        with pytest.raises(ValueError, match="^context"):
            model(x, bad)
    with pytest.raises(ValueError, match="^context"):
        MODELS[name]().double()(x, context)


@pytest.mark.parametrize("kind", CONTEXTS)
def test_priors_of_glow_see_the_context(kind):
    """Alone, with couplings that ignore it: the latents of every level, by (x - mu) / sigma; nothing at the start."""
    options, shape = CONTEXTS[kind]
    model = MODELS["glow"](**options).double()
    x, context = torch.rand(3, 3, 8, 8, dtype=torch.float64) - 0.5, torch.randn(3, *shape, dtype=torch.float64)
    transform = model.transform
    z, before_logdet = transform(x, context)
    plain = model.unpack(z)
    torch.testing.assert_close(model(x, context), model(x, context + 1))
    priors = [transform.levels[0].split.prior, transform.prior]
    for prior in priors:
        scattered(prior.shift, 0.3)
    z, logdet = transform(x, context)
    expected = 0.0
    for prior, latent, before in zip(priors, model.unpack(z), plain, strict=True):
        params = prior.shift(latent, context).expand(-1, -1, *latent.shape[2:])
        mu, log_sigma = params.chunk(2, 1)[0], 5 * torch.tanh(params.chunk(2, 1)[1] / 5)
        torch.testing.assert_close(latent, (before - mu) * torch.exp(-log_sigma))
        expected = expected - log_sigma.flatten(1).sum(1)
    torch.testing.assert_close(logdet, before_logdet + expected)
    torch.testing.assert_close(transform.inverse(z, context)[0], x)
    assert MODELS["glow"](learn_prior=False, **options).transform.prior is None


@pytest.mark.parametrize("mode", ["save_z", "invert"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_modes_give_the_plain_gradients(name, mode):
    options, shape = CONTEXTS["image"]
    model = scattered(MODELS[name](**options), 0.1).double()
    x, context = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 0.98 - 0.49, torch.randn(2, *shape, dtype=torch.float64)
    model.initialize(x, context)
    context.requires_grad_()
    tensors = [context, *model.transform.parameters()]
    plain = torch.autograd.grad(model(x, context).sum(), tensors)
    with memory.saving(memory.Mode(mode, model)):
        value = model(x, context).sum()
    for a, b in zip(torch.autograd.grad(value, tensors), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_empty_batches_under_a_conditioning_image(name):
    model = MODELS[name](context_channels=2)
    x, context = torch.zeros(0, 3, 8, 8), torch.zeros(0, 2, 8, 8)
    assert model(x, context).shape == (0,)
    assert model.sample(2, context).shape == (2, 0, 3, 8, 8)
    assert model.sample(0, torch.zeros(3, 2, 8, 8)).shape == (0, 3, 3, 8, 8)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(2, 2, 7, 7), (2, 2), (2, 2, 8), (2, 2, 16, 16), (2, 3, 8, 8)])
def test_a_conditioning_image_of_another_shape_is_named(name, shape):
    with pytest.raises(ValueError, match="^context"):
        MODELS[name](context_channels=2)(torch.zeros(2, 3, 8, 8), torch.zeros(shape))


def test_a_conditioning_image_reaches_what_lies_beside_it():
    """Unshuffled, not averaged: a pixel of the context moves parameters around its own place alone."""
    net = ConvNet(6, 6, 4, context_channels=8, arrange=torch.nn.PixelUnshuffle(2))
    with torch.no_grad():
        net.conv3.weight.normal_()
    x, context = torch.randn(1, 6, 8, 8), torch.randn(1, 2, 16, 16)
    other = context.clone()
    other[0, 1, 0, 1] += 10.0
    moved = (net(x, context) != net(x, other)).any(1)[0]
    assert moved.any() and not moved[3:].any() and not moved[:, 3:].any()


@pytest.mark.parametrize("name", ["realnvp", "flowpp"])
def test_multi_scale_shapes_temperature_and_bits(name):
    model = scattered(MODELS[name](), 0.05)
    x = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8)
    model.initialize(x if name == "flowpp" else flows.dequantize(x))
    z = model.transform(flows.dequantize(x))[0]
    assert [tuple(t.shape[1:]) for t in model.unpack(z)] == (
        [(12, 4, 4)] if name == "flowpp" else [(6, 4, 4), (12, 2, 2), (12, 2, 2)])
    bits = model.bits_per_dim(x, generator=torch.Generator().manual_seed(1))
    assert bits.shape == (8,) and 6 < bits.mean() < 10
    assert torch.equal(bits, model.bits_per_dim(x, generator=torch.Generator().manual_seed(1)))
    cold = [model.sample(64, temperature=t, generator=torch.Generator().manual_seed(1)) for t in (0.0, 0.3, 1.0)]
    assert torch.equal(cold[0], cold[0][:1].expand(64, -1, -1, -1))
    assert 0 < cold[1].std(0).mean() < cold[2].std(0).mean()
    assert model.sample(0).shape == (0, 3, 8, 8) and model(flows.dequantize(x[:0])).shape == (0,)
    assert torch.isfinite(model(flows.dequantize(torch.zeros_like(x)))).all()


def test_realnvps_halves_are_the_rows_of_each_block():
    """Halves of the channels that no checkerboard coupling has: pixels of the upper row, pixels of the lower."""
    transforms = flows.RealNVPImage((3, 4, 4), 2, 1, 4, 1).transform.transforms
    squeeze = next(i for i, t in enumerate(transforms) if isinstance(t, flows.Squeeze))
    rows = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 3, 4, 4)
    z = transforms[squeeze + 1](transforms[squeeze](rows)[0])[0]
    assert (z[:, :6] % 2 == 0).all() and (z[:, 6:] % 2 == 1).all()


def test_flowpp_on_integers_is_the_bound():
    model = scattered(MODELS["flowpp"](), 0.05)
    x = torch.randint(0, 256, (4, 3, 8, 8))
    model.initialize(x)
    torch.manual_seed(2)
    bound = model(x)
    torch.manual_seed(2)
    values, contribution = model.dequantization(x)
    assert torch.equal(((values + 0.5) * 256).floor().long(), x)
    torch.testing.assert_close(bound, model(values) + contribution)
    bound.sum().backward()
    parameters = dict(model.dequantization.named_parameters())
    assert parameters and all(p.grad.abs().sum() > 0 for p in parameters.values())
    uniform = flows.FlowPP((3, 8, 8), **SMALL_PP, dequantization="uniform")
    assert not list(uniform.dequantization.parameters())
    assert flows.FlowPP((3, 8, 8), **SMALL_PP, dequantization=None).bits_per_dim(x).shape == (4,)
    torch.testing.assert_close(bound / (-192 * math.log(2)), model.bits_per_dim(x), rtol=0.2, atol=0)


def test_training_searches_no_roots(monkeypatch):
    """Couplings of the dequantising flow run in their closed-form direction when noise is drawn."""
    model = MODELS["flowpp"]()
    monkeypatch.setattr("fastflow.nn.logistic_mixture._Root._solve", lambda *_: pytest.fail("a root was searched"))
    model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).sum().backward()
    with pytest.raises(pytest.fail.Exception):
        model.sample(1)


def test_the_dequantising_flow_is_exact():
    """q(u | x) of Flow++ against a float64 Jacobian, and its inverse."""
    model = scattered(flows.FlowPP((1, 2, 4), **SMALL_PP), 0.2).double()
    noise, encoder = model.dequantization.noise, model.dequantization.encoder
    context = encoder(torch.rand(2, 1, 2, 4, dtype=torch.float64) - 0.5)
    report = flows.check_invertible(noise.transform, torch.rand(2, 1, 2, 4, dtype=torch.float64), context,
                                    tolerance=1e-7)
    assert report.ok, str(report)


@pytest.mark.parametrize("make", [lambda **kw: ConvNet(2, 3, 4, **kw), lambda **kw: ConvResNet(2, 3, 4, 1, **kw),
                                  lambda **kw: GatedAttentionNet(2, 3, (4, 4), 4, 1, 2, **kw)])
def test_conditioners_start_at_zero_and_refuse_wrong_contexts(make):
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(make()(x), torch.zeros(2, 3, 4, 4))
    for options, context in (({}, torch.zeros(2, 1)), ({"context_features": 3}, None),
                             ({"context_features": 3}, torch.zeros(2, 2)),
                             ({"context_channels": 1}, torch.zeros(2, 1, 4, 2))):
        with pytest.raises(ValueError, match="^context"):
            make(**options)(x, context)
    with pytest.raises(ValueError, match="^context_channels"):
        make(context_features=1, context_channels=1)


def test_attention_sees_every_position():
    net = scattered(GatedAttentionNet(2, 3, (6, 6), 4, 1, 2))
    x = torch.randn(1, 2, 6, 6)
    far = x.clone()
    far[0, :, 5, 5] += 1.0
    assert (net(far) != net(x)).any(1)[0, 0, 0]
    local = scattered(GatedAttentionNet(2, 3, (6, 6), 4, 1, 0))
    assert not (local(far) != local(x)).any(1)[0, 0, 0]
    assert copy.deepcopy(net).double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize(("make", "message"), [
    (lambda: flows.RealNVPImage((3, 6, 8), 3), "image_shape"),
    (lambda: flows.RealNVPImage((3, 8), 1), "image_shape"),
    (lambda: flows.RealNVPImage((3, 8, 8), 0), "n_levels"),
    (lambda: flows.RealNVPImage((3, 8, 8), 1, 1, 4, alpha=0.5), "alpha"),
    (lambda: flows.FlowPP((3, 8, 6)), "image_shape"),
    (lambda: flows.FlowPP((3, 8, 8), hidden_channels=6, n_heads=4), "hidden_channels"),
    (lambda: flows.FlowPP((3, 8, 8), dequantization="flow"), "dequantization"),
    (lambda: flows.FlowPP((3, 8, 8), n_components=0), "n_components"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4, context_features=0), "context_features"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4, context_features=1, context_channels=1), "context_channels"),
    (lambda: flows.RealNVPImage((3, 8, 8), 1, 1, 4, context_features=1, context_channels=1), "context_channels"),
    (lambda: flows.FlowPP((3, 8, 8), context_features=1, context_channels=1), "context_channels"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()
