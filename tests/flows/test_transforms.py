"""What every transform must satisfy: inverse, log-determinant against autograd's Jacobian, gradients."""

import copy

import pytest
import torch
from torch import nn

from fastflow import flows
from fastflow.nn import MLP, ActNorm, AffineCoupling, ConvNet, InvertibleConv1x1, MixtureCoupling, SplineCoupling

MASK = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])


def conv(channels_in, channels_out):
    return nn.Sequential(nn.Conv2d(channels_in, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, channels_out, 1))


def small_glow(**options):
    return flows.Glow((1, 4, 4), n_levels=2, n_steps=2, hidden_channels=4, **options).transform


# name: (constructor, shape of x without the batch)
CASES = {
    "actnorm": (lambda: ActNorm(3), (3, 2, 2)),
    "actnorm-vector": (lambda: ActNorm(5), (5,)),
    "conv": (lambda: InvertibleConv1x1(3), (3, 2, 2)),
    "conv-vector": (lambda: InvertibleConv1x1(4), (4,)),
    "conv-sequence": (lambda: InvertibleConv1x1(3, actnorm=ActNorm(3)), (3, 5)),
    "conv-plu": (lambda: InvertibleConv1x1(4, "plu"), (4, 2, 1)),
    "conv-plu-actnorm": (lambda: InvertibleConv1x1(3, "plu", actnorm=ActNorm(3)), (3, 2, 2)),
    "coupling": (lambda: AffineCoupling(MLP(2, 4, (5,))), (4,)),
    "coupling-odd": (lambda: AffineCoupling(MLP(2, 6, (5,)), scale="tanh"), (5,)),
    "coupling-odd-flip": (lambda: AffineCoupling(MLP(3, 4, (5,)), scale="sigmoid", flip=True), (5,)),
    "coupling-image": (lambda: AffineCoupling(conv(1, 4), scale="softplus", layout="interleave"), (3, 2, 2)),
    "coupling-image-flip": (
        lambda: AffineCoupling(conv(2, 2), order="shift_scale", shift_first=True, flip=True), (3, 2, 2)),
    "coupling-additive": (lambda: AffineCoupling(MLP(1, 2, (5,)), scale="additive"), (3,)),
    "checkerboard": (lambda: AffineCoupling(conv(2, 4), split="checkerboard", scale="sigmoid"), (2, 3, 3)),
    "checkerboard-flip": (lambda: AffineCoupling(conv(2, 4), split="checkerboard", flip=True), (2, 3, 3)),
    "checkerboard-vector": (lambda: AffineCoupling(MLP(5, 10, (5,)), split="checkerboard", scale="atan"), (5,)),
    "mask": (lambda: AffineCoupling(conv(3, 6), split=MASK, scale="sigmoid"), (3, 2, 2)),
    "mask-interleave": (
        lambda: AffineCoupling(conv(3, 6), split=MASK, layout="interleave", order="shift_scale"), (3, 2, 2)),
    "mask-channel": (
        lambda: AffineCoupling(conv(3, 6), split=torch.tensor([1, 0, 0])[:, None, None], flip=True), (3, 2, 2)),
    "mask-additive": (lambda: AffineCoupling(conv(3, 3), split=MASK.bool(), scale="additive"), (3, 2, 2)),
    "spline": (lambda: SplineCoupling(MLP(2, 33, (5,)), n_bins=4), (5,)),
    "spline-flip": (lambda: SplineCoupling(MLP(3, 10, (5,)), n_bins=5, kind="linear", flip=True), (5,)),
    "spline-image": (lambda: SplineCoupling(conv(1, 16), n_bins=3), (3, 2, 2)),
    "spline-checkerboard": (lambda: SplineCoupling(conv(2, 16), n_bins=3, split="checkerboard"), (2, 3, 3)),
    "spline-mask": (lambda: SplineCoupling(conv(3, 15), n_bins=2, split=MASK, flip=True), (3, 2, 2)),
    "spline-mask-vector": (
        lambda: SplineCoupling(MLP(4, 20, (5,)), n_bins=2, split=torch.tensor([1, 0, 0, 1]), clamp=6.9), (4,)),
    "coupling-index": (lambda: AffineCoupling(MLP(2, 6, (5,)), scale="sigmoid", split=[3, 0]), (5,)),
    "spline-index-flip": (lambda: SplineCoupling(conv(1, 16), n_bins=3, split=[0, 2], flip=True), (3, 2, 2)),
    "mixture": (lambda: MixtureCoupling(MLP(2, 24, (5,)), n_components=2), (5,)),
    "mixture-image-flip": (lambda: MixtureCoupling(conv(2, 8), n_components=2, flip=True), (3, 2, 2)),
    "mixture-checkerboard": (lambda: MixtureCoupling(conv(2, 16), n_components=2, split="checkerboard"), (2, 3, 3)),
    "mixture-mask": (lambda: MixtureCoupling(conv(3, 24), n_components=2, split=MASK, flip=True), (3, 2, 2)),
    "logistic-mixture": (lambda: flows.LogisticMixture((2, 3), 2), (2, 3)),
    "squeeze": (flows.Squeeze, (2, 2, 4)),
    "haar": (flows.HaarSqueeze, (2, 2, 4)),
    "checkerboard-squeeze": (flows.CheckerboardSqueeze, (2, 3, 4)),
    "permute": (lambda: flows.Permute([2, 0, 1]), (3, 2)),
    "reverse": (flows.Reverse, (3, 2)),
    "log": (flows.Log, (3,)),
    "exp": (flows.Exp, (3,)),
    "split": (lambda: flows.Split((3, 2, 2), ActNorm(1), prior=conv(1, 4)), (3, 2, 2)),
    "split-plain": (lambda: flows.Split((4,)), (4,)),
    "compose": (lambda: flows.Compose(ActNorm(4), flows.Reverse(), AffineCoupling(MLP(2, 4, (5,)))), (4,)),
    "inverse": (lambda: flows.Inverse(flows.Compose(ActNorm(4), AffineCoupling(MLP(2, 4, (5,))))), (4,)),
    "nested-split": (lambda: flows.Compose(flows.Squeeze(), flows.Split((4, 2, 2), flows.Compose(
        flows.Squeeze(), InvertibleConv1x1(8)), prior=conv(2, 4))), (1, 4, 4)),
    "realnvp": (lambda: flows.RealNVP(3, n_layers=3, hidden=(6,)).transform, (3,)),
    "nsf": (lambda: flows.NSF(3, n_layers=3, n_bins=4, hidden=(6,)).transform, (3,)),
    "nsf-random": (
        lambda: flows.NSF(3, n_layers=3, n_bins=4, hidden=(6,), permutation="random", kind="linear").transform, (3,)),
    "glow-step": (lambda: flows.GlowStep(4, ConvNet(2, 4, 6)), (4, 2, 2)),
    "glow": (small_glow, (1, 4, 4)),
    "glow-haar": (lambda: small_glow(squeeze="haar", scale="additive"), (1, 4, 4)),
    "realnvp-image": (lambda: flows.RealNVPImage((1, 4, 4), 2, 1, 3, 1, alpha=None).transform, (1, 4, 4)),
    "flowpp": (lambda: flows.FlowPP((1, 2, 4), n_checkerboard=1, n_channel=1, n_final=1, n_components=2,
                                    hidden_channels=4, n_blocks=1, n_heads=2, dropout=0.0, alpha=None,
                                    dequantization=None).transform, (1, 2, 4)),
    "glow-plu": (lambda: small_glow(parametrization="plu", learn_prior=False, scale="tanh"), (1, 4, 4)),
}


def build(name):
    """(transform in float64 with every parameter moved off its start, x)."""
    make, shape = CASES[name]
    transform = make().double()
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(3, *shape, dtype=torch.float64)
    return transform, x.abs() + 0.1 if name == "log" else x


@pytest.mark.parametrize("name", CASES)
def test_inverse(name):
    transform, x = build(name)
    z, logdet = transform(x)
    back, inverse_logdet = transform.inverse(z)
    assert isinstance(transform, flows.Transform)
    assert logdet.shape == inverse_logdet.shape == (3,)
    assert flows.transform.noise_shape(transform, x.shape[1:]) == tuple(z.shape[1:])
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_logdet, -logdet, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["squeeze", "haar", "checkerboard-squeeze", "permute", "reverse", "log", "exp",
                                  "split-plain"])
def test_log_determinants_of_half_precision_are_float32(name):
    make, shape = CASES[name]
    x = torch.rand(2, *shape) + 0.5
    for dtype in (torch.bfloat16, torch.float16):
        z, logdet = make()(x.to(dtype))
        assert z.dtype == dtype and logdet.dtype == make().inverse(z)[1].dtype == torch.float32
        torch.testing.assert_close(logdet, make()(x.to(dtype).float())[1])


@pytest.mark.parametrize("name", CASES)
def test_logdet_is_the_jacobians(name):
    transform, x = build(name)
    z, logdet = transform(x)
    for direction, start, expected in ((transform, x, logdet), (transform.inverse, z.detach(), -logdet)):
        jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(v[None])[0].flatten(), start[0])
        jacobian = jacobian.reshape(x[0].numel(), x[0].numel())
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["conv-plu-actnorm", "conv-sequence", "coupling-image-flip", "checkerboard", "mask",
                                  "split", "glow"])
def test_gradients(name):
    transform, x = build(name)
    names, values = zip(*transform.named_parameters(), strict=True)

    def both(x, *parameters):
        z, logdet = torch.func.functional_call(transform, dict(zip(names, parameters, strict=True)), (x,))
        return z, logdet

    inputs = [t.detach().clone().requires_grad_() for t in (x[:2], *values)]
    assert torch.autograd.gradcheck(both, inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_empty_batch(name):
    transform, x = build(name)
    z, logdet = transform(x[:0])
    back, _ = transform.inverse(z)
    assert logdet.shape == (0,) and back.shape == x[:0].shape


@pytest.mark.parametrize("name", CASES)
def test_state_dict_round_trip(name):
    transform, x = build(name)
    torch.manual_seed(1)
    other = CASES[name][0]().double()
    other.load_state_dict(transform.state_dict())
    for a, b in zip(transform(x), other(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("shape", "build"), [
    ((8, 2, 4), lambda: flows.Inverse(flows.Compose(flows.Squeeze(), flows.Reverse()))),
    ((8, 2, 4), lambda: flows.Inverse(flows.Inverse(flows.CheckerboardSqueeze()))),
    ((8, 2, 4), lambda: flows.Compose(flows.Patchify((8, 2, 4), 2), flows.Inverse(flows.Patchify((8, 2, 4), 2)))),
    ((8, 2, 4), lambda: flows.Inverse(flows.Compose(flows.Inverse(flows.Flatten((8, 2, 4)))))),
    ((8, 2, 4), lambda: flows.Compose(flows.Split((8, 2, 4)), flows.Inverse(flows.Split((4, 4, 4))))),
    ((16,), lambda: flows.Compose(flows.Inverse(small_glow()), flows.Squeeze())),
])
def test_shapes_of_what_runs_the_other_way(shape, build):
    transform, x = build(), torch.randn(3, *shape)
    z, _ = transform(x)
    assert flows.transform.noise_shape(transform, shape) == tuple(z.shape[1:])
    assert flows.transform.data_shape(transform, z.shape[1:]) == shape


def test_latents_behind_a_composition_that_runs_the_other_way():
    split = flows.Split((16, 2, 2), flows.Inverse(flows.Compose(flows.Squeeze(), flows.Reverse())))
    x = torch.randn(3, 16, 2, 2)
    assert torch.equal(split.inverse(split(x)[0])[0], x)


def test_foreign_transforms():
    class Double:
        def __call__(self, x, context=None):
            return 2 * x, x.new_full((len(x),), 0.6931471805599453 * x[0].numel())

        def inverse(self, z, context=None):
            return z / 2, z.new_full((len(z),), -0.6931471805599453 * z[0].numel())

    composed = flows.Compose(Double(), ActNorm(2))
    x = torch.randn(3, 2)
    z, logdet = composed(x)
    assert isinstance(Double(), flows.Transform) and torch.equal(z, 2 * x)
    torch.testing.assert_close(composed.inverse(z), (x, -logdet))
    assert flows.Flow(Double(), flows.StandardNormal((2,))).log_prob(x).shape == (3,)
    with pytest.raises(TypeError, match=r"transforms\[1\]"):
        flows.Compose(Double(), object())


def test_a_foreign_transform_may_have_what_a_transform_may():
    """Its shapes, latents and data-dependent parameters are asked for inside a composition too."""
    class Halves:
        shift = 0.0

        def __call__(self, x, context=None):
            return torch.cat([x, x - self.shift], 1)[:, :2 * x.shape[1]], x.new_zeros(len(x))

        def inverse(self, z, context=None):
            return z[:, :z.shape[1] // 2], z.new_zeros(len(z))

        def initialize(self, x, context=None):
            self.shift = x.mean().item()
            return self(x)[0]

        def noise_shape(self, event_shape):
            return (2 * event_shape[0],)

        def data_shape(self, event_shape):
            return (event_shape[0] // 2,)

        def unpack(self, z):
            return list(z.chunk(2, 1))

    halves = Halves()
    composed, x = flows.Compose(halves), torch.randn(3, 2) + 4.0
    assert composed.noise_shape((2,)) == (4,) and composed.data_shape((4,)) == (2,)
    assert torch.equal(composed.initialize(x)[:, 2:], x - x.mean()) and halves.shift != 0.0
    assert [part.shape for part in composed.unpack(composed(x)[0])] == [(3, 2), (3, 2)]
    copied = copy.deepcopy(composed)
    assert torch.equal(copied(x)[0], composed(x)[0])


@pytest.mark.parametrize(("make", "message"), [
    (lambda: flows.Permute([0, 0]), "permutation"),
    (lambda: flows.Split((1, 2, 2)), "event_shape"),
    (lambda: flows.Squeeze()(torch.zeros(1, 1, 3, 2)), "x: expected"),
    (lambda: flows.Squeeze().inverse(torch.zeros(1, 3, 2, 2)), "z: expected"),
    (lambda: flows.Split((4, 2))(torch.zeros(1, 4, 3)), "x: expected"),
    (lambda: flows.Split((4, 2)).inverse(torch.zeros(1, 4)), "z: expected"),
    (lambda: flows.Permute([1, 0])(torch.zeros(1, 3)), "x: expected"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
