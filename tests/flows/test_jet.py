"""Jet: its map against the plain one, splits, published sizes, training."""

import math

import pytest
import torch
import torch.nn.functional as F
from flow_checks import check_bijection, check_gradients, scattered

from fastflow import flows
from fastflow.engine import TrainStep
from fastflow.flows.jet import SPATIAL
from fastflow.nn import AffineCoupling

SIZES = [((1, 4, 4), 2), ((2, 4, 2), 1), ((3, 4, 4), 2)]


def jet(image_shape=(2, 4, 4), patch_size=1, *, couplings=4, dtype=torch.float64, **options):
    """A small Jet with every parameter moved off its start."""
    options = {"channels": 8, "depth": 1, "heads": 2, "kinds": ("channel", "spatial"), **options}
    return scattered(flows.Jet(image_shape, patch_size=patch_size, couplings=couplings, **options).to(dtype), 0.2)


def plain_log_prob(model, x):
    """The same density by permutation matrices, token by token as in the paper."""
    patches, *layers = model.transform.transforms
    size = patches.patch_size
    x = F.unfold(2.0 * x, size, stride=size).unflatten(1, (-1, size * size)).permute(0, 3, 2, 1).flatten(2)
    logdet = math.log(2.0) * x[0].numel()
    for gather, coupling in zip(layers[0::3], layers[1::3], strict=True):
        net, matrix = coupling.conditioner, F.one_hot(gather.order).to(x)
        if gather.channel:
            first, second = (x @ matrix.T).chunk(2, 2)
        else:  # halves of the tokens, each cut into two of half the width
            first, second = (t.reshape(len(x), x.shape[1], -1) for t in (matrix @ x).chunk(2, 1))
        h = net.proj_in(first) + net.pos_embed
        for layer in net.layers:
            q, k, v = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2)
                       for t in layer.qkv(layer.attention_norm(h)).chunk(3, 2))
            h = h + layer.proj(((q @ k.mT / math.sqrt(q.shape[3])).softmax(3) @ v).transpose(1, 2).flatten(2))
            h = h + layer.down(F.gelu(layer.up(layer.mlp_norm(h)), approximate="tanh"))
        bias, raw = net.proj_out(net.norm(h)).chunk(2, 2)
        second = (second + bias) * 2.0 * torch.sigmoid(raw)
        logdet = logdet + (F.logsigmoid(raw) + math.log(2.0)).sum((1, 2))
        if gather.channel:
            x = torch.cat([first, second], 2) @ matrix
        else:
            x = matrix.T @ torch.cat([t.reshape(len(x), x.shape[1] // 2, -1) for t in (first, second)], 1)
    return logdet - 0.5 * x.square().sum((1, 2)) - 0.5 * x[0].numel() * math.log(2.0 * math.pi)


@pytest.mark.parametrize("options", [{}, {"image_shape": (3, 8, 8), "patch_size": 2, "depth": 2}])
def test_equals_the_plain_model(options):
    model = jet(**options)
    x = torch.rand(3, *model.image_shape, dtype=torch.float64) - 0.5
    parameters = list(model.parameters())
    results = [(value.detach(), *torch.autograd.grad(value.sum(), parameters))
               for value in (model(x), plain_log_prob(model, x))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("image_shape", "patch_size"), SIZES)
def test_bijection(image_shape, patch_size):
    for seed in range(3):
        torch.manual_seed(seed)
        model = jet(image_shape, patch_size, couplings=3)
        check_bijection(model.transform, torch.randn(2, *image_shape, dtype=torch.float64))


def test_gradients():
    model = jet((2, 2, 2), couplings=2)
    check_gradients(flows.Compose(*model.transform.transforms[1:]), torch.randn(2, 4, 2, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "passive"), [("checkerboard", "10100101"), ("vstripes", "10101010"),
                                               ("hstripes", "11110000")])
def test_spatial_splits(kind, passive):
    """Which of 2 x 4 tokens a coupling passes on, and its -inv the others."""
    for split, expected in ((kind, passive), (f"{kind}-inv", passive.translate(str.maketrans("01", "10")))):
        model = jet((2, 2, 4), couplings=1, kinds=("spatial",), spatial=(split,))
        x = torch.randn(1, 2, 2, 4, dtype=torch.float64)
        same = (model.transform(x)[0] == flows.Patchify((2, 2, 4), 1)(2.0 * x)[0]).all(2)[0]
        assert "".join(str(int(s)) for s in same) == expected


def test_every_element_is_transformed_and_the_channels_are_mixed():
    model = flows.Jet((3, 8, 8), channels=8, depth=1, heads=1, couplings=32)
    gathers = [t for t in model.transform.transforms if getattr(t, "moves_elements", False)]
    assert len(gathers) == 64
    spatial = [g.order.tolist() for g in gathers[::2] if not g.channel]
    assert [i % 5 for i, g in enumerate(gathers[::2]) if not g.channel] == [4] * 6 and spatial[0] == [0, 3, 1, 2]
    orders = [tuple(g.order.tolist()) for g in gathers[::2] if g.channel]
    assert len(set(orders)) == 26 and all(sorted(order) == list(range(48)) for order in orders)
    assert all(a.order.tolist() == b.order.tolist() for a, b in zip(gathers[::2], gathers[1::2], strict=True))


def test_starts_as_the_scaled_patches():
    model = flows.Jet((3, 8, 8), channels=8, depth=1, heads=1, couplings=6)
    x = torch.rand(2, 3, 8, 8) - 0.5
    torch.testing.assert_close(model.transform(x)[0], flows.Patchify((3, 8, 8), 4, channels_last=True)(2.0 * x)[0])
    torch.testing.assert_close(model.transform(x)[1], torch.full((2,), 192 * math.log(2.0)))


def test_sampling():
    model = jet((3, 8, 8), 2, dtype=torch.float32)
    x, log_prob = model.sample_and_log_prob(3, temperature=0.8)
    assert x.shape == (3, 3, 8, 8) and model.sample(0).shape == (0, 3, 8, 8)
    torch.testing.assert_close(model.transform(x)[1] + model.base.log_prob(model.transform(x)[0], 0.8), log_prob,
                               rtol=1e-5, atol=1e-2)
    first, second = (model.sample(2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_permutations_are_saved():
    models = [jet((3, 8, 8), 4) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize(("name", "count"), [("imagenet64-207m", 207_177_216), ("imagenet64-1b", 1_019_612_160)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = flows.Jet.from_config(name)
    assert sum(p.numel() for p in model.parameters()) == count and all(t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize("memory", ["none", "save_z", "invert"])
def test_a_reduced_configuration_trains(memory):
    model = flows.Jet.from_config("imagenet64-207m", image_shape=(3, 8, 8), patch_size=2, channels=16, couplings=6,
                                  depth=1, heads=2)
    scattered(model, 0.05)
    x = torch.rand(16, 3, 8, 8) * 0.2
    step = TrainStep(model, torch.optim.Adam(model.parameters(), 3e-3, betas=(0.9, 0.95)), memory=memory)
    with torch.no_grad():
        expected = -plain_log_prob(model, x).mean().item()
    losses = [step(x).item() for _ in range(10)]
    assert losses[0] == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0] - 10
    bits = model.bits_per_dim(torch.randint(0, 50, (4, 3, 8, 8)))
    assert bits.shape == (4,) and bits.isfinite().all()


def test_compiles_to_one_graph():
    model = jet(dtype=torch.float32, couplings=2)
    x = torch.rand(3, 2, 4, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weight = next(m for m in model.modules() if isinstance(m, AffineCoupling)).conditioner.proj_in.weight
    value = compiled(x)
    torch.testing.assert_close(value, model(x))
    torch.testing.assert_close(torch.autograd.grad(value.sum(), weight), torch.autograd.grad(model(x).sum(), weight))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: flows.Jet((3, 8)), "image_shape"),
    (lambda: flows.Jet((3, 8, 6)), "image_shape"),
    (lambda: flows.Jet((3, 3, 3), patch_size=1), "patch_size"),
    (lambda: flows.Jet((2, 3, 3), patch_size=1, kinds=("spatial",)), "image_shape"),
    (lambda: flows.Jet((3, 8, 8), couplings=0), "couplings"),
    (lambda: flows.Jet((3, 8, 8), channels=10), "heads"),
    (lambda: flows.Jet((3, 8, 8), kinds=()), "kinds"),
    (lambda: flows.Jet((3, 8, 8), kinds=("channels",)), "kinds"),
    (lambda: flows.Jet((3, 8, 8), spatial=()), "spatial"),
    (lambda: flows.Jet((3, 8, 8), spatial=(*SPATIAL, "dots")), "spatial"),
    (lambda: flows.Jet.from_config("imagenet64"), "name"),
    (lambda: jet()(torch.zeros(1, 2, 4, 2).double()), "x: expected"),
    (lambda: jet()(torch.zeros(1, 2, 4, 4).double(), torch.zeros(1, 2)), "context"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
