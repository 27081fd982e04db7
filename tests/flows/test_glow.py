"""Glow: against a plain model, its multi-scale latents, formats, compilation."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from fastflow import flows
from fastflow.nn import ActNorm


def glow(**options):
    """A small Glow in float64 with every parameter moved off its start, and images."""
    model = flows.Glow((3, 8, 8), **{"n_levels": 2, "n_steps": 2, "hidden_channels": 8, **options}).double()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64) - 0.5
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, x


def plain_log_prob(model, x):
    """The same density written out in eager PyTorch, layer by layer, the normalisation not folded."""
    logdet, latents = 0.0, []
    for level in model.transform.levels:
        x = F.pixel_unshuffle(x, 2)
        positions = x.shape[2] * x.shape[3]
        for step in level.steps:
            norm, net = step.conv.actnorm, step.coupling.conditioner
            x = (x + norm.bias[:, None, None]) * norm.log_scale.exp()[:, None, None]
            x = F.conv2d(x, step.conv.weight[:, :, None, None])
            x1, x2 = x.chunk(2, 1)
            h = F.relu(F.conv2d(x1, net.conv1.weight, net.conv1.bias, padding=1))
            h = F.conv2d(h, net.conv2.weight, net.conv2.bias)
            t, r = F.conv2d(F.relu(h), net.conv3.weight, net.conv3.bias, padding=1).chunk(2, 1)
            x = torch.cat([x1, (x2 + t) * torch.sigmoid(r + 2)], 1)
            logdet = logdet + positions * (norm.log_scale.sum() + torch.linalg.slogdet(step.conv.weight)[1])
            logdet = logdet + F.logsigmoid(r + 2).sum((1, 2, 3))
        if level.split is not None:
            x, x2 = x.chunk(2, 1)
            mean, raw = level.split.prior(x).chunk(2, 1)
            log_sigma = 5 * torch.tanh(raw / 5)
            latents.append(((x2 - mean) / log_sigma.exp()).flatten(1))
            logdet = logdet - log_sigma.sum((1, 2, 3))
    z = torch.cat([*latents, x.flatten(1)], 1)
    return logdet - 0.5 * (z * z).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


def test_equals_the_plain_model():
    model, x = glow()
    grads = []
    for log_prob in (model(x), plain_log_prob(model, x)):
        grads.append([log_prob.detach(), *torch.autograd.grad(log_prob.sum(), list(model.parameters()))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"parametrization": "plu"}, {"learn_prior": False}, {"n_levels": 1},
                                     {"scale": "tanh", "shift_first": False, "layout": "interleave"}])
def test_unpack_and_inverse(options):
    model, x = glow(**options)
    z, logdet = model.transform(x)
    latents = model.unpack(z)
    shapes = [(12, 4, 4)] if options.get("n_levels") == 1 else [(6, 4, 4), (24, 2, 2)]
    assert z.shape == (4, 192) and [tuple(v.shape[1:]) for v in latents] == shapes
    assert torch.equal(torch.cat([v.flatten(1) for v in latents], 1), z)
    back, inverse_logdet = model.transform.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_logdet, -logdet)


def test_levels_as_composed_transforms():
    """The generic containers give the same model."""
    model, x = glow()
    top, bottom = model.transform.levels
    rest = flows.Compose(flows.Squeeze(), *bottom.steps)
    composed = flows.Compose(flows.Squeeze(), *top.steps, flows.Split((12, 4, 4), rest, prior=top.split.prior))
    for a, b in zip(composed(x), model.transform(x), strict=True):
        torch.testing.assert_close(a, b)
    z = composed(x)[0]
    for a, b in zip(composed.unpack(z), model.unpack(z), strict=True):
        assert torch.equal(a.flatten(), b.flatten())
    torch.testing.assert_close(composed.inverse(z)[0], x)


def test_initialize_normalises_every_step():
    model = flows.Glow((1, 8, 8), n_levels=2, n_steps=2, hidden_channels=8)
    x = torch.rand(64, 1, 8, 8) * 0.3
    model.initialize(x)
    norms = [m for m in model.modules() if isinstance(m, ActNorm)]
    assert len(norms) == 4 and all(norm.initialized for norm in norms)
    first = model.transform.levels[0].steps[0].conv.actnorm(F.pixel_unshuffle(x, 2))[0]
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    before = copy.deepcopy(model.state_dict())
    model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_gradients_and_inverses_per_image_by_vmap():
    model, x = glow(n_steps=1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def log_prob(parameters, x):
        return torch.func.functional_call(model, parameters, (x[None],))[0]

    grads = torch.func.vmap(torch.func.grad(log_prob), (None, 0))(parameters, x)
    model(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name].sum(0), p.grad, rtol=1e-9, atol=1e-9)
    back = torch.func.vmap(lambda z: model.transform.inverse(z[None])[0][0])(model.transform(x)[0].detach())
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)


def test_memory_format_of_the_input_does_not_matter():
    model, x = glow()
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_sampling():
    model, _ = glow()
    x, log_prob = model.sample_and_log_prob(3)
    assert x.shape == (3, 3, 8, 8) and x.dtype == torch.float64
    torch.testing.assert_close(model.log_prob(x), log_prob)
    first, second = (model.sample(2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert model.sample(0).shape == (0, 3, 8, 8) and model(x[:0]).shape == (0,)


def test_float32_is_close_to_float64():
    model, x = glow()
    single = copy.deepcopy(model).float()
    assert ((single(x.float()) - model(x)).abs() / 192).max() < 1e-5


def test_bfloat16_conditioners_under_autocast():
    model, x = glow()
    model, x = model.float(), x.float()
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = model(x)
    assert value.dtype == torch.float32
    assert ((value - expected).abs() / 192).max() < 0.02


def test_training_lowers_bits_per_dim():
    model = flows.Glow((1, 8, 8), n_levels=2, n_steps=2, hidden_channels=16)
    pattern = torch.arange(64).reshape(1, 1, 8, 8) * 3
    x = (pattern + torch.randint(0, 16, (64, 1, 8, 8))).to(torch.uint8)
    model.initialize(flows.dequantize(x))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model.bits_per_dim(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_compiles_to_one_graph():
    model, _ = glow(n_steps=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.rand(batch, 3, 8, 8, dtype=torch.float64)
        model.zero_grad()
        model(x).sum().backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        value = compiled(x)
        value.sum().backward()
        torch.testing.assert_close(value, model(x))
        torch.testing.assert_close([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: flows.Glow((3, 8)), "image_shape"),
    (lambda: flows.Glow((3, 12, 8), n_levels=3), "image_shape"),
    (lambda: flows.Glow((3, 8, 8), n_levels=0), "n_levels"),
    (lambda: flows.Glow((3, 8, 8), n_steps=0), "n_steps"),
    (lambda: flows.Glow((3, 8, 8), hidden_channels=0), "hidden_channels"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4, scale="cubic"), "scale"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4, parametrization="qr"), "parametrization"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4)(torch.zeros(1, 3, 8, 4)), "x: expected"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2)), "context"),
    (lambda: flows.Glow((3, 8, 8), 1, 1, 4).unpack(torch.zeros(1, 3)), "z: expected"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
