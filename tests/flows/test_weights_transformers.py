"""load_tarflow and load_jet: state dicts of the published key layouts give the density that those keys mean."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastflow import flows

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(*shape):
    return 0.3 * torch.randn(shape, dtype=torch.float64)


def attention(q, k, v, causal):
    """Heads (B, H, T, C); a token sees those up to it, or all."""
    logits = q @ k.mT / math.sqrt(q.shape[3])
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[2:]).triu(1).bool(), -math.inf)
    return (logits.softmax(3) @ v).transpose(1, 2).flatten(2)


class MLTarFlow:
    """A state dict of ml-tarflow's keys and shapes, and its density: 3 x 8 x 8 images, patches of 4 x 4."""

    tokens, features, channels, head_dim, blocks, layers = 4, 48, 8, 4, 3, 2

    def __init__(self, classes=0):
        self.classes, c = classes, self.channels
        self.state = {"var": 0.5 + torch.rand(self.tokens, self.features, dtype=torch.float64)}
        for block in range(self.blocks):
            key = f"blocks.{block}."
            self.state |= {key + "pos_embed": draw(self.tokens, c),
                           key + "attn_mask": torch.ones(self.tokens, self.tokens).tril()}
            if classes:
                self.state[key + "class_embed"] = draw(classes, 1, c)
            self._linear(key + "proj_in", self.features, c)
            self._linear(key + "proj_out", c, 2 * self.features)
            for layer in range(self.layers):
                start = f"{key}attn_blocks.{layer}."
                for name, sizes in (("attention.norm", (c,)), ("attention.qkv", (c, 3 * c)), ("attention.proj", (c, c)),
                                    ("mlp.norm", (c,)), ("mlp.main.0", (c, 4 * c)), ("mlp.main.2", (4 * c, c))):
                    self._linear(start + name, *sizes)
            self.state[key + "proj_out.weight"] *= 0.1  # as after training: scales stay near 1

    def _linear(self, key, inputs, outputs=None):
        shape = (inputs,) if outputs is None else (outputs, inputs)
        self.state |= {key + ".weight": draw(*shape), key + ".bias": draw(outputs or inputs)}

    def log_prob(self, x, labels=None):
        """log-density (B,) of x (B, 3, 8, 8), latents z ~ N(0, var)."""
        s, c = self.state, self.channels

        def linear(key, h):
            return F.linear(h, s[key + ".weight"], s[key + ".bias"])

        def norm(key, h):
            return F.layer_norm(h, (c,), s[key + ".weight"], s[key + ".bias"])

        x, total = F.unfold(x, 4, stride=4).mT, 0.0
        for block in range(self.blocks):
            key, positions = f"blocks.{block}.", s[f"blocks.{block}.pos_embed"]
            if block % 2:
                x, positions = x.flip(1), positions.flip(0)
            h = linear(key + "proj_in", x) + positions
            if self.classes:
                embed = s[key + "class_embed"]
                h = h + (embed.mean(0) if labels is None else torch.stack(
                    [embed[y] if y >= 0 else embed.mean(0) for y in labels.tolist()]))
            for layer in range(self.layers):
                start = f"{key}attn_blocks.{layer}."
                q, k, v = linear(start + "attention.qkv", norm(start + "attention.norm", h)).unflatten(
                    2, (3 * c // self.head_dim, -1)).transpose(1, 2).chunk(3, 1)
                h = h + linear(start + "attention.proj", attention(q, k, v, causal=True))
                h = h + linear(start + "mlp.main.2", F.gelu(linear(start + "mlp.main.0", norm(start + "mlp.norm", h))))
            h = linear(key + "proj_out", h)
            alpha, mean = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1).chunk(2, 2)
            x, total = (x - mean) * torch.exp(-alpha), total - alpha.flatten(1).sum(1)
            x = x.flip(1) if block % 2 else x
        prior = torch.distributions.Normal(torch.zeros_like(s["var"]), s["var"].sqrt())
        return total + prior.log_prob(x).flatten(1).sum(1)


class BigVisionJet:
    """Flattened keys and shapes of big_vision's Jet, and its density: 2 x 4 x 4 images, patches of 2 x 2."""

    tokens, features, channels, heads, depth = 4, 8, 8, 2, 2
    kinds = ("channel", "spatial", "channel", "spatial")

    def __init__(self, prefix="params/"):
        n, c, width = len(self.kinds), self.channels, self.channels // self.heads
        shapes = {"init_proj": ((self.features // 2,), (c,)), "final_proj": ((c,), (self.features,))}
        norms = ["vit/encoder_norm"]
        for layer in range(self.depth):
            key = f"vit/encoderblock_{layer}/"
            shapes |= {f"{key}MultiHeadDotProductAttention_0/{name}": ((c,), (self.heads, width))
                       for name in ("query", "key", "value")}
            shapes |= {key + "MultiHeadDotProductAttention_0/out": ((self.heads, width), (c,)),
                       key + "MlpBlock_0/Dense_0": ((c,), (4 * c,)), key + "MlpBlock_0/Dense_1": ((4 * c,), (c,))}
            norms += [key + "LayerNorm_0", key + "LayerNorm_1"]
        state = {"posemb": draw(n, 1, self.tokens, c)}
        for key, (rows, columns) in shapes.items():
            state |= {key + "/kernel": draw(n, *rows, *columns), key + "/bias": draw(n, *columns)}
        for key in norms:
            state |= {key + "/scale": draw(n, c), key + "/bias": draw(n, c)}
        state = {"couplings/dnn/" + key: value for key, value in state.items()}
        for kind, size in (("channel", self.features), ("spatial", self.tokens)):
            masks = [torch.eye(size)[torch.randperm(size)] if kind == own else torch.zeros(size, size)
                     for own in self.kinds]
            state[f"{kind}_coupling_masks-FREEZE_ME"] = torch.stack(masks).double()
        self.prefix, self.state = prefix, {prefix + key: value.numpy() for key, value in state.items()}

    def value(self, key, index):
        return torch.from_numpy(self.state[self.prefix + key][index])

    def dense(self, key, index, h, dims=1):
        kernel = self.value(f"couplings/dnn/{key}/kernel", index)
        return torch.tensordot(h, kernel, dims) + self.value(f"couplings/dnn/{key}/bias", index)

    def norm(self, key, index, h):
        return F.layer_norm(h, (self.channels,), self.value(f"couplings/dnn/{key}/scale", index),
                            self.value(f"couplings/dnn/{key}/bias", index), 1e-6)

    def conditioner(self, index, x):
        h = self.dense("init_proj", index, x) + self.value("couplings/dnn/posemb", index)
        for layer in range(self.depth):
            key = f"vit/encoderblock_{layer}/"
            seen = self.norm(key + "LayerNorm_0", index, h)
            q, k, v = (self.dense(f"{key}MultiHeadDotProductAttention_0/{name}", index, seen).transpose(1, 2)
                       for name in ("query", "key", "value"))
            out = attention(q, k, v, causal=False).unflatten(2, (self.heads, -1))
            h = h + self.dense(key + "MultiHeadDotProductAttention_0/out", index, out, 2)
            inner = F.gelu(self.dense(key + "MlpBlock_0/Dense_0", index, self.norm(key + "LayerNorm_1", index, h)),
                           approximate="tanh")
            h = h + self.dense(key + "MlpBlock_0/Dense_1", index, inner)
        return self.dense("final_proj", index, self.norm("vit/encoder_norm", index, h)).chunk(2, 2)

    def log_prob(self, x):
        """log-density (B,) of x (B, 2, 4, 4), latents z ~ N(0, I)."""
        x = x.unflatten(3, (2, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).reshape(len(x), 4, 8)
        total = 0.0
        for index, kind in enumerate(self.kinds):
            mask = self.value(f"{kind}_coupling_masks-FREEZE_ME", index)
            if kind == "channel":
                first, second = (x @ mask).chunk(2, 2)
            else:
                first, second = (t.reshape(len(x), 4, 4) for t in torch.einsum("ntk,tm->nmk", x, mask).chunk(2, 1))
            bias, raw = self.conditioner(index, first)
            second = (second + bias) * 2.0 * torch.sigmoid(raw)
            total = total + (F.logsigmoid(raw) + math.log(2.0)).flatten(1).sum(1)
            if kind == "channel":
                x = torch.cat([first, second], 2) @ mask.T
            else:
                whole = torch.cat([t.reshape(len(x), 2, 8) for t in (first, second)], 1)
                x = torch.einsum("ntk,tm->nmk", whole, mask.T)
        return total + torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)


def check(model, x, expected, context=None):
    """log p(x) under ours is the original's of 2x, in units of x; the inverse undoes the transform."""
    expected = expected + math.log(2.0) * x[0].numel()
    tolerance = TOLERANCE[x.dtype]
    assert bool(expected.isfinite().all())
    actual = model.log_prob(x) if context is None else model.log_prob(x, context)
    torch.testing.assert_close(actual, expected.to(x), rtol=tolerance, atol=tolerance)
    z = model.transform(x, context)[0]
    torch.testing.assert_close(model.transform.inverse(z, context)[0], x, rtol=0.0, atol=1e3 * tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("classes", [0, 3])
def test_tarflow(classes, dtype):
    original = MLTarFlow(classes)
    state = {f"module.{key}": value.to(dtype) for key, value in original.state.items()}
    model = flows.load_tarflow(state, head_dim=4)
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64) - 0.5
    check(model, x.to(dtype), original.log_prob(2.0 * x))
    if classes:
        labels = torch.tensor([2, -1, 0])
        check(model, x.to(dtype), original.log_prob(2.0 * x, labels), labels)


def test_tarflow_with_the_prior_of_its_training():
    original = MLTarFlow()
    original.state["var"] = torch.ones_like(original.state["var"])
    model = flows.load_tarflow(original.state, head_dim=4, image_shape=(3, 8, 8))
    assert isinstance(model.base, flows.StandardNormal)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64) - 0.5
    check(model, x, original.log_prob(2.0 * x))


@pytest.mark.parametrize(("prefix", "dtype"), [("params/", torch.float64), ("", torch.float32)])
def test_jet(prefix, dtype):
    original = BigVisionJet(prefix)
    kind = np.float64 if dtype == torch.float64 else np.float32
    model = flows.load_jet({key: value.astype(kind) for key, value in original.state.items()}, patch_size=2)
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64) - 0.5
    check(model, x.to(dtype), original.log_prob(2.0 * x))
    assert all(layer.order.dtype == torch.int64 for layer in model.transform.transforms[1::3])


@pytest.mark.parametrize(("load", "make", "options", "key"), [
    (flows.load_tarflow, MLTarFlow, {"head_dim": 4}, "blocks.2.attn_blocks.1.mlp.main.2.bias"),
    (flows.load_jet, BigVisionJet, {"patch_size": 2}, "params/couplings/dnn/vit/encoderblock_1/LayerNorm_1/scale")])
def test_missing_and_unexpected_keys_are_named(load, make, options, key):
    state = dict(make().state)
    extra = key.rsplit("/", 1)[0] + "/more"
    with pytest.raises(ValueError, match=f"unexpected key '{extra}'"):
        load(state | {extra: torch.zeros(2)}, **options)
    with pytest.raises(ValueError, match=f"expected shape .* of '{key}'"):
        load(state | {key: torch.zeros(2)}, **options)
    del state[key]
    with pytest.raises(ValueError, match=f"missing key '{key}'"):
        load(state, **options)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="image_shape: expected one that 4 patches of 48 values make"):
        flows.load_tarflow(MLTarFlow().state, image_shape=(3, 8, 12), head_dim=4)
    state = BigVisionJet().state
    key = "params/channel_coupling_masks-FREEZE_ME"
    with pytest.raises(ValueError, match=f"permutation matrix at 2 of '{key}'"):
        masks = state[key].copy()
        masks[2, 0] = 1.0
        flows.load_jet(state | {key: masks}, patch_size=2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
