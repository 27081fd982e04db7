"""The MLP VAE's loss as one node of autograd is that of its parts, and any other model keeps to its own."""

import copy

import pytest
import torch
from cases import kernels_run
from torch import nn

from fastflow import backends, vae
from fastflow.engine import TrainStep
from fastflow.nn import FusedSequential
from fastflow.vae.one_node import one_node

SHAPE = (1, 3, 4)


def bits(dtype=torch.float64):
    return torch.bernoulli(torch.full((7, *SHAPE), 0.4, dtype=dtype, requires_grad=False))


def model_of(activation=nn.SiLU, hidden=(9, 6), **options):
    torch.manual_seed(0)
    return vae.VAE(vae.mlp_encoder(SHAPE, 3, hidden, activation), vae.mlp_decoder(3, SHAPE, hidden[::-1], activation),
                   **options).double()


@pytest.mark.parametrize("activation", [nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("posterior", [vae.GaussianPosterior(), vae.GaussianPosterior(
    "softplus", layout="interleave", order="scale_mean")], ids=["logvar", "softplus"])
def test_values_and_gradients_are_those_of_the_bound(activation, posterior):
    model, x = model_of(activation, posterior=posterior), bits()
    whole = model.elbo(x, seed=4)
    log_px, kl = one_node(model, x, seed=4)
    torch.testing.assert_close(log_px, -whole.distortion, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kl, whole.rate, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 7, dtype=torch.float64)
    for needed in (list(model.parameters()), [model.decoder[0].weight], [model.encoder[1].bias]):
        want = torch.autograd.grad((weights[0] * -whole.distortion + weights[1] * whole.rate).sum(), needed,
                                   retain_graph=True)
        got = torch.autograd.grad((weights[0] * log_px + weights[1] * kl).sum(), needed, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_and_second_derivatives():
    model, x = model_of(), bits()
    model.encoder.requires_grad_(False)
    terms = model(x, seed=1, loss_only=True)
    terms.value.sum().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    other = copy.deepcopy(model)
    other.zero_grad()
    other.elbo(x, seed=1).elbo.sum().backward()
    for p, q in zip(model.decoder.parameters(), other.decoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    model = model_of()
    parameters = list(model.parameters())
    seconds = []
    for value in (model(x, seed=2, loss_only=True).value, model.elbo(x, seed=2).elbo):
        first = torch.autograd.grad(value.sum(), parameters, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_noise_is_that_of_the_parts():
    model, x = model_of(), bits()
    torch.manual_seed(3)
    want = model.elbo(x).distortion
    torch.manual_seed(3)
    torch.testing.assert_close(model(x, loss_only=True).distortion, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x, loss_only=True, generator=torch.Generator().manual_seed(8)).distortion,
                               model.elbo(x, generator=torch.Generator().manual_seed(8)).distortion, rtol=1e-12,
                               atol=1e-12)
    with pytest.raises(ValueError, match="^seed: expected an int of 64 bits"):
        model(x, loss_only=True, seed=2**64)


def hooked():
    model = model_of()
    model.decoder[2].register_forward_hook(lambda *_: None)
    return model


def posterior_hooked():
    model = model_of()
    model.posterior.register_forward_hook(lambda *_: None)
    return model


OTHERS = {"hooked": hooked, "posterior hooked": posterior_hooked, "gaussian": lambda: model_of(likelihood="gaussian"),
          "tanh": lambda: model_of(nn.Tanh), "linear": lambda: model_of(hidden=()),
          "low rank": lambda: vae.MLPVAE(SHAPE, 3, (8,), posterior="low_rank").double(),
          "conv": lambda: vae.ConvVAE((1, 4, 4), 3, (16,)).double(),
          "plain": lambda: vae.VAE(nn.Sequential(*vae.mlp_encoder(SHAPE, 3, (8,))),
                                   vae.mlp_decoder(3, SHAPE, (8,))).double(),
          "more than a chain": lambda: vae.VAE(FusedSequential(*vae.mlp_encoder(SHAPE, 3, (8,)), nn.LayerNorm(6)),
                                               vae.mlp_decoder(3, SHAPE, (8,))).double()}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_keep_to_their_parts(name):
    torch.manual_seed(0)
    model = OTHERS[name]()
    x = torch.bernoulli(torch.full((5, 1, 4, 4) if name == "conv" else (5, *SHAPE), 0.5, dtype=torch.float64))
    assert one_node(model, x) is None
    terms = model(x, seed=1, loss_only=True)
    torch.testing.assert_close(terms.value, model.elbo(x, seed=1).elbo, rtol=1e-12, atol=1e-12)


METHODS = {"decode": lambda old: lambda z, context=None: 3.0 * old(z, context),
           "elbo": lambda old: lambda x, n_samples=1, beta=1.0, **options: old(x, n_samples, 2.0 * beta, **options),
           "_encoded": lambda old: lambda x, context: old(x, context) + 0.5,
           "_log_joint": lambda old: lambda *args: tuple(2.0 * term for term in old(*args))}


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("on", ["class", "object"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_of_the_users_own_are_what_trains(name, on, likelihood):
    model, x = model_of(likelihood=likelihood), bits()
    plain = model.elbo(x, seed=1).elbo
    if on == "object":
        setattr(model, name, METHODS[name](getattr(model, name)))
    else:
        model.__class__ = type("Own", (vae.VAE,), {name: lambda self, *args, **options: METHODS[name](
            getattr(super(type(self), self), name))(*args, **options)})
    want = model.elbo(x, seed=1).elbo
    assert (want - plain).abs().min() > 0.01
    torch.testing.assert_close(model(x, seed=1, loss_only=True).value, want, rtol=1e-12, atol=1e-12)
    torch.manual_seed(3)
    want = -model.elbo(x).elbo.mean().detach()
    torch.manual_seed(3)
    torch.testing.assert_close(TrainStep(model, torch.optim.SGD(model.parameters(), 0.0))(x), want, rtol=1e-12, atol=0)


def test_a_likelihood_or_a_forward_of_the_users_own_is_what_trains():
    model, x = model_of(), bits()
    usual = model.likelihood.log_prob
    model.likelihood.log_prob = lambda x, output: usual(x, 2.0 * output)
    torch.testing.assert_close(model(x, seed=1, loss_only=True).value, model.elbo(x, seed=1).elbo, rtol=1e-12,
                               atol=1e-12)
    model.forward = lambda x, n_samples=1, beta=1.0: model.elbo(x, n_samples, 3.0 * beta, seed=1)
    loss = TrainStep(model, torch.optim.SGD(model.parameters(), 0.0))(x)
    torch.testing.assert_close(loss, -model.elbo(x, 1, 3.0, seed=1).elbo.mean().detach(), rtol=1e-12, atol=0)


def test_other_calls_keep_to_the_parts():
    model, x = model_of(), bits()
    assert one_node(model, x) is not None
    with torch.no_grad():
        assert one_node(model, x) is None
    with backends.use_backend("reference"):
        assert one_node(model, x) is None
    assert one_node(model, x.clone().requires_grad_()) is None and one_node(model, x.float()) is None
    assert one_node(model, x, seed=torch.tensor(3)) is None and one_node(model, x[:0]) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert one_node(model, x) is None
    with pytest.raises(RuntimeError, match="shape"):
        model(torch.zeros(2, 1, 3, 5, dtype=torch.float64), loss_only=True)


def test_the_training_step_runs_it():
    model = vae.MLPVAE(SHAPE, 3, (16,))
    step = TrainStep(model, torch.optim.SGD(model.parameters(), 0.1))
    ran = kernels_run(lambda: step(bits(torch.float32)))
    assert {"fastflow_cpu::wide_mlp_fwd", "fastflow_cpu::wide_mlp_bwd", "fastflow_cpu::bernoulli_log_prob_bwd"} <= ran
    assert model.latent_shape == (3,)
