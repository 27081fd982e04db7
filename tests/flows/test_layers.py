"""Couplings, 1x1 convolutions and activation normalisation one by one."""

import layouts
import pytest
import torch
from torch import nn

from fastflow import ScaleMap, flows
from fastflow.nn import MLP, ActNorm, AffineCoupling, ConvNet, GaussianSample, InvertibleConv1x1
from fastflow.reference.layout import memory_format_of


class Constant(nn.Module):
    """A conditioner with fixed answers that remembers its input."""

    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x, context=None):
        self.seen, self.context = x, context
        return self.params


def checkerboard(height, width):
    return torch.tensor([[float((i + j) % 2 == 0) for j in range(width)] for i in range(height)])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("kind", ["checkerboard", "channel", "full"])
@pytest.mark.parametrize("scale", ["exp", "sigmoid"])
def test_masked_formula(kind, scale, flip):
    x, params = torch.randn(2, 3, 3, 4), torch.randn(2, 6, 3, 4)
    mask = {"checkerboard": checkerboard(3, 4), "channel": torch.tensor([1.0, 0.0, 1.0])[:, None, None],
            "full": torch.randint(0, 2, (3, 3, 4)).float()}[kind]
    split = "checkerboard" if kind == "checkerboard" else mask
    layer = AffineCoupling(Constant(params), split=split, flip=flip, scale=scale)
    for source in (x, x.contiguous(memory_format=torch.channels_last)):
        z, logdet = layer(source)
        m = (1 - mask if flip else mask).expand(3, 3, 4)
        s, log_s = ScaleMap.of(scale).scale_and_log(params[:, :3])
        torch.testing.assert_close(z, m * x + (1 - m) * (x * s + params[:, 3:]))
        torch.testing.assert_close(logdet, ((1 - m) * log_s).flatten(1).sum(1))
        assert torch.equal(layer.conditioner.seen, m * x)
        assert z.is_contiguous(memory_format=torch.channels_last) == (source is not x)


def test_masked_keeps_what_it_hides():
    """A NaN at an active place neither reaches the conditioner nor its neighbours."""
    x = torch.randn(1, 4)
    x[0, 1] = torch.nan
    layer = AffineCoupling(MLP(4, 8, (4,)), split="checkerboard")
    assert torch.isnan(layer(x)[0]).tolist() == [[False, True, False, False]]


# A split of four features, and how many the conditioner sees and gives params for.
SPLITS = [("channel", 2), ("checkerboard", 4), (torch.tensor([1, 0, 1, 0]), 4), ([0, 2], 2)]


@pytest.mark.parametrize(("split", "width"), SPLITS, ids=str)
@pytest.mark.parametrize(("layout", "order"), [("chunk", "scale_shift"), ("interleave", "shift_scale")])
def test_a_pair_of_params_is_what_the_packed_ones_are(split, width, layout, order):
    x, (raw, shift) = torch.randn(3, 4), torch.randn(2, 3, width)
    first, second = (raw, shift) if order == "scale_shift" else (shift, raw)
    packed = torch.cat([first, second], 1) if layout == "chunk" else torch.stack([first, second], 2).flatten(1)
    results = [AffineCoupling(Constant(params), split=split, layout=layout, order=order)(x)
               for params in ((raw, shift), packed)]
    for pair, one in zip(*results, strict=True):
        torch.testing.assert_close(pair, one)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv3"])
def test_backward_hooks_on_convolutions_of_a_conditioner(name):
    net, x, seen = ConvNet(2, 4, 16), torch.randn(3, 2, 5, 5), []
    torch.nn.init.normal_(net.conv3.weight)
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    getattr(net, name).register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0]))
    found = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 1


def test_a_mask_compiles_with_every_size_dynamic():
    layer = AffineCoupling(nn.Linear(4, 8), split=torch.tensor([1, 0, 1, 0]))
    call = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3):
        x = torch.randn(batch, 4)
        for got, want in zip(call(x), layer(x), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("flip", [False, True])
def test_channel_split_keeps_the_order(flip):
    x = torch.randn(2, 5, 2)
    params = torch.randn(2, 4 if flip else 6, 2)
    layer = AffineCoupling(Constant(params), flip=flip)
    z, logdet = layer(x)
    for out, expected in zip(layer(x.clone().requires_grad_()), (z, logdet), strict=True):
        assert torch.equal(out, expected)
    half = params.shape[1] // 2
    passive, active = (slice(2, 5), slice(0, 2)) if flip else (slice(0, 2), slice(2, 5))
    assert torch.equal(z[:, passive], x[:, passive]) and torch.equal(layer.conditioner.seen, x[:, passive])
    torch.testing.assert_close(z[:, active], x[:, active] * params[:, :half].exp() + params[:, half:])
    torch.testing.assert_close(logdet, params[:, :half].flatten(1).sum(1))


def test_context_and_running_logdet():
    layer = AffineCoupling(Constant(torch.randn(2, 4)))
    x, context, running = torch.randn(2, 4), torch.randn(2, 3), torch.randn(2)
    _, logdet = layer(x)
    assert layer.conditioner.context is None
    torch.testing.assert_close(layer(x, context, logdet=running)[1], running + logdet)
    assert layer.conditioner.context is context


def test_low_precision_conditioner_leaves_z_in_float32():
    layer = AffineCoupling(Constant(torch.randn(2, 4, 3).bfloat16()))
    z, logdet = layer(torch.randn(2, 4, 3))
    assert z.dtype == logdet.dtype == torch.float32


@pytest.mark.parametrize("parametrization", ["plain", "plu"])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)])
def test_convolution_is_a_matrix_product(shape, parametrization):
    layer, x = InvertibleConv1x1(6, parametrization), torch.randn(shape)
    weight = torch.stack([layer(e)[0][0] for e in torch.eye(6)[:, None]], 1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(6), atol=1e-5, rtol=0)
    for source in (x, x.movedim(1, -1).contiguous().movedim(-1, 1), x.repeat_interleave(2, -1)[..., ::2]):
        z, logdet = layer(source)
        torch.testing.assert_close(z, torch.einsum("oc,bc...->bo...", weight, x))
        torch.testing.assert_close(logdet, torch.zeros(2), atol=1e-4, rtol=0)
    if len(shape) == 4:
        last = x.contiguous(memory_format=torch.channels_last)
        assert layer(last)[0].is_contiguous(memory_format=torch.channels_last) and layer(x)[0].is_contiguous()


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 6), (2, 4, 3, 4, 5), (3, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("make", [ActNorm, InvertibleConv1x1, flows.Dense, flows.LowRank, lambda n: flows.Exp()],
                         ids=["ActNorm", "InvertibleConv1x1", "Dense", "LowRank", "Exp"])
def test_z_has_the_memory_format_of_x(make, shape):
    layer, x = make(4), torch.rand(shape) + 0.5
    for layout in layouts.ALL:
        source = layout(x)
        for call in (layer, layer.inverse, flows.Compose(layer, layer)):
            z, logdet = call(source)
            assert z.is_contiguous(memory_format=memory_format_of(source)), (layout.__name__, z.stride())
            assert logdet.is_contiguous()


@pytest.mark.parametrize("parametrization", ["plain", "plu"])
def test_folded_actnorm(parametrization):
    """Folded, the normalisation and the convolution give what they give one after the other."""
    layer = InvertibleConv1x1(4, parametrization, actnorm=ActNorm(4)).double()
    plain = InvertibleConv1x1(4, parametrization).double()
    x = 3 + 2 * torch.randn(5, 4, 3, dtype=torch.float64)
    layer.initialize(x)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("actnorm")})
    middle, first = layer.actnorm(x)
    expected, second = plain(middle)
    torch.testing.assert_close(middle.mean((0, 2)), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(middle.std((0, 2), correction=0), torch.ones(4, dtype=torch.float64))
    z, logdet = layer(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(logdet, first + second)
    torch.testing.assert_close(layer.inverse(z), (x, -logdet))


def test_float32_under_autocast():
    layer, x = InvertibleConv1x1(8, actnorm=ActNorm(8)), torch.randn(2, 8, 4, 4)
    expected, expected_logdet = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, logdet = layer(x)
        back, _ = layer.inverse(z)
        low, _ = layer(x.bfloat16())
    assert torch.equal(z, expected) and torch.equal(logdet, expected_logdet) and low.dtype == torch.float32
    torch.testing.assert_close(back, x)
    low, _ = layer.bfloat16()(x)
    assert low.dtype == torch.float32


def test_actnorm_initialize():
    layer = ActNorm(4)
    assert not layer.initialized
    x = torch.randn(6, 4, 3) * 5 + 1
    x[:, 2] = 7.0
    z = layer.initialize(x)
    assert layer.initialized and torch.isfinite(torch.cat([layer.bias, layer.log_scale])).all()
    torch.testing.assert_close(z[:, 2], torch.zeros(6, 3))
    torch.testing.assert_close(z[:, 0].std(correction=0), torch.tensor(1.0))
    before = layer.bias.clone()
    layer.initialize(x[:0])
    assert torch.equal(layer.bias, before) and layer.bias.requires_grad


def test_gaussian_sample():
    params, eps = torch.randn(3, 8), torch.randn(2, 3, 4)
    layer = GaussianSample("logstd", order="scale_mean", n_samples=2, reduce="channel", return_logq=True)
    z, kl, logq = layer(params, eps=eps)
    torch.testing.assert_close(z, params[:, 4:] + params[:, :4].exp() * eps)
    assert kl.shape == (3, 4) and logq.shape == (2, 3)
    assert torch.equal(layer(params, seed=3)[0], layer(params, seed=3)[0])


def test_conv_net():
    net, x = ConvNet(3, 8, 16), torch.randn(2, 3, 4, 4)
    assert torch.equal(net(x), torch.zeros(2, 8, 4, 4)) and net(x).is_contiguous()
    assert net(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: AffineCoupling(MLP(1, 2), split="rows"), "split"),
    (ValueError, lambda: MLP(-1, 2), "in_features"),
    (ValueError, lambda: MLP(1, 2, (4, 0)), "hidden"),
    (TypeError, lambda: MLP(1, 2, (4.0,)), "hidden"),
    (ValueError, lambda: MLP(1, 2, context_features=0), "context_features"),
    (ValueError, lambda: AffineCoupling(MLP(1, 2), split=torch.tensor([0.5, 1.0])), "split"),
    (ValueError, lambda: AffineCoupling(MLP(1, 2), scale="cubic"), "scale"),
    (ValueError, lambda: AffineCoupling(MLP(1, 2), layout="rows"), "layout"),
    (ValueError, lambda: AffineCoupling(MLP(1, 2), order="rows"), "order"),
    (ValueError, lambda: AffineCoupling(MLP(2, 3))(torch.zeros(1, 4)), "params"),
    (ValueError, lambda: AffineCoupling(MLP(4, 3), split="checkerboard")(torch.zeros(1, 4)), "conditioner output"),
    (ValueError, lambda: AffineCoupling(Constant((torch.ones(1, 4),)), split="checkerboard")(torch.zeros(1, 4)),
     "conditioner output"),
    (TypeError, lambda: AffineCoupling(Constant(None), split="checkerboard")(torch.zeros(1, 4)), "conditioner output"),
    (ValueError, lambda: AffineCoupling(MLP(4, 8), split=torch.ones(3))(torch.zeros(1, 4)), "mask"),
    (ValueError, lambda: AffineCoupling(MLP(4, 8))(torch.zeros(4)), "x: expected"),
    (TypeError, lambda: AffineCoupling(MLP(4, 8))([1.0]), "x: expected"),
    (ValueError, lambda: InvertibleConv1x1(3, "qr"), "parametrization"),
    (ValueError, lambda: InvertibleConv1x1(3, actnorm=ActNorm(2)), "actnorm"),
    (TypeError, lambda: InvertibleConv1x1(3, actnorm=True), "actnorm"),
    (ValueError, lambda: InvertibleConv1x1(3)(torch.zeros(1, 2)), "x: expected"),
    (TypeError, lambda: InvertibleConv1x1(3)(torch.zeros(1, 3).double()), "weight"),
    (TypeError, lambda: ActNorm(3)(torch.zeros(1, 3).double()), "bias"),
    (ValueError, lambda: ActNorm(3)(torch.zeros(1, 3, device="meta")), "x: expected device cpu"),
    (ValueError, lambda: InvertibleConv1x1(3)(torch.zeros(1, 3, device="meta")), "x: expected device cpu"),
    (ValueError, lambda: ActNorm(3)(torch.zeros(1, 2)), "x: expected"),
    (ValueError, lambda: MLP(2, 2)(torch.zeros(1, 2), torch.zeros(1, 1)), "context"),
    (ValueError, lambda: MLP(2, 2, context_features=2)(torch.zeros(1, 2)), "context"),
    (ValueError, lambda: GaussianSample("variance"), "scale"),
    (ValueError, lambda: GaussianSample(n_samples=-1), "n_samples"),
    (TypeError, lambda: GaussianSample(n_samples=2.0), "n_samples"),
    (ValueError, lambda: InvertibleConv1x1(0), "channels"),
    (TypeError, lambda: ActNorm("3"), "channels"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
