"""normflows under accelerate: couplings, Glow, linear layers and splines, both directions, scale maps and splits."""

from unittest import mock

import pytest
import torch
from adapter_checks import accelerated, close, same, same_training, scattered
from torch import nn

import fastflow
from fastflow.adapters import layers as adapter_layers

nf = pytest.importorskip("normflows")

pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
BOTH = (lambda t, z: t(z), lambda t, z: t.inverse(z))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def multiscale(use_lu=True, hidden=16, levels=2, steps=2, size=4, channels=1):
    """normflows' own example of a Glow."""
    q0, merges, layers = [], [], []
    for i in range(levels):
        layers.append([nf.flows.GlowBlock(channels * 2**(levels + 1 - i), hidden, use_lu=use_lu)
                       for _ in range(steps)] + [nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
            shape = (channels * 2**(levels - i), size // 2**(levels - i), size // 2**(levels - i))
        else:
            shape = (channels * 2**(levels + 1), size // 2**levels, size // 2**levels)
        q0.append(nf.distributions.DiagGaussian(shape))
    return nf.MultiscaleFlow(q0, layers, merges, class_cond=False)


@DTYPES
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv", None])
@pytest.mark.parametrize("split", ["channel", "channel_inv"])
def test_coupling_blocks(split, scale_map, dtype):
    """With a network that goes into the kernel (no LeakyReLU), and with one that does not."""
    for leaky in (0.0, 0.1):
        scale = scale_map is not None
        net = nf.nets.MLP([2, 8, 4 if scale else 2], leaky=leaky)
        block = scattered(nf.flows.AffineCouplingBlock(net, scale, scale_map or "exp", split)).to(dtype)
        same(block, BOTH, [torch.randn(7, 4, dtype=dtype)], 2)


@DTYPES
def test_coupling_of_a_list(dtype):
    layer = scattered(nf.flows.AffineCoupling(nf.nets.MLP([2, 8, 6]))).to(dtype)
    calls = (lambda t, a, b: t([a, b]), lambda t, a, b: t.inverse([a, b]))
    same(layer, calls, [torch.randn(7, 2, dtype=dtype), torch.randn(7, 3, dtype=dtype)], 1)


class Raw(nn.Module):
    """A conditioner whose raw scale is one number."""

    def __init__(self, raw):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(raw))

    def forward(self, z):
        return torch.stack([0.1 * z, self.raw + 0 * z], 2).flatten(1)


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("scale_map", ["sigmoid", "sigmoid_inv"])
@pytest.mark.parametrize("block", [False, True])
def test_the_logarithm_of_a_sigmoid_that_underflows(block, scale_map, fix):
    """The host's value where it is finite, in float64; in float32, where it is not, the right one: by default where a
    kernel gains, always with fix=True."""
    layer = nf.flows.AffineCoupling(Raw(-120.0), True, scale_map)
    z = [torch.full((2, 3), 0.5), torch.full((2, 3), 0.7)]
    if block:
        layer, z = nf.flows.AffineCouplingBlock(layer.param_map, True, scale_map), torch.cat(z, 1)
    fused, _ = accelerated(layer, fix=fix)
    signs = (1, -1) if scale_map == "sigmoid" else (-1, 1)
    for call, sign in zip(BOTH, signs, strict=True):
        assert not torch.isfinite(call(layer, z)[1]).any()
        call(fused, z)
        with mock.patch.object(adapter_layers, "SMALL", adapter_layers.SMALL if fix else 0):
            logdet = call(fused, z)[1]
        close(logdet, torch.full((2,), 3 * 118.0 * sign), 1e-6)
        (grad,) = torch.autograd.grad(logdet.sum(), list(fused.parameters()))
        assert torch.isfinite(grad)
    double = layer.double()
    fused, _ = accelerated(double, fix=fix)
    z = z.double() if block else [t.double() for t in z]
    for call in BOTH:
        close(call(fused, z)[1], call(double, z)[1], 1e-12)
        assert torch.isfinite(call(double, z)[1]).all()


@pytest.mark.parametrize("called", [False, True])
def test_a_coupling_that_a_swapped_ones_class_made(called):
    torch.manual_seed(0)
    layer = nf.flows.AffineCoupling(nf.nets.MLP([2, 8, 4]))
    original = nf.flows.AffineCoupling(layer.param_map)
    fastflow.accelerate(layer)
    z = torch.randn(2, 5, 2).unbind()
    if called:
        layer(z)
    for call in BOTH:
        (z1, z2), logdet = call(type(layer)(layer.param_map), z)
        (w1, w2), want = call(original, z)
        for got, w in ((z1, w1), (z2, w2), (logdet, want)):
            close(got, w, 1e-5)


def test_fix_is_that_of_the_last_call():
    layer = nf.flows.AffineCoupling(Raw(-120.0), True, "sigmoid")
    z = [torch.full((2, 3), 0.5), torch.full((2, 3), 0.7)]
    for fix in (False, True, False):
        fastflow.accelerate(layer, verify=False, fix=fix)
        assert torch.isfinite(layer(z)[1]).all() == fix


@DTYPES
@pytest.mark.parametrize("nets", ["both", "no scale", "no shift"])
def test_masked_affine(nets, dtype):
    t, s = (None if nets == no else nf.nets.MLP([4, 8, 4]) for no in ("no shift", "no scale"))
    layer = scattered(nf.flows.MaskedAffineFlow(torch.tensor([0.0, 1.0, 1.0, 0.0]), t, s)).to(dtype)
    same(layer, BOTH, [torch.randn(7, 4, dtype=dtype)], 1)


@DTYPES
@pytest.mark.parametrize("options", [{}, {"use_lu": False, "scale_map": "exp", "split_mode": "channel_inv"},
                                     {"split_mode": "checkerboard", "leaky": 0.1}, {"scale": False}], ids=str)
def test_glow_block(options, dtype):
    block = scattered(nf.flows.GlowBlock(6, 16, **options), 0.05).to(dtype)
    z = torch.randn(3, 6, 4, 4, dtype=dtype)
    with torch.no_grad():
        block(z)  # ActNorm's initialisation
    same(block, BOTH, [z], 6)


@DTYPES
def test_one_by_one_and_actnorm(dtype):
    z = torch.randn(3, 4, 2, 5, dtype=dtype)
    for use_lu in (True, False):
        same(scattered(nf.flows.Invertible1x1Conv(4, use_lu), 0.05).to(dtype), BOTH, [z], 1)
    norm = nf.flows.ActNorm((4, 1, 1)).to(dtype)
    norm(z)
    same(scattered(norm), BOTH, [z], 1)


@DTYPES
@pytest.mark.parametrize("make", [
    lambda: nf.flows.CoupledRationalQuadraticSpline(4, 1, 8, num_context_channels=3),
    lambda: nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8, num_context_channels=3, permute_mask=True),
    lambda: nf.flows.MaskedAffineAutoregressive(4, 8, context_features=3)], ids=["coupled", "autoregressive", "affine"])
def test_with_context(make, dtype):
    layer = scattered(make()).to(dtype)
    calls = (lambda t, z, c: t(z, c), lambda t, z, c: t.inverse(z, c))
    coupled = type(layer) is nf.flows.CoupledRationalQuadraticSpline
    same(layer, calls, [2 * torch.randn(8, 4, dtype=dtype), torch.randn(8, 3, dtype=dtype)], 2 if coupled else 1)


def test_a_glow_block_under_autocast_has_the_hosts_dtypes():
    torch.manual_seed(0)
    model, x = nf.flows.GlowBlock(4, 8, init_zeros=False), torch.randn(2, 4, 24, 24)
    model(x)
    fused, _ = accelerated(model, verify=False)
    for call in (lambda m: m(x), lambda m: m.inverse(x)):
        truth = call(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = call(fused), call(model)
        assert [t.dtype for t in found[0]] == [t.dtype for t in found[1]]
        close(found[0][0].float(), truth[0], 2e-2)  # the log-determinants are small differences of large ones


def test_log_prob_of_a_glow_under_autocast():
    torch.manual_seed(0)
    model, x = multiscale(size=48), torch.rand(2, 1, 48, 48)
    want = model.log_prob(x, None)  # initialises ActNorm
    fused, _ = accelerated(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            close(fused.log_prob(x, None).float(), want, 2e-2)
        fused.log_prob(x, None)


def test_a_hook_inside_a_block_is_run():
    block = nf.flows.GlowBlock(4, 16)
    z, seen = torch.randn(2, 4, 4, 4), []
    block(z)
    fused, _ = accelerated(block)
    fused.flows[1].register_forward_hook(lambda *args: seen.append(1))
    fused(z)
    before = len(seen)
    for got, want in zip(fused(z), block(z), strict=True):
        close(got, want, 1e-5)
    assert len(seen) == before + 1


@pytest.mark.parametrize("call", BOTH)
@pytest.mark.parametrize("kind", ["GlowBlock", "AffineCouplingBlock"])
def test_a_hook_of_all_modules_sees_every_layer_of_a_block(kind, call):
    block = nf.flows.GlowBlock(4, 8) if kind == "GlowBlock" else nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4]))
    z, seen = torch.randn(2, 4, 24, 24) if kind == "GlowBlock" else torch.randn(2048, 4), []
    block(z)
    fused, _ = accelerated(block, verify=False)
    for m in (block, fused):
        seen.append([])
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen[-1].append(type(m).__name__))
        try:
            call(m, z)
        finally:
            handle.remove()
    assert seen[0] == seen[1]


def test_a_block_whose_layers_were_swapped_before():
    block = nf.flows.GlowBlock(4, 16)
    fastflow.accelerate(block.flows[0])
    assert "" in fastflow.accelerate(block).swapped


def test_an_initialised_glow_block_compiles_whole():
    """The host's own look at its ActNorm breaks the graph."""
    block, z = nf.flows.GlowBlock(4, 16), torch.randn(2, 4, 4, 4)
    block(z)
    fused, _ = accelerated(block)
    for got, want in zip(torch.compile(fused, fullgraph=True, backend="eager")(z), block(z), strict=True):
        close(got, want, 1e-5)


def test_actnorm_initialises_from_its_first_batch_either_way():
    z = 2 * torch.randn(9, 4, 3, 3) + 1
    for call in BOTH:
        norm = nf.flows.ActNorm((4, 1, 1))
        fused, _ = accelerated(norm)
        for _ in range(2):
            for got, want in zip(call(fused, z), call(norm, z), strict=True):
                close(got, want, 1e-5)
        assert fused.data_dep_init_done == 1 and torch.equal(fused.s, norm.s)


def test_glow_trains_the_same():
    model = multiscale()
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    model.double().log_prob(x, None)
    same_training(scattered(model, 0.05), lambda m: -m.log_prob(x, None).mean())
    assert accelerated(model, example=(x, None))[1].verified


def test_published_example():
    """The README's RealNVP, with one line more."""
    layers = []
    for _ in range(4):
        layers.append(nf.flows.AffineCouplingBlock(nf.nets.MLP([1, 16, 16, 2], init_zeros=True)))
        layers.append(nf.flows.Permute(2, mode="swap"))
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(2), layers)
    x = torch.randn(40, 2, dtype=torch.float64)
    same_training(model, lambda m: -m.log_prob(x).mean())
    fused, report = accelerated(model)
    for m in (fused, model):
        torch.manual_seed(1)
        m.drawn = m.sample(5)
    close(fused.drawn[0], model.drawn[0], 1e-10)
    assert len(report.swapped) == 8 and len(report.verified) == 4


CHANGES = {"dilation": {"padding": 2, "dilation": 2}, "stride": {"padding": 1, "stride": 2},
           "padding": {"padding": 0}, "padding_mode": {"padding": 1, "padding_mode": "reflect"},
           "groups": {"padding": 1, "groups": 2}, "bias": {"padding": 1, "bias": False}}


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("change", [*CHANGES, "slope", "length"])
def test_convolutions_of_other_options_are_the_hosts(change, before):
    torch.manual_seed(0)
    net, x = scattered(nf.nets.ConvNet2d([4, 16, 16, 8], [3, 1, 3])), torch.randn(2, 4, 6, 6)

    def exchange(net):
        if change == "slope":
            net.net[3].negative_slope = 0.5
        elif change == "length":
            net.net.append(nn.Tanh())
        else:
            torch.manual_seed(1)
            net.net[0] = nn.Conv2d(4, 16, 3, **CHANGES[change])

    if before:
        exchange(net)
    fused, report = accelerated(net)
    assert before == (report.skipped != {})
    if not before:
        fused(x)
        for one in (net, fused):
            exchange(one)
    close(fused(x), net(x), 1e-5)


def test_what_is_left_alone():
    tails = nf.flows.CircularCoupledRationalQuadraticSpline(4, 1, 8, [1])
    soft = nf.flows.MaskedAffineFlow(torch.tensor([0.5, 1.0]), nf.nets.MLP([2, 4, 2]))
    net = nf.nets.ConvNet2d([2, 8, 4], (3, 3))
    bools = nf.flows.MaskedAffineFlow(torch.tensor([True, False]))
    fused, report = accelerated(nn.ModuleList([tails, soft, net, bools]))
    assert not report.swapped
    assert "linear tails" in report.skipped["0.prqct"] and "other values than 0 and 1" in report.skipped["1"]
    assert "three convolutions" in report.skipped["2"] and "mask is of torch.bool" in report.skipped["3"]
    assert not [key for layer in fused for key in layer.__dict__ if key.startswith("_fastflow")]


def test_a_layer_that_is_appended_to_a_block_is_run():
    block, z = nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])), torch.randn(7, 4)
    fused, _ = accelerated(scattered(block), verify=False)
    for model in (fused, block):
        model.flows.append(nf.flows.LULinearPermute(4, identity_init=True))
    fused.flows[-1].load_state_dict(block.flows[-1].state_dict())
    for call in BOTH:
        for got, want in zip(call(fused, z), call(block, z), strict=True):
            close(got, want, 1e-5)


def test_a_mask_exchanged_for_a_view_of_itself_counts():
    mask = (torch.arange(9).view(1, 3, 3) // 3 % 2).float()
    layer = scattered(nf.flows.MaskedAffineFlow(mask, *(nn.Conv2d(2, 2, 1) for _ in "st")))
    fused, _ = accelerated(layer, verify=False)
    z = torch.randn(4, 2, 3, 3)
    fused(z)
    for model in (fused, layer):
        model.b = model.b.transpose(2, 3)
    for got, want in zip(fused(z), layer(z), strict=True):
        close(got, want, 1e-5)
