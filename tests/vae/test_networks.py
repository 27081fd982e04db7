"""Encoders and decoders: sequences whose convolutions run in the fused kernel compute what plain modules do, and step
aside where a layer is more than that."""

import copy

import pytest
import torch
from cases import kernels_run
from torch import nn

from fastflow import diagnostics, vae
from fastflow.nn import FusedSequential
from fastflow.vae.networks import conv_feature_decoder, conv_feature_encoder

FUSED = {"fastflow_cpu::activated_conv_fwd", "fastflow_cpu::activated_conv_bwd"}


def networks():
    yield vae.conv_encoder((1, 12, 8), 3, (16, 32)), (5, 1, 12, 8)
    yield vae.conv_decoder(3, (3, 12, 8), (32, 16)), (5, 3)
    yield conv_feature_encoder((3, 8, 8), 16, (16, 32)), (5, 3, 8, 8)
    yield conv_feature_decoder(4, (1, 8, 8), (32, 16), nn.ReLU), (5, 4, 2, 2)


def plain(network):
    """The same in torch's own sequence."""
    return nn.Sequential(*copy.deepcopy(network))


def results(network, x, seed=0):
    """The output and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    out = network(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return out, *torch.autograd.grad(out, [x, *network.parameters()], cotangent)


@pytest.mark.parametrize("index", range(4))
def test_they_compute_what_plain_modules_compute(index):
    torch.manual_seed(index)
    network, shape = list(networks())[index]
    network = network.double()
    other, x = plain(network), torch.randn(shape, dtype=torch.float64)
    assert network.state_dict().keys() == other.state_dict().keys()
    for got, want in zip(results(network, x), results(other, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        assert got.is_contiguous()
    assert kernels_run(lambda: results(network, x)) == FUSED and not kernels_run(lambda: results(other, x))
    with torch.no_grad():
        torch.testing.assert_close(network(x), other(x), rtol=1e-11, atol=1e-11)


def test_second_derivatives():
    network = FusedSequential(nn.SiLU(), nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.SiLU(),
                             nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1)).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,))


ODD = {"dilated": lambda: nn.Conv2d(16, 16, 3, dilation=2), "grouped": lambda: nn.Conv2d(16, 16, 3, groups=4),
       "reflecting": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
       "same": lambda: nn.Conv2d(16, 16, 3, padding="same"), "uneven stride": lambda: nn.Conv2d(16, 16, 3, (2, 1)),
       "uneven padding": lambda: nn.Conv2d(16, 16, 3, padding=(0, 1)), "8 channels": lambda: nn.Conv2d(16, 8, 3),
       "output padding": lambda: nn.ConvTranspose2d(16, 16, 3, stride=2, output_padding=1),
       "subclass": lambda: type("Own", (nn.Conv2d,), {})(16, 16, 3),
       "weight normed": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3))}


@pytest.mark.parametrize("kind", ODD)
def test_layers_that_the_kernel_does_not_know_are_called(kind):
    torch.manual_seed(0)
    network = FusedSequential(nn.ReLU(), ODD[kind](), nn.ReLU(inplace=True), nn.Flatten())
    x = torch.randn(2, 16, 6, 7)
    assert not kernels_run(lambda: network(x))
    torch.testing.assert_close(network(x), plain(network)(x))


@pytest.mark.parametrize(("kernel", "stride", "transposed", "channels", "dtype", "fused"), [
    (5, 1, False, 16, torch.float32, False), (4, 1, False, 16, torch.float32, False),
    (5, 2, False, 32, torch.float32, False), (5, 1, True, 16, torch.float32, False),
    (5, 1, False, 16, torch.float64, True), (5, 1, False, 3, torch.float32, True),
    (4, 2, False, 16, torch.float32, True), (6, 2, False, 16, torch.float32, True),
    (3, 1, False, 16, torch.float32, True), (5, 2, True, 16, torch.float32, True)])
def test_convolutions_run_in_the_kernel_where_it_is_not_slower(kernel, stride, transposed, channels, dtype, fused):
    torch.manual_seed(0)
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(channels, 16, kernel, stride, padding=1, dtype=dtype)
    network, x = FusedSequential(nn.SiLU(), layer), torch.randn(2, channels, 9, 9, dtype=dtype)
    assert bool(kernels_run(lambda: network(x))) == fused
    torch.testing.assert_close(network(x), plain(network)(x))


def test_hooks_see_every_layer():
    network = FusedSequential(nn.Conv2d(1, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3))
    x, seen = torch.randn(2, 1, 6, 6), []
    want = network(x)
    for index in range(3):
        handle = network[index].register_forward_hook(lambda module, args, out: seen.append(type(module)))
        torch.testing.assert_close(network(x), want, rtol=1e-5, atol=1e-5)
        assert seen == [type(network[index])]
        handle.remove()
        seen.clear()


def test_bad_inputs_raise_what_the_layer_raises():
    network = FusedSequential(nn.Conv2d(1, 16, 5), nn.SiLU())
    for x in (torch.randn(2, 3, 8, 8), torch.randn(2, 1, 4, 8), torch.randn(2, 1, 8, 8, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as plainly:
            plain(network)(x)
        with pytest.raises(RuntimeError) as raised:
            network(x)
        assert str(raised.value) == str(plainly.value)
    unbatched = torch.randn(1, 8, 8)
    torch.testing.assert_close(network(unbatched), plain(network)(unbatched))


def test_a_model_trains_alike(tmp_path):
    """Steps of a ConvVAE with its own sequences and with plain ones; and torch.compile takes them."""
    torch.manual_seed(0)
    model = vae.ConvVAE((1, 8, 8), 3, (16, 16))
    other = copy.deepcopy(model)
    for part in other.modules():
        if type(part) is FusedSequential:
            part.__class__ = nn.Sequential
    x, eps = torch.bernoulli(torch.rand(6, 1, 8, 8)), torch.randn(1, 6, 3)
    for trained in (model, other):
        optimizer = torch.optim.SGD(trained.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (-trained.elbo(x, eps=eps).elbo.mean()).backward()
            optimizer.step()
    for (name, got), want in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)
    compiled = torch.compile(model.encoder, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model.encoder(x), rtol=1e-5, atol=1e-5)


class Parts(nn.Module):
    """An encoder that gives its parameters apart."""

    def __init__(self, *sizes):
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, size) for size in sizes)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


PAIRS = {
    "gaussian": lambda: vae.GaussianPosterior(),
    "interleaved": lambda: vae.GaussianPosterior("logstd", layout="interleave"),
    "scale first": lambda: vae.GaussianPosterior("softplus", order="scale_mean"),
    "delta": lambda: vae.DeltaGaussianPosterior(0.1), "flow": lambda: vae.FlowPosterior.householder(3),
    "flow with a context": lambda: vae.FlowPosterior.iaf(3, context_features=2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_may_give_mean_and_scale_apart(name):
    """It is the one that joins them as the posterior packs its parameters."""
    torch.manual_seed(0)
    posterior, x = PAIRS[name](), torch.rand(5, 4)
    encoder, decoder = Parts(3, 3, *[2] * (name == "flow with a context")), vae.mlp_decoder(3, (4,), (8,))

    def joined(x):
        halves = encoder(x)
        if name == "interleaved":
            return torch.stack(halves, 2).flatten(1)
        return torch.cat(halves if name != "scale first" else halves[::-1], 1)

    own, other = (vae.VAE(network, decoder, posterior) for network in (encoder, joined))
    found, expected = (model.elbo(x, 2, seed=0) for model in (own, other))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(own.encode(x), other.encode(x))
    if hasattr(posterior, "moments"):
        mean, log_sigma = diagnostics.posterior_moments(own, x)
        torch.testing.assert_close(mean, own.encode(x))
        assert log_sigma.shape == (5, 3)


def test_pseudo_inputs_of_an_encoder_of_pairs():
    model = vae.VAE(Parts(3, 3), vae.mlp_decoder(3, (4,), (8,)), prior=vae.VampPrior(torch.rand(6, 4)))
    assert model(torch.rand(5, 4)).elbo.shape == (5,) and model.sample(2).shape == (2, 4)


@pytest.mark.parametrize(("error", "output", "posterior", "message"), [
    (ValueError, lambda x: (x,), "gaussian", r"^encoder output: expected .* a pair \(mean, raw scale\), got 1 parts"),
    (ValueError, lambda x: (x, x[:2]), "gaussian", r"^raw scale of the encoder output: expected shape \(5, 4\)"),
    (ValueError, lambda x: (x[:, 0],) * 2, "gaussian", "^mean of the encoder output: expected shape"),
    (TypeError, lambda x: (x, x.double()), "gaussian", "^mean of the encoder output: expected float64"),
    (TypeError, lambda x: (x, 1.0), "gaussian", "^raw scale of the encoder output: expected a torch.Tensor, got float"),
    (TypeError, lambda x: {"mean": x}, "gaussian", "^encoder output: expected a torch.Tensor .* got dict"),
    (TypeError, lambda x: (x, x), "full", r"^encoder output: expected .* FullGaussianPosterior, got tuple; torch\.cat"),
])
def test_wrong_parts_are_named(error, output, posterior, message):
    with pytest.raises(error, match=message):
        vae.VAE(output, vae.mlp_decoder(4, (4,), (8,)), posterior)(torch.rand(5, 4))
