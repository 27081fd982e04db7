"""The papers' configurations: they build on the meta device with the right number of parameters, and copies of them
with smaller sizes train."""

import functools

import pytest
import torch

from fastflow import flows
from fastflow.engine import TrainStep

MODELS = (flows.Glow, flows.RealNVPImage, flows.FlowPP, flows.RealNVP, flows.MAF, flows.IAF, flows.NSF, flows.NICE,
          flows.ResidualFlow, flows.ResidualFlowImage, flows.FFJORD, flows.FFJORDImage)
# Of each family the kinds that differ in more than sizes; the others are trained in the long run.
KINDS = {flows.Glow: ("cifar10", "cifar10-plu", "cifar10-additive"), flows.FlowPP: ("cifar10", "cifar10-uniform"),
         flows.MAF: ("power-5", "gas-5"), flows.NSF: ("power", "power-ar"), flows.NICE: ("mnist", "tfd"),
         flows.ResidualFlowImage: ("cifar10", "imagenet64"), flows.FFJORDImage: ("cifar10",)}
EVERY = [pytest.param(model, name, id=f"{model.__name__}-{name}", marks=() if name in KINDS.get(
    model, [*model.configs][:1]) else pytest.mark.slow) for model in MODELS for name in model.configs]


@functools.cache
def parameters(model, name):
    """The number of parameters, from a model that holds none."""
    with torch.device("meta"):
        flow = model.from_config(name)
    assert all(t.is_meta for t in (*flow.parameters(), *flow.buffers()))
    return sum(p.numel() for p in flow.parameters())


def glow_parameters(channels, n_levels, n_steps, hidden, *, additive=False, plu=False):
    """Counted on paper: of each step the 1x1 weight, two numbers per channel and three convolutions, and of each split
    a convolution."""
    total = 0
    for level in range(n_levels):
        channels *= 4
        half = channels // 2
        out = half if additive else channels
        weight = 2 * channels**2 + channels if plu else channels**2
        convs = (9 * half + 1) * hidden + (hidden + 1) * hidden + (9 * hidden + 1) * out
        total += n_steps * (weight + 2 * channels + convs)
        if level < n_levels - 1:
            total += (9 * half + 1) * channels
            channels = half
    return total


@pytest.mark.parametrize(("name", "n_levels", "n_steps", "options"), [
    ("cifar10", 3, 32, {}), ("cifar10-additive", 3, 32, {"additive": True}), ("cifar10-plu", 3, 32, {"plu": True}),
    ("imagenet32", 3, 48, {}), ("imagenet64", 4, 48, {}), ("celeba-hq256", 6, 32, {"additive": True})])
def test_glow(name, n_levels, n_steps, options):
    assert parameters(flows.Glow, name) == glow_parameters(3, n_levels, n_steps, 512, **options)


def test_numbers_by_name():
    assert parameters(flows.Glow, "cifar10") == 43_951_692  # 44M
    # The authors' own, 31.4M, has weight normalisation, norms per element and the context in every block.
    assert parameters(flows.FlowPP, "cifar10") == 31_658_064
    # Four couplings 392 -> 1000 five times -> 392, and the diagonal.
    assert parameters(flows.NICE, "mnist") == 4 * (393 * 1000 + 4 * 1001 * 1000 + 1001 * 392) + 784
    # Of a layer the MADE 6 -> 100 -> 100 -> 12, masked, and an ActNorm.
    assert parameters(flows.MAF, "power-5") == 5 * (7 * 100 + 101 * 100 + 101 * 12 + 12)
    # What the papers state: 25, 47 and 53 million, and 0.8 and 1.36 million.
    sizes = [parameters(flows.ResidualFlowImage, name) for name in ("cifar10", "imagenet32", "imagenet64")]
    assert sizes == [25_149_639, 47_074_599, 53_269_767]
    assert [parameters(flows.FFJORDImage, name) for name in ("mnist", "cifar10")] == [800_636, 1_358_868]
    # Of a field 43 features and the time -> 860 -> 860 -> 43.
    assert parameters(flows.FFJORD, "miniboone") == 45 * 860 + 861 * 860 + 861 * 43


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_every_configuration_builds_on_the_meta_device(model):
    for name in model.configs:
        assert parameters(model, name) > 0


IMAGE = {"hidden_channels": 8}
REDUCED = {  # what makes a configuration small enough to train here
    flows.Glow: {**IMAGE, "n_steps": 2}, flows.RealNVPImage: {**IMAGE, "n_couplings": 1, "n_blocks": 1},
    flows.FlowPP: {**IMAGE, "n_components": 4, "n_blocks": 1, "dequantization_blocks": 1, "n_checkerboard": 2,
                   "n_channel": 2, "n_final": 1, "dequantization_couplings": 2},
    flows.RealNVP: {"n_layers": 2, "hidden": (8, 8)}, flows.MAF: {"n_layers": 2, "hidden": (8, 8)},
    flows.IAF: {"features": 4, "n_layers": 2, "hidden": (8, 8)}, flows.NSF: {"n_layers": 2, "hidden": (8,)},
    flows.NICE: {"features": 16, "n_layers": 2, "hidden": (8,)}, flows.ResidualFlow: {"n_layers": 2, "hidden": (8, 8)},
    flows.ResidualFlowImage: {**IMAGE, "n_blocks": 1, "fc_hidden": (8,)},
    flows.FFJORDImage: {"n_blocks": 1, "n_levels": 2, "hidden_channels": (8,), "rtol": 1e-2, "atol": 1e-2,
                        "trace": "hutchinson"},
    flows.FFJORD: {"n_layers": 1, "hidden": (8,), "rtol": 1e-3, "atol": 1e-3},
}


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_a_reduced_copy_trains(model, name):
    overrides = dict(REDUCED[model])
    images = "image_shape" in model.configs[name]
    if images:
        # Of its levels the smallest image that has them all.
        side = 2**{**model.configs[name], **overrides}.get("n_levels", 3)
        overrides["image_shape"] = (model.configs[name]["image_shape"][0], side, side)
        x = torch.randint(0, 256, (4, *overrides["image_shape"]), dtype=torch.uint8) // 4 + 90
        flow = model.from_config(name, **overrides)
        flow.initialize(x if flow.dequantization is not None else flows.dequantize(x))
    else:
        flow = model.from_config(name, **overrides)
        x = 0.5 * torch.randn(32, flow.features) + 1.0
        flow.initialize(x)
    torch.manual_seed(1)
    step = TrainStep(flow, torch.optim.Adam(flow.parameters(), 2e-3))
    losses = torch.stack([step(x) for _ in range(10)])
    assert torch.isfinite(losses).all() and losses[-3:].mean() < losses[:3].mean()
    draws = flow.eval().sample(2)
    assert draws.shape == (2, *x.shape[1:])
    if images:
        assert flow.bits_per_dim(x).shape == (4,)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="^name: expected a configuration of Glow \\('cifar10'"):
        flows.Glow.from_config("cifar100")
    with pytest.raises(ValueError, match="^name: expected a configuration of Flow \\(none"):
        flows.Flow.from_config("cifar10")
    assert flows.Glow.from_config("cifar10", n_steps=1, hidden_channels=4).image_shape == (3, 32, 32)
    assert flows.Glow.configs["cifar10"]["n_steps"] == 32
