"""Every kind of coupling under every split, with a context: which elements see what, and what they become."""

import pytest
import torch
from flow_checks import check_bijection, scattered
from torch import nn

from fastflow import flows
from fastflow.nn import MLP, AffineCoupling, MixtureCoupling, SplineCoupling

# name: (params per feature, constructor)
KINDS = {
    "additive": (1, lambda net, **kw: AffineCoupling(net, scale="additive", **kw)),
    "affine": (2, lambda net, **kw: AffineCoupling(net, scale="tanh", **kw)),
    "linear-spline": (4, lambda net, **kw: SplineCoupling(net, n_bins=4, kind="linear", **kw)),
    "rq-spline": (11, lambda net, **kw: SplineCoupling(net, n_bins=4, **kw)),
    "mixture": (8, lambda net, **kw: MixtureCoupling(net, n_components=2, **kw)),
}
# name: (split of 5 features, the passive ones, whether the conditioner sees those alone)
SPLITS = {
    "channel": ("channel", [0, 1], True),
    "index": ([4, 1], [4, 1], True),
    "checkerboard": ("checkerboard", [0, 2, 4], False),
    "mask": (torch.tensor([0, 1, 1, 0, 0]), [1, 2], False),
}


def build(kind, split, flip, seed=0):
    torch.manual_seed(seed)
    split, passive, alone = SPLITS[split]
    seen = 5 - len(passive) if flip else len(passive)
    per_feature, make = KINDS[kind]
    sizes = (seen, (5 - seen) * per_feature) if alone else (5, 5 * per_feature)
    return scattered(make(MLP(*sizes, (6,), context_features=2), split=split, flip=flip)).double()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_bijection_and_context(kind, split):
    passive = SPLITS[split][1]
    for seed in range(20):
        flip = seed % 2 == 1
        layer = build(kind, split, flip, seed)
        x, context = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
        if seed < 4:
            check_bijection(layer, x, context)
        z, logdet = layer(x, context)
        back, opposite = layer.inverse(z, context)
        torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(opposite, -logdet, rtol=1e-9, atol=1e-9)
        active = sorted({*range(5)} - {*passive})
        stays, moves = (active, passive) if flip else (passive, active)
        assert torch.equal(z[:, stays], x[:, stays]) and (z[:, moves] != x[:, moves]).any(0).all()
        other = layer(x, context + 1.0)[0]
        assert (other[:, moves] != z[:, moves]).any(0).all() and torch.equal(other[:, stays], x[:, stays])
        torch.testing.assert_close(layer(x.flip(0), context.flip(0))[0], z.flip(0))


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_split_is_a_permuted_channel_split(kind):
    per_feature, make = KINDS[kind]
    net = scattered(MLP(2, 3 * per_feature, (6,)))
    permutation = [4, 1, 0, 2, 3]
    indexed, channel = make(net, split=[4, 1]), make(net)
    permuted = flows.Compose(flows.Permute(permutation), channel, flows.Inverse(flows.Permute(permutation)))
    x = torch.randn(6, 5)
    torch.testing.assert_close(indexed(x), permuted(x))


def test_index_split_of_images_and_its_recomputation():
    conv = nn.Conv2d(2, 4, 3, padding=1)
    layer = AffineCoupling(conv, split=(3, 0)).double()
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    z, logdet = layer(x)
    raw, shift = conv(x[:, [3, 0]]).chunk(2, 1)
    torch.testing.assert_close(z[:, [1, 2]], x[:, [1, 2]] * raw.exp() + shift)
    torch.testing.assert_close(logdet, raw.flatten(1).sum(1))
    torch.testing.assert_close(layer.recompute(z), x)


def test_indices_travel_with_the_state():
    first, second = (AffineCoupling(MLP(2, 6), split=split) for split in ([0, 3], [1, 2]))
    second.load_state_dict(scattered(first).state_dict())
    x = torch.randn(2, 5)
    assert torch.equal(first(x)[0], second(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_travel_with_the_state(kind):
    """What is derived from them follows, such as how many ones there are."""
    per_feature, make = KINDS[kind]
    masks = torch.tensor([0, 1, 1, 0, 0]), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    first, second = (scattered(make(MLP(5, 5 * per_feature, (6,)), split=mask, flip=True)) for mask in masks)
    x, state = torch.randn(3, 5), first.state_dict()
    called = torch.compile(second, backend="eager") if kind == "additive" else second
    called(x)
    second.load_state_dict({**state, "mask": state["mask"].half()})
    torch.testing.assert_close(called(x), first(x), rtol=0, atol=0)
    torch.testing.assert_close(second.inverse(x), first.inverse(x), rtol=0, atol=0)
    assert second.mask.dtype == torch.bool and torch.equal(second(x)[0] == x, (masks[0] == 0).expand(3, 5))
    former = {key: value for key, value in state.items() if key != "mask"}
    third = make(MLP(5, 5 * per_feature, (6,)), split=masks[1])
    third.load_state_dict(former)
    assert torch.equal(third(x)[0] == x, (masks[1] == 1).expand(3, 5))


def test_a_mask_loads_into_a_layer_on_the_meta_device():
    first = scattered(AffineCoupling(MLP(4, 8), split=torch.tensor([1, 0, 1, 1])))
    with torch.device("meta"):
        second = AffineCoupling(MLP(4, 8), split=torch.zeros(4))
    assert second(torch.empty(3, 4, device="meta"))[0].shape == (3, 4)
    second.load_state_dict(first.state_dict(), assign=True)
    x = torch.randn(3, 4)
    torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)


@pytest.mark.parametrize(("mask", "message"), [
    (torch.tensor([1, 0, 1]), r"size mismatch for mask: .*\[3\].*\[4\]"), (torch.zeros(1, 4), "size mismatch for mask"),
    (torch.full((4,), 0.5), "mask: expected a mask of zeros and ones, got other values")])
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    layer = AffineCoupling(MLP(4, 8), split=torch.tensor([1, 0, 1, 1]))
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**layer.state_dict(), "mask": mask})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        AffineCoupling(MLP(4, 8), split="checkerboard").load_state_dict(layer.state_dict())


def test_indices_that_were_loaded_are_held_against_x():
    first, second = (AffineCoupling(MLP(2, 6), split=split) for split in ([0, 4], [1, 2]))
    second.load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="^x: expected at least 5"):
        second(torch.zeros(1, 4))


@pytest.mark.parametrize("split", [[0, 0], [-1], [True], [0.5]])
def test_what_an_index_split_refuses(split):
    with pytest.raises(ValueError, match="^split"):
        AffineCoupling(MLP(2, 6), split=split)
    with pytest.raises(ValueError, match="^x: expected at least 5"):
        AffineCoupling(MLP(2, 6), split=[0, 4])(torch.zeros(1, 4))
