"""Every exported exact bijection, from one table: 3 sizes x 20 seeds of inverse and log-determinants against float64
Jacobians, gradients, contexts, densities that integrate to one. An exported transform without a row is a failure."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flow_checks import check_bijection, check_gradients, scattered
from torch import distributions as D
from torch import nn

import fastflow.nn
from fastflow import flows
from fastflow.flows.contexts import takes_context
from fastflow.nn import MLP, ActNorm, AffineCoupling, ConvNet, InvertibleConv1x1, MixtureCoupling, SplineCoupling

SEEDS, MODEL_SEEDS, BATCH, CONTEXT = 20, 5, 3, 2
DOMAINS = {"real": lambda x: x, "positive": lambda x: x.abs() + 0.1, "unit": torch.sigmoid,
           "box": lambda x: 3.0 * torch.tanh(x)}
# Exported, with forward and inverse, but no bijection by itself, or from integers or to other dimensions.
NO_BIJECTION = {"Transform", "ScalarTransform", "LinearMap", "Flow", "AffineTransformer", "SplineTransformer",
                "MixtureTransformer", "WeightBank", "UniformDequantization", "VariationalDequantization", "Slice",
                "Augment"}
# Bijections to a solver's tolerance, whose sweeps stand elsewhere.
TO_A_TOLERANCE = {"ContinuousTransform": "test_continuous.py", "FFJORD": "test_continuous.py",
                  "FFJORDImage": "test_residual_image.py"}


@dataclass(frozen=True)
class Row:
    """``make(size, context_features)`` builds one for events of ``shape(size)``; ``contextual``: it takes a context.

    ``seeds`` of the sweep run by default, the other ones of 20 in the long run: models repeat layers that have rows of
    their own. Parameters move off their start by ``spread`` times a normal.
    ``density``: with a standard normal as base it is a density on all of R^D, D = 1 and 2, that can be integrated.
    """

    make: object
    sizes: tuple = (1, 2, 5)
    contextual: bool = False
    density: bool = True
    domain: str = "real"
    tolerance: float = 1e-8
    seeds: int = SEEDS
    spread: float = 0.3


def plain(make, **options):
    """A row of a transform without context."""
    return Row(lambda n, c: make(n), **options)


def scalar(make, **options):
    return Row(lambda n, c: make(), **{"density": False, **options})


def model(cls, **options):
    return Row(lambda n, c: cls(n, context_features=c, **options).transform, contextual=True, seeds=MODEL_SEEDS)


def conditioner(n, c, per_channel, flip=False):
    first = n // 2
    passive, active = (n - first, first) if flip else (first, n - first)
    return MLP(passive, active * per_channel, (5,), context_features=c, activation=nn.Tanh)


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, outputs, 1))


def coupling(flip=False, **options):
    params = 1 if options.get("scale") == "additive" else 2
    return Row(lambda n, c: AffineCoupling(conditioner(n, c, params, flip), flip=flip, **options), contextual=True,
               sizes=(2, 3, 5) if flip else (1, 2, 5))


def image(make, *sizes, **options):
    return Row(lambda n, c: make(n), sizes=sizes, density=False, **options)


def image_model(make, *sizes, **options):
    return image(lambda s: make(s).transform.eval(), *sizes, seeds=MODEL_SEEDS, **options)


def cubic(n):
    """Lambda of x + x^3 / 3 after a mix of the features, which Newton's method inverts."""
    mix = torch.eye(n, dtype=torch.float64) + 0.2 * torch.randn(n, n, dtype=torch.float64).tril(-1)
    return flows.Lambda(lambda x: (x + x**3 / 3) @ mix.mT)


def flowpp(shape):
    return flows.FlowPP(shape, n_checkerboard=1, n_channel=1, n_final=int(shape[0] == 2), n_components=2,
                        hidden_channels=2, n_blocks=1, n_heads=1, dropout=0.0, alpha=None, dequantization=None)


MASK = (torch.arange(12).reshape(3, 2, 2) % 3 == 0).double()
SMALL = {"n_layers": 2, "hidden": (5,), "activation": nn.Tanh}
ROWS = {
    # scalar
    "Affine": Row(lambda n, c: flows.Affine(0.3, -1.7)),
    "Exp": scalar(flows.Exp), "Log": scalar(flows.Log, domain="positive"),
    "Softplus": scalar(flows.Softplus), "Sigmoid": scalar(flows.Sigmoid), "Tanh": scalar(flows.Tanh),
    "Atan": scalar(flows.Atan), "Logit": scalar(flows.Logit, domain="unit"),
    "Logit alpha": scalar(lambda: flows.Logit(0.05), domain="unit"),
    "Power": scalar(lambda: flows.Power(1.7), domain="positive"),
    "LeakyReLU": scalar(lambda: flows.LeakyReLU(0.3), density=True),
    "CDF": scalar(lambda: flows.CDF(D.Normal(torch.tensor(0.5).double(), torch.tensor(1.3).double())),
                  tolerance=1e-7),
    "Quantile": scalar(lambda: flows.Quantile(D.Normal(torch.tensor(0.5).double(), torch.tensor(1.3).double())),
                       domain="unit"),
    # linear
    "Dense": plain(flows.Dense), "PLU": plain(flows.PLU), "QR": plain(flows.QR),
    "Householder": plain(flows.Householder),
    "Triangular": plain(flows.Triangular), "LowRank": plain(flows.LowRank), "Orthogonal": plain(flows.Orthogonal),
    "Orthogonal exp": plain(lambda n: flows.Orthogonal(n, method="exp")),
    "DiagonalScale": plain(flows.DiagonalScale), "ActNorm": plain(ActNorm),
    "Permute": plain(lambda n: flows.Permute(torch.randperm(n))), "Reverse": plain(lambda n: flows.Reverse()),
    "PeriodicShift": plain(lambda n: flows.PeriodicShift(n, 3.0), domain="box", density=False),
    "InvertibleConv1x1": plain(InvertibleConv1x1),
    "InvertibleConv1x1 plu": plain(lambda n: InvertibleConv1x1(n, "plu")),
    "InvertibleConv1x1 image": image(lambda s: InvertibleConv1x1(s[0], actnorm=ActNorm(s[0])), (1, 2, 2), (3, 2, 1),
                                     (4, 1, 3)),
    # couplings
    "AffineCoupling": coupling(), "AffineCoupling flip": coupling(flip=True, scale="tanh"),
    "AffineCoupling additive": coupling(scale="additive"),
    "AffineCoupling checkerboard": image(
        lambda s: AffineCoupling(conv(s[0], 2 * s[0]), split="checkerboard", scale="sigmoid"), (1, 2, 2), (2, 3, 3),
        (3, 1, 2)),
    "AffineCoupling mask": image(lambda s: AffineCoupling(conv(3, 6), split=MASK[:, :s[1]], scale="softplus"),
                                 (3, 1, 2), (3, 2, 2)),
    "SplineCoupling": Row(lambda n, c: SplineCoupling(conditioner(n, c, 11), n_bins=4), contextual=True,
                          tolerance=1e-7),
    "SplineCoupling linear": Row(lambda n, c: SplineCoupling(conditioner(n, c, 4), n_bins=4, kind="linear"),
                                 contextual=True, tolerance=1e-7, density=False),
    "SplineCoupling checkerboard": image(lambda s: SplineCoupling(conv(s[0], 8 * s[0]), n_bins=3,
                                                                  split="checkerboard"), (1, 2, 2), (2, 3, 3)),
    "SplineCoupling circular": Row(lambda n, c: SplineCoupling(
        MLP(n // 2 * 2, (n - n // 2) * 12, (5,), context_features=c, activation=nn.Tanh), n_bins=4, tails="circular",
        periodic=True), contextual=True, domain="box", density=False, tolerance=1e-7),
    "SplineCoupling without tails": Row(lambda n, c: SplineCoupling(conditioner(n, c, 13), n_bins=4, tails=None),
                                        contextual=True, domain="box", density=False, tolerance=1e-7),
    "MixtureCoupling": Row(lambda n, c: MixtureCoupling(conditioner(n, c, 8), n_components=2), contextual=True,
                           tolerance=1e-7),
    # autoregressive, planar, residual
    "MaskedAutoregressive": Row(lambda n, c: flows.MaskedAutoregressive(
        n, (5,), order=torch.randperm(n), context_features=c, activation=nn.Tanh), contextual=True),
    "MaskedAutoregressive spline": Row(lambda n, c: flows.MaskedAutoregressive(
        n, (5,), context_features=c, activation=nn.Tanh, transformer=flows.SplineTransformer(4)), contextual=True,
        tolerance=1e-7),
    "MaskedAutoregressive mixture": Row(lambda n, c: flows.MaskedAutoregressive(
        n, (5,), context_features=c, activation=nn.Tanh, transformer=flows.MixtureTransformer(2)), contextual=True,
        tolerance=1e-7),
    "TarFlowBlock": image(lambda s: flows.TarFlowBlock(*s, 4, 1, flip=s[0] == 3, head_dim=2, expansion=1), (2, 1),
                          (2, 2), (3, 2)),
    "Planar": Row(lambda n, c: flows.Planar(n, context_features=c, hidden=(4,)), contextual=True),
    "Radial": Row(lambda n, c: flows.Radial(n, context_features=c, hidden=(4,)), contextual=True),
    "Sylvester": Row(lambda n, c: flows.Sylvester(n, context_features=c, hidden=(4,)), contextual=True),
    "InvertibleResidual": Row(lambda n, c: flows.InvertibleResidual(
        flows.LipschitzMLP(n, (5,), bound=0.6, context_features=c)).eval(), contextual=True),
    "InvertibleResidual image": image(lambda s: flows.InvertibleResidual(
        flows.LipschitzConvNet(s, (3, 3), bound=0.6)).eval(), (1, 1, 2), (1, 2, 2), (2, 2, 1)),
    "LogisticMixture": plain(lambda n: flows.LogisticMixture(n, 3), tolerance=1e-7),
    # what is made of others
    "Compose": Row(lambda n, c: flows.Compose(ActNorm(n), AffineCoupling(conditioner(n, c, 2), scale="tanh"),
                                              flows.Reverse()), contextual=True),
    "Inverse": Row(lambda n, c: flows.Inverse(AffineCoupling(conditioner(n, c, 2), scale="tanh")), contextual=True),
    "Lambda": plain(cubic, tolerance=1e-7),
    "Squeeze": image(lambda s: flows.Squeeze(), (1, 2, 2), (2, 2, 4), (1, 4, 4)),
    "HaarSqueeze": image(lambda s: flows.HaarSqueeze(), (1, 2, 2), (2, 2, 4), (1, 4, 4)),
    "CheckerboardSqueeze": image(lambda s: flows.CheckerboardSqueeze(), (1, 1, 2), (2, 3, 2), (1, 2, 4)),
    "Flatten": image(flows.Flatten, (1, 1, 2), (2, 2, 1), (3, 2, 2)),
    "Patchify": image(lambda s: flows.Patchify(s, 2, channels_last=s[0] == 2, scale=1.5), (1, 2, 2), (2, 2, 4),
                      (1, 4, 4)),
    "Split": image(lambda s: flows.Split(s, ActNorm(s[0] // 2), prior=conv(s[0] // 2, 2 * (s[0] - s[0] // 2))),
                   (2, 2, 2), (3, 2, 2), (4, 1, 1)),
    "GlowStep": image(lambda s: flows.GlowStep(s[0], ConvNet(s[0] // 2, 2 * (s[0] - s[0] // 2), 4)), (2, 2, 2),
                      (4, 2, 1), (4, 2, 2)),
    "GlowTransform": image(lambda s: flows.Glow(s, n_levels=1 + (s[1] == 4), n_steps=1, hidden_channels=4).transform,
                           (1, 2, 2), (1, 4, 4), (2, 2, 4), seeds=MODEL_SEEDS),
    # models
    "RealNVP": model(flows.RealNVP, **SMALL), "NICE": model(flows.NICE, **SMALL), "MAF": model(flows.MAF, **SMALL),
    "IAF": model(flows.IAF, **SMALL), "NSF": replace(model(flows.NSF, n_bins=4, **SMALL), tolerance=1e-7),
    "NSF circular": replace(model(flows.NSF, n_bins=4, tails="circular", **SMALL), tolerance=1e-7, domain="box",
                            density=False),
    "NSF without tails": replace(model(flows.NSF, n_bins=4, tails=None, **SMALL), tolerance=1e-7, domain="box",
                                 density=False),
    "NSF autoregressive": replace(model(flows.NSF, n_bins=4, autoregressive=True, **SMALL), tolerance=1e-7),
    "ResidualFlow": Row(lambda n, c: flows.ResidualFlow(
        n, n_layers=2, hidden=(5,), bound=0.6, context_features=c).transform.eval(), contextual=True,
        seeds=MODEL_SEEDS),
    "Glow": image_model(lambda s: flows.Glow(s, n_levels=1, n_steps=2, hidden_channels=4, parametrization="plu"),
                        (1, 2, 2), (1, 2, 4), (2, 2, 2)),
    "ResidualFlowImage": image_model(lambda s: flows.ResidualFlowImage(
        s, n_levels=1 + (s[1] == 2), n_blocks=1, hidden_channels=3, n_fc_blocks=1, fc_hidden=(3,), bound=0.5,
        alpha=None, factor_out=True), (1, 1, 2), (2, 1, 1), (1, 2, 2)),
    "RealNVPImage": image_model(lambda s: flows.RealNVPImage(s, 1 + (s[1] == 2), 1, 2, 1, alpha=None), (1, 1, 2),
                                (2, 1, 2), (1, 2, 2)),
    "FlowPP": replace(image_model(flowpp, (1, 4, 4), (1, 2, 4), (2, 2, 4)), seeds=2),
    # exp of what a network says of numbers that grow by it from block to block
    "TarFlow": image_model(lambda s: flows.TarFlow(s, 1, 4, 2, 1, head_dim=2, expansion=1), (1, 1, 2), (2, 1, 2),
                           (2, 1, 3), spread=0.1),
    "Jet": image_model(lambda s: flows.Jet(s, patch_size=1, channels=4, couplings=2, depth=1, heads=2,
                                           kinds=("channel", "spatial")), (2, 1, 2), (2, 2, 2), (4, 1, 2)),
}
every_row = pytest.mark.parametrize("name", ROWS)
every_contextual = pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.contextual])


def build(name, size, seed=0, context=False):
    """(transform in float64 off its start, x, context or None)."""
    torch.manual_seed(seed)
    row = ROWS[name]
    transform = scattered(row.make(size, CONTEXT if context else None).double(), row.spread)
    shape = (size,) if isinstance(size, int) else size
    x = DOMAINS[row.domain](1.5 * torch.randn(BATCH, *shape, dtype=torch.float64))
    return transform, x, torch.randn(BATCH, CONTEXT, dtype=torch.float64) if context else None


def test_every_exported_transform_has_a_row():
    for module in (flows, fastflow.nn):
        for name in module.__all__:
            value = getattr(module, name)
            is_model = isinstance(value, type) and issubclass(value, flows.Flow)
            if not isinstance(value, type) or not (is_model or hasattr(value, "inverse")) or name in NO_BIJECTION:
                continue
            if name in TO_A_TOLERANCE:
                assert f"flows.{name}(" in (Path(__file__).parent / TO_A_TOLERANCE[name]).read_text(), name
            else:
                assert name in ROWS, f"{name} is exported by {module.__name__}: give it a row here"


def sweep(name, seeds):
    row = ROWS[name]
    for size in row.sizes:
        for seed in seeds:
            transform, x, context = build(name, size, seed, row.contextual and seed % 2 == 1)
            report = flows.check_invertible(transform, x, context, tolerance=row.tolerance)
            assert report.ok, f"size {size}, seed {seed}: {report}"
        check_bijection(transform, x, context, tolerance=10 * row.tolerance)  # the inverse's own Jacobian as well


@every_row
def test_inverse_and_log_determinants_at_sizes_and_seeds(name):
    sweep(name, range(ROWS[name].seeds))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.seeds < SEEDS])
def test_inverse_and_log_determinants_at_further_seeds(name):
    sweep(name, range(ROWS[name].seeds, SEEDS))


@every_row
def test_log_determinants_are_tensors_of_their_own(name):
    row = ROWS[name]
    for size in row.sizes:
        transform, x, context = build(name, size, 0, row.contextual)
        with torch.no_grad():
            z, logdet = transform(x, context)
            for value in (logdet, transform.inverse(z, context)[1]):
                assert value.is_contiguous()
                torch.testing.assert_close(value.clone().add_(torch.ones(BATCH)), value.add_(torch.ones(BATCH)))


@every_row
def test_gradients(name):
    row = ROWS[name]
    transform, x, context = build(name, row.sizes[1], 3, row.contextual)
    x, context = x[:2], None if context is None else context[:2]
    check_gradients(transform, x, context, directions=("forward",))
    z = transform(x, context)[0].detach()
    check_gradients(transform, z, context, directions=("inverse",))


@every_contextual
def test_the_context_is_respected(name):
    """It matters, sample by sample; a missing one, one too many and one of another width are refused."""
    row = ROWS[name]
    transform, x, context = build(name, row.sizes[-1], 1, True)
    z, logdet = transform(x, context)
    moved = transform(x, torch.cat([context[:1] + 1.0, context[1:]]))
    assert not torch.allclose(moved[0][0], z[0]) and torch.equal(moved[0][1:], z[1:])
    torch.testing.assert_close(moved[1][1:], logdet[1:])
    flipped = transform(x.flip(0), context.flip(0))
    torch.testing.assert_close(flipped, (z.flip(0), logdet.flip(0)))
    with pytest.raises(ValueError, match="context"):
        transform(x)
    with pytest.raises(ValueError, match="context"):
        transform(x, context[:, :1])
    with pytest.raises(ValueError, match="context"):
        build(name, row.sizes[-1], 1)[0](x, context)


@every_row
def test_every_transform_says_whether_it_takes_a_context(name):
    row = ROWS[name]
    assert not takes_context(row.make(row.sizes[-1], None))
    assert takes_context(row.make(row.sizes[-1], CONTEXT)) == row.contextual


@pytest.mark.parametrize(("name", "features"), [(name, features) for name, row in ROWS.items() if row.density
                                                for features in (1, 2) if features in row.sizes])
def test_the_density_integrates_to_one(name, features):
    """By the trapezoidal rule over a box that holds the images of all noise within 7 standard deviations."""
    transform, _, context = build(name, features, 5, ROWS[name].contextual)
    n = 4001 if features == 1 else 401  # even so a jump, as of LeakyReLU, costs the rule up to its spacing
    with torch.no_grad():
        edge = torch.linspace(-7, 7, 57, dtype=torch.float64)
        noise = torch.cartesian_prod(*[edge] * features).reshape(-1, features)
        hull = transform.inverse(noise, None if context is None else context[:1].expand(len(noise), -1))[0]
        low, high = hull.amin(0), hull.amax(0)
        axes = [torch.linspace(a, b, n, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        points = torch.cartesian_prod(*axes).reshape(-1, features)
        flow = flows.Flow(transform, flows.StandardNormal(features)).double().eval()
        total = sum(flow.log_prob(part, None if context is None else context[:1].expand(len(part), -1)).exp().sum()
                    for part in points.split(40_000))
        total = total * math.prod(((high - low) / (n - 1)).tolist())
    assert abs(total - 1.0) < (2e-2 if name == "LeakyReLU" else 1e-3), total
