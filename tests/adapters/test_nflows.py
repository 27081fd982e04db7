"""nflows under accelerate: every layer, both directions, masks of all kinds, with context, on vectors and images."""

import copy

import pytest
import torch
from adapter_checks import accelerated, close, same, same_training, scattered
from torch import nn

import fastflow
from fastflow import extension

pytest.importorskip("nflows")
from nflows import distributions, flows, transforms  # noqa: E402
from nflows.nn import nets  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
D = 5
MASKS = {"alternating": [0, 1, 0, 1, 0], "front": [0, 0, 1, 1, 1], "back": [1, 1, 1, 0, 0], "mixed": [0, 1, 1, 0, 1]}
BOTH = (lambda t, x, *c: t(x, *c), lambda t, x, *c: t.inverse(x, *c))


def network(context=None):
    return lambda i, o: nets.ResidualNet(i, o, hidden_features=8, context_features=context, num_blocks=1)


def image_network(i, o):
    return nets.ConvResidualNet(i, o, hidden_channels=4, num_blocks=1)


def inputs(dtype, context=None):
    return [torch.randn(9, D, dtype=dtype), *([] if context is None else [torch.randn(9, context, dtype=dtype)])]


SPLINE = {"num_bins": 4, "tails": "linear", "tail_bound": 1.5}
LAYERS = {
    "affine": (lambda mask, c: transforms.AffineCouplingTransform(mask, network(c)), 1),
    "additive": (lambda mask, c: transforms.AdditiveCouplingTransform(mask, network(c)), 1),
    "spline": (lambda mask, c: transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network(c), **SPLINE), 1),
    "spline, both parts": (lambda mask, c: transforms.PiecewiseRationalQuadraticCouplingTransform(
        mask, network(c), apply_unconditional_transform=True, min_bin_width=0.02, **SPLINE), 2),
}
WHOLE = {
    "autoregressive affine": lambda c: transforms.MaskedAffineAutoregressiveTransform(D, 8, context_features=c),
    "autoregressive spline": lambda c: transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
        D, 8, context_features=c, **SPLINE),
    "LU": lambda c: transforms.LULinear(D, identity_init=False),
    "ActNorm": lambda c: transforms.ActNorm(D),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_couplings(kind, mask, dtype):
    make, count = LAYERS[kind]
    context = 3 if mask == "mixed" else None
    same(scattered(make(MASKS[mask], context)).to(dtype), BOTH, inputs(dtype, context), count)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["affine", "additive", "spline"])
def test_couplings_that_pass_nothing(kind):
    make, count = LAYERS[kind]
    same(scattered(make([1] * D, 3)), BOTH, inputs(torch.float32, 3), count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", WHOLE)
def test_layers(kind, dtype):
    layer = scattered(WHOLE[kind](3)).to(dtype).eval()
    same(layer, BOTH, inputs(dtype, 3), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_images(dtype):
    mask = [1, 0, 1, 0]
    for layer in (transforms.OneByOneConvolution(4, identity_init=False), transforms.ActNorm(4),
                  transforms.AffineCouplingTransform(mask, image_network),
                  transforms.PiecewiseRationalQuadraticCouplingTransform(mask, image_network, **SPLINE)):
        same(scattered(layer).to(dtype).eval(), BOTH, [torch.randn(2, 4, 3, 5, dtype=dtype)], 1)


def test_an_autoregressive_pass_undoes_its_inverse_as_exactly_as_the_original():
    """To its 1e-6 in float32, absolute, so that both passes have to go through one network."""
    layer, x = transforms.MaskedAffineAutoregressiveTransform(20, 30, num_blocks=5), torch.randn(200, 20)
    fused, _ = accelerated(layer)
    for _ in range(2):
        y, of_inverse = fused.inverse(x)
        z, of_forward = fused(y)
        assert (z - x).abs().max() < 1e-6 and (of_forward + of_inverse).abs().max() < 1e-6


def test_the_cached_path_of_a_linear_map_is_the_hosts():
    layer = transforms.LULinear(D, using_cache=True, identity_init=False).eval()
    fused, _ = accelerated(layer)
    x = torch.randn(4, D)
    for got, want in zip(fused(x), layer(x), strict=True):
        assert torch.equal(got, want)
    assert fused.cache.weight is not None


@pytest.mark.parametrize("other", [transforms.IdentityTransform, lambda: transforms.RandomPermutation(3, dim=2)])
def test_a_convolution_with_another_permutation_is_the_hosts(other):
    layer, x = transforms.OneByOneConvolution(4, identity_init=False), torch.randn(2, 4, 3, 3)
    fused, _ = accelerated(layer)
    fused(x)
    layer.permutation = fused.permutation = other()
    for call in BOTH:
        for got, want in zip(call(fused, x), call(layer, x), strict=True):
            assert torch.equal(got, want)
    _, report = accelerated(layer)
    assert "its permutation is not nflows' own" in report.skipped[""] and not report.swapped


def test_a_convolution_under_autocast_is_solved_in_float32_as_the_hosts():
    torch.manual_seed(0)
    layer, x = transforms.OneByOneConvolution(3, identity_init=False), torch.randn(2, 3, 4, 5)
    fused, _ = accelerated(layer, verify=False)
    truth = layer.inverse(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x)[0].dtype is layer(x)[0].dtype is torch.bfloat16
        for got, want in zip(fused.inverse(x), truth, strict=True):
            close(got, want, 1e-5)


def test_hooks_of_a_convolutions_permutation_are_run():
    layer, x = transforms.OneByOneConvolution(4, identity_init=False), torch.randn(2, 4, 3, 3)
    fused, _ = accelerated(layer)
    fused(x)
    for one in (layer, fused):
        one.permutation.register_forward_hook(lambda module, args, output: (output[0] * 2.0, output[1]))
    assert torch.equal(fused(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["AffineCouplingTransform", "AdditiveCouplingTransform"])
def test_a_transform_of_the_passive_features_set_later_is_run(kind):
    layer, x = scattered(getattr(transforms, kind)(MASKS["mixed"], network())), torch.randn(8, D)
    fused, _ = accelerated(layer)
    fused(x)
    layer.unconditional_transform = fused.unconditional_transform = scattered(transforms.LULinear(2))
    for call in BOTH:
        for got, want in zip(call(fused, x), call(layer, x), strict=True):
            close(got, want, 1e-6)


def test_actnorm_initialises_from_its_first_batch():
    layer, x = transforms.ActNorm(D), 3 * torch.randn(50, D) + 1
    fused, report = accelerated(layer)
    for got, want in zip(fused(x), layer(x), strict=True):
        close(got, want, 1e-6)
    assert fused.initialized and report.verified == {""}
    assert torch.equal(fused.shift, layer.shift) and torch.equal(fused.log_scale, layer.log_scale)


@pytest.mark.parametrize("shape", [(5, 4), (2, 4, 3, 5)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_actnorm_of_data_in_another_precision_has_the_hosts_dtypes(dtypes, shape):
    layer, x = scattered(transforms.ActNorm(4)).to(dtypes[0]).eval(), torch.randn(*shape, dtype=dtypes[1])
    fused, _ = accelerated(layer, verify=False)
    for call in BOTH:
        for got, want in zip(call(fused, x), call(layer, x), strict=True):
            close(got, want, 1e-10)


def test_what_has_no_fused_form_is_left_alone():
    class Mine(transforms.AffineCouplingTransform):
        pass

    layers = transforms.CompositeTransform([
        Mine(MASKS["front"], network()),
        transforms.PiecewiseRationalQuadraticCouplingTransform(MASKS["front"], network(), num_bins=4),
        transforms.AffineCouplingTransform(MASKS["front"], network(), unconditional_transform=lambda features:
                                           transforms.PointwiseAffineTransform(0.5, 2.0))])
    _, report = accelerated(layers)
    assert not report.swapped
    assert "subclass of nflows AffineCouplingTransform" in report.skipped["_transforms.0"]
    assert "linear tails, not None" in report.skipped["_transforms.1"]
    assert "passive features too" in report.skipped["_transforms.2"]


def test_a_mask_that_is_loaded_counts():
    """The channels' order is remembered, but not across a state dict that brings another one."""
    masks = [0, 1, 0, 1], [1, 0, 1, 0]
    one, other = (scattered(transforms.AffineCouplingTransform(mask, network())) for mask in masks)
    fused, _ = accelerated(one)
    x = torch.randn(6, 4)
    fused(x)
    fused.load_state_dict(other.state_dict())
    for got, want in zip(fused(x), other(x), strict=True):
        close(got, want, 1e-5)


def test_published_example():
    """The README's flow, with one line more, trains as it does without."""
    def example():
        base = distributions.StandardNormal(shape=[2])
        layers = []
        for _ in range(3):
            layers.append(transforms.ReversePermutation(features=2))
            layers.append(transforms.MaskedAffineAutoregressiveTransform(features=2, hidden_features=4))
        return flows.Flow(transforms.CompositeTransform(layers), base)

    x = torch.randn(64, 2)
    flow = example()
    fused, report = accelerated(flow, example=x)
    assert len(report.verified) == len(report.swapped) == 3
    same_training(flow, lambda m: -m.log_prob(inputs=x.double()).mean())
    torch.manual_seed(1)
    want = flow.float().sample(3)
    fused.load_state_dict(flow.state_dict())
    torch.manual_seed(1)
    close(fused.sample(3), want, 1e-4)


def test_training_gives_the_same_parameters():
    layers = [transforms.ActNorm(4)]
    for mask in ([0, 1, 0, 1], [1, 1, 0, 0]):
        layers += [transforms.AffineCouplingTransform(mask, network()), transforms.LULinear(4),
                   transforms.PiecewiseRationalQuadraticCouplingTransform(mask, network(), **SPLINE)]
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([4]))
    x = torch.randn(30, 4, dtype=torch.float64)
    same_training(flow, lambda m: -m.log_prob(x).mean())


def test_simple_realnvp_compiles():
    """Under torch.compile the swapped layers trace without a break."""
    flow = transforms.CompositeTransform([transforms.AffineCouplingTransform(MASKS["mixed"], network()),
                                          transforms.LULinear(D)])
    fused, _ = accelerated(flow, verify=False)
    x = torch.randn(8, D)
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    for got, want in zip(compiled(x), flow(x), strict=True):
        close(got, want, 1e-5)
    assert isinstance(fused, nn.Module) and fastflow.restore(compiled) == ["_orig_mod._transforms.0",
                                                                           "_orig_mod._transforms.1"]


def test_an_export_for_any_batch_does_not_depend_on_its_size():
    fused, _ = accelerated(scattered(transforms.MaskedAffineAutoregressiveTransform(D, 8)).eval(), verify=False)
    x = torch.randn(8, D)
    exported = torch.export.export(fused, (x,), strict=True, dynamic_shapes=(
        {0: torch.export.Dim("batch", min=2)},)).module()
    for data in (x, x.repeat(200, 1)):
        for got, want in zip(exported(data), fused(data), strict=True):
            close(got, want, 1e-5)


NETS = {  # whether the kernel for networks takes it in training and in evaluation
    "residual": (True, True, {}),
    "tanh": (True, True, {"activation": torch.tanh}),
    "no blocks": (True, True, {"num_blocks": 0}),
    "dropout": (False, True, {"dropout_probability": 0.3}),
    "batch norm": (False, False, {"use_batch_norm": True}),
    "in place": (False, False, {"activation": nn.ReLU(inplace=True)}),  # which changes what a block adds at its end
    "another activation": (False, False, {"activation": nn.functional.elu}),
}


@pytest.mark.parametrize("name", NETS)
def test_conditioners(name, monkeypatch):
    """A small input goes to the host's own operations where the network has no kernel, and hooks in it are run."""
    *takes, options = NETS[name]
    layer = scattered(transforms.AffineCouplingTransform(MASKS["mixed"], lambda i, o: nets.ResidualNet(
        i, o, hidden_features=8, **options)))
    x, ran = torch.randn(6, D), []
    monkeypatch.setattr(extension, "observers", (lambda name, arguments: ran.append(name),))
    for training, taken in zip((True, False), takes, strict=True):
        if name != "dropout" or not training:
            same(copy.deepcopy(layer).train(training), BOTH, [x], 1)
        fused, _ = accelerated(layer.train(training), verify=False)
        ran.clear()
        fused(x)
        assert ("mlp_fwd" in ran) == taken
    seen = []
    handle = fused.transform_net.final_layer.register_forward_hook(lambda *args: seen.append(1))
    fused(x)
    handle.remove()
    assert seen == [1]


def test_weights_that_are_no_parameters_are_the_hosts():
    """As a network that makes another one's weights puts them there."""
    layer = scattered(transforms.AffineCouplingTransform(MASKS["mixed"], network()))
    final = layer.transform_net.final_layer
    weight = 1.5 * final.weight.detach()
    del final.weight
    final.weight = weight.requires_grad_()
    fused, _ = accelerated(layer, verify=False)
    x = torch.randn(6, D)
    for got, want in zip(fused(x), layer(x), strict=True):
        close(got, want, 1e-5)


def test_masked_conditioners_see_what_is_loaded_into_their_masks():
    one, other = (scattered(transforms.MaskedAffineAutoregressiveTransform(D, 8)) for _ in "12")
    fused, _ = accelerated(one)
    x = torch.randn(6, D)
    fused(x)
    with torch.no_grad():
        other.autoregressive_net.blocks[0].linear_layers[0].mask.zero_()
    fused.load_state_dict(other.state_dict())
    for got, want in zip(fused(x), other(x), strict=True):
        close(got, want, 1e-5)


class Asks(nn.Module):
    """A conditioner that has to be given a context, be it None."""

    def __init__(self, i, o):
        super().__init__()
        self.net = nn.Linear(i, o)

    def forward(self, x, context):
        return self.net(x) if context is None else self.net(x + context)


@pytest.mark.parametrize("kind", ["affine", "spline", "autoregressive affine", "autoregressive spline"])
def test_conditioners_are_given_the_context_that_is_none(kind):
    if kind in LAYERS:
        layer = LAYERS[kind][0](MASKS["front"], None)
        layer.transform_net = Asks(2, layer.transform_net.final_layer.out_features)
    else:
        layer = WHOLE[kind](None)
        layer.autoregressive_net = Asks(D, layer.autoregressive_net.final_layer.out_features)
        layer.autoregressive_net.hidden_features = 8
    fused, _ = accelerated(layer, verify=False)
    x = torch.randn(6, D)
    for call in BOTH:
        for got, want in zip(call(fused, x), call(layer, x), strict=True):
            close(got, want, 1e-5)


@pytest.mark.parametrize("name", ["min_bin_width", "min_bin_height"])
@pytest.mark.parametrize("make", [
    lambda options: transforms.PiecewiseRationalQuadraticCouplingTransform(MASKS["mixed"], network(), **options),
    lambda options: transforms.PiecewiseRationalQuadraticCDF((D,), **options),
    lambda options: transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, 8, **options)])
def test_bins_that_do_not_fit_are_the_hosts_to_refuse(make, name):
    fused, report = accelerated(make(SPLINE | {name: 0.3}))
    assert report.skipped[""].endswith(f"its {name} is too large for 4 bins")
    with pytest.raises(ValueError, match="too large"):
        fused(torch.zeros(2, D))


@pytest.mark.parametrize(("kind", "name", "value", "reason"), [
    ("autoregressive affine", "_epsilon", 0.5, "adds 0.001 to its scales, not 0.5"),
    ("autoregressive affine", "_unconstrained_scale_and_shift", lambda params: (params[:, ::2], params[:, 1::2]),
     "its _unconstrained_scale_and_shift is another function"),
    ("affine", "_scale_and_shift", lambda params: params.chunk(2, 1), "its _scale_and_shift is another function"),
    ("additive", "_coupling_transform_forward", lambda inputs, transform_params: (inputs, inputs.sum(1)),
     "its _coupling_transform_forward is another function")])
def test_scales_of_ones_own_are_left_alone(kind, name, value, reason):
    layer = LAYERS[kind][0](MASKS["mixed"], None) if kind in LAYERS else WHOLE[kind](None)
    setattr(layer, name, value)
    _, report = accelerated(layer, verify=False)
    assert reason in report.skipped[""] and not report.swapped
