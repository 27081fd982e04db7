"""load_glow: state dicts of normflows, of nflows and in the key layouts of two programs give the same density."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastflow import flows

nf = pytest.importorskip("normflows")
nt = pytest.importorskip("nflows.transforms")
from nflows.distributions import StandardNormal  # noqa: E402
from nflows.flows import Flow  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
SHAPE = (3, 8, 12)


def draw(*shape):
    return 0.2 * torch.randn(shape, dtype=torch.float64)


def normal_log_prob(x, mean, log_sigma):
    value = -0.5 * math.log(2 * math.pi) - log_sigma - 0.5 * ((x - mean) * torch.exp(-log_sigma)) ** 2
    return value.flatten(1).sum(1)


def squeeze(x):
    """Pixel (i, j) of channel c's 2x2 blocks becomes channel 4c + 2i + j."""
    return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)


def factors(channels, permutation, sign, lower, log_s, upper):
    """{name: value} of a P L U weight, with entries where the masks are zero."""
    return {permutation: torch.eye(channels, dtype=torch.float64)[torch.randperm(channels)],
            sign: torch.where(torch.rand(channels, dtype=torch.float64) < 0.5, -1.0, 1.0).double(),
            lower: draw(channels, channels), log_s: draw(channels), upper: draw(channels, channels)}


def assemble(p, sign, lower, log_s, upper):
    return p @ (lower.tril(-1) + torch.eye(len(p), dtype=p.dtype)) @ (upper.triu(1) + torch.diag(sign * log_s.exp()))


class Rosinality:
    """A state dict of rosinality's keys and shapes, and the density that they mean."""

    LU = ("w_p", "s_sign", "w_l", "w_s", "w_u")

    def __init__(self, levels=2, steps=2, hidden=8, affine=True, lu=True):
        self.state, self.levels, self.steps, self.affine = {}, levels, steps, affine
        channels = SHAPE[0]
        for level in range(levels):
            channels *= 4
            for step in range(steps):
                key = f"blocks.{level}.flows.{step}."
                scale = 0.7 + torch.rand(1, channels, 1, 1, dtype=torch.float64)
                scale[:, 0] *= -1.0
                self.state |= {key + "actnorm.loc": draw(1, channels, 1, 1), key + "actnorm.scale": scale,
                               key + "actnorm.initialized": torch.tensor(1, dtype=torch.uint8)}
                if lu or level == levels - 1:
                    found = factors(channels, *self.LU)
                    for name in ("u_mask", "l_mask", "l_eye"):
                        found[name] = torch.ones(channels, channels)
                else:
                    found = {"weight": (torch.eye(channels) + draw(channels, channels))[:, :, None, None]}
                self.state |= {f"{key}invconv.{name}": value for name, value in found.items()}
                out = channels if affine else channels // 2
                for index, shape in ((0, (hidden, channels // 2, 3, 3)), (2, (hidden, hidden, 1, 1))):
                    self.state[f"{key}coupling.net.{index}.weight"] = draw(*shape)
                    self.state[f"{key}coupling.net.{index}.bias"] = draw(hidden)
                self._zero_conv(key + "coupling.net.4", hidden, out)
            last = level == levels - 1
            inputs = channels if last else channels // 2
            self._zero_conv(f"blocks.{level}.prior", inputs, 2 * inputs)
            channels //= 2

    def _zero_conv(self, key, inputs, outputs):
        self.state |= {key + ".conv.weight": draw(outputs, inputs, 3, 3), key + ".conv.bias": draw(outputs),
                       key + ".scale": draw(1, outputs, 1, 1)}

    def conv(self, key, x):
        s = self.state
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), s[key + ".conv.weight"], s[key + ".conv.bias"])
        return y * torch.exp(3.0 * s[key + ".scale"])

    def log_prob(self, x):
        s, total = self.state, 0.0
        for level in range(self.levels):
            x = squeeze(x)
            for step in range(self.steps):
                key = f"blocks.{level}.flows.{step}."
                x = s[key + "actnorm.scale"] * (x + s[key + "actnorm.loc"])
                weight = (s[key + "invconv.weight"][:, :, 0, 0] if key + "invconv.weight" in s
                          else assemble(*(s[key + "invconv." + name] for name in self.LU)))
                x = F.conv2d(x, weight[:, :, None, None])
                total = total + x[0, 0].numel() * (s[key + "actnorm.scale"].abs().log().sum()
                                                   + torch.linalg.slogdet(weight)[1])
                a, b = x.chunk(2, 1)
                h = F.relu(F.conv2d(a, s[key + "coupling.net.0.weight"], s[key + "coupling.net.0.bias"], padding=1))
                h = F.relu(F.conv2d(h, s[key + "coupling.net.2.weight"], s[key + "coupling.net.2.bias"]))
                h = self.conv(key + "coupling.net.4", h)
                if self.affine:
                    raw, shift = h.chunk(2, 1)
                    scale = torch.sigmoid(raw + 2.0)
                    b, total = (b + shift) * scale, total + scale.log().flatten(1).sum(1)
                else:
                    b = b + h
                x = torch.cat([a, b], 1)
            latent = x
            if level < self.levels - 1:
                x, latent = x.chunk(2, 1)
                params = self.conv(f"blocks.{level}.prior", x)
            else:
                params = self.conv(f"blocks.{level}.prior", torch.zeros_like(x))
            total = total + normal_log_prob(latent, *params.chunk(2, 1))
        return total


class Y0ast:
    """The same of y0ast's."""

    LU = ("p", "sign_s", "lower", "log_s", "upper")

    def __init__(self, levels=2, steps=2, hidden=8, affine=True, lu=True, learn_top=True):
        self.state, self.levels, self.steps, self.affine = {}, levels, steps, affine
        channels, index = SHAPE[0], 0
        for level in range(levels):
            channels, index = 4 * channels, index + 1
            for _ in range(steps):
                key = f"flow.layers.{index}."
                self.state |= {f"{key}actnorm.{name}": draw(1, channels, 1, 1) for name in ("bias", "logs")}
                found = (factors(channels, *self.LU) if lu
                         else {"weight": torch.eye(channels) + draw(channels, channels)})
                self.state |= {f"{key}invconv.{name}": value for name, value in found.items()}
                for name, shape in (("0", (hidden, channels // 2, 3, 3)), ("2", (hidden, hidden, 1, 1))):
                    self.state[f"{key}block.{name}.conv.weight"] = draw(*shape)
                    for value in ("bias", "logs"):
                        self.state[f"{key}block.{name}.actnorm.{value}"] = draw(1, hidden, 1, 1)
                self._zeros(key + "block.4", hidden, channels if affine else channels // 2)
                index += 1
            if level < levels - 1:
                self._zeros(f"flow.layers.{index}.conv", channels // 2, channels)
                channels, index = channels // 2, index + 1
        self.state["prior_h"] = torch.zeros(1, 2 * channels, SHAPE[1] // 2**levels, SHAPE[2] // 2**levels)
        if learn_top:
            self._zeros("learn_top_fn", 2 * channels, 2 * channels)

    def _zeros(self, key, inputs, outputs):
        self.state |= {key + ".conv.weight": draw(outputs, inputs, 3, 3), key + ".conv.bias": draw(outputs),
                       key + ".logs": draw(outputs, 1, 1)}

    def conv(self, key, x):
        s = self.state
        y = F.conv2d(x, s[key + ".conv.weight"], s[key + ".conv.bias"], padding=1)
        return y * torch.exp(3.0 * s[key + ".logs"])

    def normed(self, key, x, padding):
        s = self.state
        x = F.conv2d(x, s[key + ".conv.weight"], padding=padding)
        return F.relu((x + s[key + ".actnorm.bias"]) * s[key + ".actnorm.logs"].exp())

    def log_prob(self, x):
        s, total, index = self.state, 0.0, 0
        for level in range(self.levels):
            x, index = squeeze(x), index + 1
            for _ in range(self.steps):
                key = f"flow.layers.{index}."
                x = (x + s[key + "actnorm.bias"]) * s[key + "actnorm.logs"].exp()
                weight = (s[key + "invconv.weight"] if key + "invconv.weight" in s
                          else assemble(*(s[key + "invconv." + name] for name in self.LU)))
                x = F.conv2d(x, weight[:, :, None, None])
                total = total + x[0, 0].numel() * (s[key + "actnorm.logs"].sum() + torch.linalg.slogdet(weight)[1])
                a, b = x.chunk(2, 1)
                h = self.normed(key + "block.2", self.normed(key + "block.0", a, 1), 0)
                h = self.conv(key + "block.4", h)
                if self.affine:
                    scale = torch.sigmoid(h[:, 1::2] + 2.0)
                    b, total = (b + h[:, 0::2]) * scale, total + scale.log().flatten(1).sum(1)
                else:
                    b = b + h
                x, index = torch.cat([a, b], 1), index + 1
            if level < self.levels - 1:
                x, latent = x.chunk(2, 1)
                h, index = self.conv(f"flow.layers.{index}.conv", x), index + 1
                total = total + normal_log_prob(latent, h[:, 0::2], h[:, 1::2])
        prior = s["prior_h"].to(x)
        prior = self.conv("learn_top_fn", prior) if "learn_top_fn.logs" in s else prior
        return total + normal_log_prob(x, *prior.chunk(2, 1))


def check(model, x, expected):
    """Density, and that samples come from it: the inverse undoes the transform."""
    assert isinstance(model, flows.Glow)
    torch.testing.assert_close(model.log_prob(x), expected, rtol=TOLERANCE[x.dtype], atol=TOLERANCE[x.dtype])
    back = model.transform.inverse(model.transform(x)[0])[0]
    torch.testing.assert_close(back, x, rtol=0.0, atol=1e4 * TOLERANCE[x.dtype])


@pytest.mark.parametrize("program", [Rosinality, Y0ast])
@pytest.mark.parametrize("options", [{}, {"lu": False}, {"affine": False, "levels": 1}],
                         ids=["lu", "plain", "additive"])
def test_published_layouts(program, options):
    original = program(**options)
    x = torch.rand(2, *SHAPE, dtype=torch.float64) - 0.5
    model = flows.load_glow(original.state, program.__name__.lower(), image_shape=SHAPE)
    check(model, x, original.log_prob(x))


def test_float32_and_data_parallel_keys():
    original = Rosinality()
    x = torch.rand(2, *SHAPE, dtype=torch.float64) - 0.5
    state = {f"module.{key}": value.float() if value.is_floating_point() else value
             for key, value in original.state.items()}
    model = flows.load_glow(state, "rosinality", image_shape=SHAPE)
    check(model, x.float(), original.log_prob(x).float())


def test_y0ast_without_learned_top():
    original = Y0ast(learn_top=False)
    x = torch.rand(2, *SHAPE, dtype=torch.float64) - 0.5
    model = flows.load_glow(original.state, "y0ast")
    check(model, x, original.log_prob(x))
    assert isinstance(model.base, type(flows.Glow(SHAPE, 1, 1, 8).base))


def normflows_glow(base, dtype, **options):
    levels, blocks, bases = 2, [], []
    for level in range(levels):
        channels = SHAPE[0] * 2 ** (levels + 1 - level)
        blocks.append([*(nf.flows.GlowBlock(channels, 16, **options) for _ in range(2)), nf.flows.Squeeze()])
        latent = channels // (2 if level else 1), SHAPE[1] // 2 ** (levels - level), SHAPE[2] // 2 ** (levels - level)
        bases.append(base(latent))
    model = nf.MultiscaleFlow(bases, blocks, [nf.flows.Merge() for _ in range(levels - 1)], class_cond=False).to(dtype)
    model.log_prob(torch.rand(8, *SHAPE, dtype=dtype), None)  # initialises
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("base", "options"), [(nf.distributions.DiagGaussian, {}),
                                               (nf.distributions.GlowBase, {"use_lu": False}),
                                               (nf.distributions.DiagGaussian, {"scale": False})])
def test_normflows(base, options, dtype):
    model = normflows_glow(base, dtype, **options)
    x = torch.rand(3, *SHAPE, dtype=dtype) - 0.5
    check(flows.load_glow(model.state_dict(), "normflows", image_shape=SHAPE), x, model.log_prob(x, None))


class Net(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.a, self.b = nn.Conv2d(inputs, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.c = nn.Conv2d(16, outputs, 3, padding=1)

    def forward(self, x, context=None):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def nflows_glow(dtype, coupling, nested):
    levels, channels = 2, SHAPE[0]
    multiscale = nt.MultiscaleCompositeTransform(levels)
    for level in range(levels):
        channels *= 4
        halves = [1] * (channels // 2) + [0] * (channels // 2)
        mixed = [index % 2 for index in range(channels)]  # any mask does, but for the last of a level
        parts = [[nt.ActNorm(channels), nt.OneByOneConvolution(channels, identity_init=False), coupling(mask, Net)]
                 for mask in (mixed, halves)]
        parts = [nt.CompositeTransform(part) for part in parts] if nested else sum(parts, [])
        shape = channels, SHAPE[1] // 2 ** (level + 1), SHAPE[2] // 2 ** (level + 1)
        multiscale.add_transform(nt.CompositeTransform([nt.SqueezeTransform(), *parts]), shape)
        channels //= 2
    model = Flow(multiscale, StandardNormal([math.prod(SHAPE)])).to(dtype)
    model.log_prob(torch.rand(8, *SHAPE, dtype=dtype))  # initialises
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("coupling", "nested"), [(nt.AffineCouplingTransform, False),
                                                  (nt.AdditiveCouplingTransform, True)])
def test_nflows(coupling, nested, dtype):
    model = nflows_glow(dtype, coupling, nested)
    x = torch.rand(3, *SHAPE, dtype=dtype) - 0.5
    loaded = flows.load_glow(model.state_dict(), "nflows", image_shape=SHAPE)
    check(loaded, x, model.log_prob(x))


@pytest.mark.parametrize(("source", "make", "key"), [
    ("rosinality", lambda: Rosinality().state, "blocks.1.flows.0.coupling.net.4.scale"),
    ("y0ast", lambda: Y0ast().state, "flow.layers.2.invconv.log_s"),
    ("normflows", lambda: normflows_glow(nf.distributions.DiagGaussian, torch.float64).state_dict(),
     "flows.0.1.flows.1.sign_S"),
    ("nflows", lambda: nflows_glow(torch.float64, nt.AffineCouplingTransform, False).state_dict(),
     "_transform._transforms.1._transforms.2.bias")])
def test_missing_and_unexpected_keys_are_named(source, make, key):
    state = dict(make())
    with pytest.raises(ValueError, match="unexpected key 'class_embed'"):
        flows.load_glow(state | {"class_embed": torch.zeros(2)}, source, image_shape=SHAPE)
    del state[key]
    with pytest.raises(ValueError, match=f"missing key '{key}'"):
        flows.load_glow(state, source, image_shape=SHAPE)


def test_arguments():
    state = Rosinality().state
    with pytest.raises(ValueError, match="source: expected"):
        flows.load_glow(state, "glow")
    with pytest.raises(ValueError, match="image_shape: expected"):
        flows.load_glow(state, "rosinality")
    with pytest.raises(ValueError, match="image_shape: expected 3 channels"):
        flows.load_glow(state, "rosinality", image_shape=(1, 8, 8))
    with pytest.raises(ValueError, match=r"image_shape: expected \(3, 8, 12\)"):
        flows.load_glow(Y0ast().state, "y0ast", image_shape=(3, 8, 8))
    with pytest.raises(ValueError, match="expected shape .* of 'blocks.0.flows.0.invconv.w_s'"):
        flows.load_glow(state | {"blocks.0.flows.0.invconv.w_s": torch.zeros(3)}, "rosinality", image_shape=SHAPE)
    with pytest.raises(TypeError, match="state_dict: expected a mapping"):
        flows.load_glow([], "rosinality")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
