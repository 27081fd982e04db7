"""The ELBO against closed forms: probabilistic PCA, where everything is known."""

import math

import pytest
import torch
from torch import nn

from fastflow import flows, vae
from fastflow.vae import networks

W = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.2, -0.6]], dtype=torch.float64)
B = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
S2 = 0.4
X = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
LOG_P = -3.376933129029517  # log N(x; b, W W' + s2 I)
DIAGONAL_GAP = 0.003897104868258  # KL of the best diagonal q from the posterior


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0]).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


class Full(nn.Module):
    """The Gaussian posterior with full covariance, whose KL is left to Monte Carlo."""

    def __init__(self, cholesky):
        super().__init__()
        self.cholesky = cholesky

    def forward(self, params, prior, n_samples, *, eps=None, seed=None, generator=None):
        q = torch.distributions.MultivariateNormal(params, scale_tril=self.cholesky)
        z = q.rsample((n_samples,))
        return z, q.log_prob(z), None

    def mean(self, params):
        return params


def posterior_precision():
    return torch.eye(2, dtype=torch.float64) + W.T @ W / S2


def encoder(diagonal):
    """x to the posterior's mean, and to log-variances of the best diagonal q."""
    precision = posterior_precision()
    gain = torch.linalg.solve(precision, W.T / S2)
    if not diagonal:
        return linear(gain, -gain @ B)
    return linear(torch.cat([gain, torch.zeros_like(gain)]), torch.cat([-gain @ B, -precision.diagonal().log()]))


def ppca(diagonal=True, **options):
    if not diagonal:
        options["posterior"] = Full(torch.linalg.cholesky(torch.linalg.inv(posterior_precision())))
    return vae.VAE(encoder(diagonal), linear(W, B), likelihood=vae.GaussianLikelihood(math.sqrt(S2)), **options)


def test_true_posterior_gives_the_evidence():
    """Every importance weight is log p(x), whatever the sample."""
    bound = ppca(diagonal=False)(X, n_samples=50)
    torch.testing.assert_close(bound.log_w, torch.full((50, 1), LOG_P, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(bound.elbo, torch.tensor([LOG_P], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(vae.iwae(bound.log_w), torch.tensor([LOG_P], dtype=torch.float64), rtol=0, atol=1e-12)


def test_best_diagonal_posterior_leaves_its_gap():
    model, n = ppca(), 200_000
    bound = model(X, n_samples=n)
    # E log p(x | z) in closed form: its value at the mean, less the spread of the decoder's output.
    params = model.encoder(X)[0]
    at_mean = model.likelihood.log_prob(X, (W @ params[:2] + B)[None])
    expected = at_mean - (W**2 @ params[2:].exp()).sum() / (2 * S2) - bound.kl
    torch.testing.assert_close(expected, torch.tensor([LOG_P - DIAGONAL_GAP], dtype=torch.float64), rtol=0, atol=1e-12)
    assert abs(bound.elbo - expected) < 4 * bound.log_px_z.std() / math.sqrt(n)
    assert abs(bound.log_w.mean() - expected) < 4 * bound.log_w.std() / math.sqrt(n)


def test_iwae_rises_towards_the_evidence():
    log_w = ppca()(X.expand(4000, 3), n_samples=64).log_w
    bounds = [vae.iwae(log_w[:k]) for k in (1, 4, 16, 64)]
    for lower, higher in zip(bounds, bounds[1:], strict=False):
        assert higher.mean() > lower.mean()
    for bound in bounds:
        assert bound.mean() <= LOG_P + 4 * bound.std() / math.sqrt(4000)
    assert LOG_P - bounds[-1].mean() < 5e-4


def test_analytic_and_monte_carlo_kl_agree():
    model, x = ppca(), X.expand(5000, 3)
    analytic = model(x[:1]).kl
    sampled = model.elbo(x, kl="monte_carlo").kl
    assert sampled.shape == (5000,) and abs(sampled.mean() - analytic) < 4 * sampled.std() / math.sqrt(5000)


def test_terms_add_up():
    bound = ppca()(X.expand(6, 3), n_samples=3, beta=0.25)
    assert bound.log_px_z.shape == bound.log_pz.shape == bound.log_qz.shape == bound.log_w.shape == (3, 6)
    torch.testing.assert_close(bound.log_w, bound.log_px_z + bound.log_pz - bound.log_qz)
    torch.testing.assert_close(bound.distortion, -bound.log_px_z.mean(0))
    torch.testing.assert_close(bound.elbo, -bound.distortion - 0.25 * bound.kl)
    assert bound.rate is bound.kl


def test_beta_only_weighs_the_rate():
    model, eps = ppca(), torch.randn(2, 4, 2, dtype=torch.float64)
    one, none = (model(X.expand(4, 3), n_samples=2, beta=beta, eps=eps) for beta in (1.0, 0.0))
    for name in one._fields:
        same = torch.equal(getattr(one, name), getattr(none, name))
        assert same == (name != "elbo")
    torch.testing.assert_close(none.elbo, -none.distortion)


@pytest.mark.parametrize("beta", [torch.tensor(0.3), torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)])
@pytest.mark.parametrize("loss_only", [False, True])
def test_a_weight_of_the_rate_that_is_a_tensor(beta, loss_only):
    """One for all, of any dtype, or one for each example."""
    found = ppca()(X.expand(4, 3), beta=beta, seed=0, loss_only=loss_only)
    torch.testing.assert_close(found.value, -found.distortion - beta * found.rate)


def test_samples_have_the_models_covariance():
    n = 100_000
    x = ppca().sample(n)
    error = torch.cov(x.T) - (W @ W.T + S2 * torch.eye(3, dtype=torch.float64))
    assert error.abs().max() < 4 * 2 * math.sqrt(2 / n)
    assert (x.mean(0) - B).abs().max() < 4 * 1.3 / math.sqrt(n)


def test_sampling_options():
    model, generator = ppca(), torch.Generator()
    first = model.sample(5, generator=generator.manual_seed(1))
    assert torch.equal(first, model.sample(5, generator=generator.manual_seed(1)))
    torch.testing.assert_close(model.sample(2, temperature=0.0, mean=True), B.expand(2, 3))
    with pytest.raises(ValueError, match="temperature"):
        model.sample(1, temperature=-1.0)


def test_reconstruction():
    gain = torch.linalg.solve(posterior_precision(), W.T / S2)
    torch.testing.assert_close(ppca().reconstruct(X), (X - B) @ gain.T @ W.T + B)


@pytest.mark.parametrize("prior", ["standard", "gaussian", "flow"])
def test_priors(prior):
    made = {"standard": lambda: flows.StandardNormal((2,)), "gaussian": lambda: vae.GaussianPrior((2,)),
            "flow": lambda: flows.RealNVP(2, n_layers=2)}[prior]().double()
    model, eps = ppca(prior=made), torch.randn(3, 4, 2, dtype=torch.float64)
    bound, plain = model(X.expand(4, 3), n_samples=3, eps=eps), ppca()(X.expand(4, 3), n_samples=3, eps=eps)
    torch.testing.assert_close(bound.log_w, plain.log_w)  # each starts as N(0, I)
    if prior != "flow":
        torch.testing.assert_close(bound.kl, plain.kl)
    else:
        torch.testing.assert_close(bound.kl, (plain.log_qz - plain.log_pz).mean(0))
    bound.elbo.sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert model.sample(3).shape == (3, 3)


@pytest.mark.parametrize("scale", ["logvar", "logstd", "std", "softplus", "soft_tanh"])
def test_gaussian_prior_density(scale):
    prior = vae.GaussianPrior((2, 3), scale)
    z = torch.randn(4, 2, 3)
    expected = torch.distributions.Normal(0, 1).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(prior.log_prob(z), expected, atol=2e-3, rtol=0)
    model = vae.VAE(nn.Conv1d(1, 4, 1), nn.Conv1d(2, 1, 1), vae.GaussianPosterior(scale), prior)
    assert model(torch.rand(4, 1, 3)).kl.shape == (4,) and model.sample(2).shape == (2, 1, 3)


def test_kl_values():
    """KL(N(0.5, variance exp(-0.6)) || N(0, 1)), and KL between standard deviations 0.5 and 2 around 1 and -0.5."""
    params = torch.tensor([[0.5, -0.6]], dtype=torch.float64)
    assert abs(vae.GaussianPosterior()(params)[2].item() - 0.199405818047013) < 1e-14
    prior = vae.GaussianPrior((1,), "std").double()
    with torch.no_grad():
        prior.mean.fill_(-0.5)
        prior.raw.fill_(2.0)
    params = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    assert abs(vae.GaussianPosterior("std")(params, prior)[2].item() - 1.198794361119886) < 1e-14


def test_latent_maps_and_shape():
    model = vae.VAE(nn.Conv2d(1, 6, 1), nn.Conv2d(3, 1, 1))
    with pytest.raises(ValueError, match="latent_shape"):
        model.sample(1)
    bound = model(torch.rand(2, 1, 4, 4).round(), n_samples=5)
    assert bound.log_w.shape == (5, 2) and model.sample(3).shape == (3, 1, 4, 4)
    assert vae.VAE(nn.Conv2d(1, 6, 1), nn.Conv2d(3, 1, 1), latent_shape=(3, 2, 2)).sample(1).shape == (1, 1, 2, 2)


def test_empty_batch():
    bound = ppca()(X[:0], n_samples=2)
    assert bound.elbo.shape == (0,) and bound.log_w.shape == (2, 0)


def test_iwae_of_impossible_samples():
    log_w = torch.tensor([[-math.inf, 0.0], [-math.inf, -math.inf]])
    torch.testing.assert_close(vae.iwae(log_w), torch.tensor([-math.inf, -math.log(2)]))


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_digit_networks_train(kind):
    shape = (1, 8, 8)
    if kind == "mlp":
        networks = vae.mlp_encoder(shape, 4), vae.mlp_decoder(4, shape)
    else:
        networks = vae.conv_encoder(shape, 4, (8, 16)), vae.conv_decoder(4, shape, (16, 8))
    model = vae.VAE(*networks, likelihood="gaussian")
    x = torch.rand(32, *shape)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -model(x).elbo.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5 and all(p.grad is not None for p in model.parameters())
    assert model.sample(2).shape == (2, *shape) and model.reconstruct(x).shape == x.shape


def test_compiles_to_one_graph():
    model = vae.VAE(vae.mlp_encoder((5,), 2, (4,)), vae.mlp_decoder(2, (5,), (4,)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 6):
        x, eps = torch.rand(batch, 5).round(), torch.randn(2, batch, 2)
        value = compiled(x, n_samples=2, eps=eps)
        torch.testing.assert_close(tuple(value), tuple(model(x, n_samples=2, eps=eps)))
        value.elbo.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("posterior", ["gaussian", "low_rank", "full"])
def test_a_model_in_half_precision(posterior, dtype):
    """The networks work in it; the terms of the bound are float32."""
    size = {"gaussian": 4, "low_rank": 6, "full": 5}[posterior]
    model = vae.VAE(nn.Linear(3, size), nn.Linear(2, 3), posterior, likelihood="gaussian").to(dtype)
    x = torch.rand(5, 3, dtype=dtype)
    bound = model.elbo(x, 2)
    assert {term.dtype for term in bound} == {torch.float32}
    model(x, loss_only=True).value.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(4).shape == (4, 3) and model.reconstruct(x).shape == (5, 3)
    assert model.traverse(torch.zeros(2)).shape == (2, 7, 3)
    for prior in (vae.GaussianPrior(2).to(dtype), torch.distributions.Normal(torch.zeros(2), torch.ones(2))):
        model = vae.VAE(model.encoder, model.decoder, posterior, prior, likelihood="gaussian")
        assert {term.dtype for term in model.elbo(x, 2)} == {torch.float32} and model.sample(4).shape == (4, 3)


def test_plain_functions_as_networks():
    model = vae.VAE(lambda x: torch.cat([x, x], 1), lambda z: 2.0 * z, likelihood="gaussian")
    with pytest.raises(ValueError, match="latent_shape: the shape of z is not known yet"):
        model.sample(3)
    assert model.elbo(torch.rand(4, 2)).elbo.shape == (4,)
    assert model.sample(3).shape == (3, 2)


class Casting(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def encoder_with_a_hook():
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    encoder.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return encoder


@pytest.mark.parametrize(("make", "dtype"), [
    (lambda: nn.Sequential(nn.Embedding(3, 1), nn.Flatten(), nn.Linear(2, 2)), torch.int64),
    (lambda: nn.Sequential(networks.LogCounts(), nn.Linear(2, 2)), torch.int64),
    (lambda: nn.Sequential(networks.Rescale(3), nn.Flatten(), nn.Linear(2, 2)), torch.uint8),
    (lambda: nn.Sequential(nn.Identity(), Casting(2, 2)), torch.bool), (lambda: Casting(2, 2), torch.int64),
    (encoder_with_a_hook, torch.float16), (encoder_with_a_hook, torch.int64)])
def test_x_of_any_dtype_that_the_encoder_takes(make, dtype):
    model = vae.VAE(make(), nn.Linear(1, 2), likelihood="poisson")
    assert model.elbo(torch.tensor([[1, 0], [1, 1]]).to(dtype)).elbo.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        plain = vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), likelihood="poisson")
        assert plain.elbo(torch.ones(3, 2, dtype=torch.bfloat16)).elbo.isfinite().all()


class ToItsDevice(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.device))


def test_a_network_may_move_x_itself():
    model = vae.VAE(ToItsDevice(2, 2).to("meta"), nn.Linear(1, 2).to("meta"), likelihood="gaussian").to("meta")
    assert model.infer(torch.rand(3, 2)).z.is_meta
    with pytest.raises(ValueError, match="^x: expected device meta like the encoder's parameters, got cpu"):
        vae.VAE(nn.Linear(2, 2).to("meta"), nn.Linear(1, 2).to("meta")).infer(torch.rand(3, 2))


def test_an_encoders_own_type_error_stays():
    def encoder(x, context):
        raise TypeError("the encoder's own")
    with pytest.raises(TypeError, match="^the encoder's own"):
        vae.VAE(encoder, nn.Linear(1, 2)).elbo(torch.rand(3, 2), context=torch.zeros(3))


def test_discrete_latents_in_half_precision():
    model = vae.DiscreteVAE(nn.Linear(3, 2), nn.Linear(2, 3), 2, estimator="rloo").bfloat16()
    bound = model.elbo(torch.rand(5, 3, dtype=torch.bfloat16), 2)
    assert {term.dtype for term in bound} == {torch.float32} and model.sample(4).shape == (4, 3)


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), posterior="cauchy"), "posterior"),
    (ValueError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), likelihood="cauchy"), "likelihood"),
    (TypeError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), prior=nn.ReLU()), "prior"),
    (TypeError, lambda: vae.VAE(3, nn.Linear(1, 2)), "encoder: expected a module"),
    (TypeError, lambda: vae.VAE(nn.Linear(2, 2), 3), "decoder: expected a module"),
    (TypeError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), posterior=3), "posterior: expected a module"),
    (TypeError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), likelihood=3), "likelihood: expected a name"),
    (TypeError, lambda: vae.MLPVAE((2,), 1, (4,)).elbo([[0.0, 1.0]]), "x: expected a torch.Tensor, got list"),
    (TypeError, lambda: vae.MLPVAE((2,), 1, (4,))(X.numpy(), loss_only=True), "x: expected a torch.Tensor"),
    (TypeError, lambda: vae.MLPVAE((2,), 1, (4,)).elbo(torch.rand(4, 2).double()), "x: expected torch.float32"),
    (TypeError, lambda: vae.MLPVAE((2,), 1, (4,))(torch.rand(4, 2).double(), loss_only=True), "x: expected torch.floa"),
    *((TypeError, lambda make=make, dtype=dtype: make().elbo(torch.ones(4, 1, 4, 4, dtype=dtype)),
       f"^x: expected torch.float32 like the encoder's parameters, got {dtype}")
      for make in (lambda: vae.MLPVAE((1, 4, 4), 1, (4,)), lambda: vae.ConvVAE((1, 4, 4), 1, (4,)))
      for dtype in (torch.int64, torch.bool, torch.float16)),
    (TypeError, lambda: vae.MLPVAE((2,), 1, (4,)).double().elbo(torch.rand(4, 2)), "^x: expected torch.float64"),
    (TypeError, lambda: vae.ConditionalVAE((2,), 1, 2).elbo(torch.ones(4, 2).long(), context=torch.zeros(4).long()),
     "^x: expected torch.float32"),
    *((TypeError, lambda make=make: make().elbo(torch.rand(2, 1, 8, 8).double()), "^x: expected torch.float32 like the")
      for make in (lambda: vae.HVAE((1, 8, 8), (1, 1), 4), lambda: vae.VQVAE((1, 8, 8), 4, 2, (2, 2)),
                   lambda: vae.DiscreteVAE(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), nn.Linear(2, 64), 2))),
    *((ValueError, lambda make=make, call=call: getattr(make(), call)(torch.rand(2, 1, 8, 9)),
       r"^x: expected shape \(2, 1, 8, 8\), got \(2, 1, 8, 9\)")
      for make in (lambda: vae.MLPVAE((1, 8, 8), 1, (4,)), lambda: vae.ConvVAE((1, 8, 8), 1, (4,)),
                   lambda: vae.HVAE((1, 8, 8), (1, 1), 4), lambda: vae.NVAE((1, 8, 8), (1,), channels=4),
                   lambda: vae.VQVAE((1, 8, 8), 4, 2, (2, 2)))
      for call in ("elbo", "reconstruct")),
    (ValueError, lambda: vae.ConditionalVAE((2,), 1, 2).elbo(torch.ones(4, 3), context=torch.zeros(4).long()),
     r"^x: expected shape \(4, 2\)"),
    (TypeError, lambda: vae.Conditioned(nn.Linear(3, 2))(torch.ones(4, 2), torch.ones(4, 1).double()),
     "^context: expected torch.float32 like x"),
    (ValueError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 3))(torch.rand(4, 2)), "decoder output"),
    (ValueError, lambda: vae.VAE(nn.Linear(2, 3), nn.Linear(1, 2))(torch.rand(4, 2)), "params"),
    (ValueError, lambda: vae.GaussianPosterior("variance"), "scale"),
    (TypeError, lambda: vae.GaussianPosterior()(torch.zeros(1, 2), vae.GaussianPrior((1,), "std").double()), "prior"),
    (ValueError, lambda: vae.GaussianPosterior()(torch.zeros(1, 2), flows.DiagonalNormal(3)), "prior: expected one"),
    (ValueError, lambda: vae.GaussianLikelihood(0.0), "sigma"),
    (ValueError, lambda: vae.iwae(torch.zeros(0, 2)), "log_w"),
    (ValueError, lambda: vae.MLPVAE((2,), 1, (4,)).elbo(torch.rand(4, 2), 0), "n_samples: expected an int >= 1"),
    (TypeError, lambda: vae.MLPVAE((2,), 1, (4,)).infer(torch.rand(4, 2), 1.5), "n_samples: expected an int"),
    (ValueError, lambda: vae.HVAE((2,), (1, 1), 4).elbo(torch.rand(4, 2), 0), "n_samples: expected an int >= 1"),
    (ValueError, lambda: vae.VQVAE((1, 8, 8), 4, 2, (2, 2)).elbo(torch.rand(2, 1, 8, 8), 0), "n_samples: expected"),
    (ValueError, lambda: vae.MLPVAE((2,), 1, (4,)).sample(-1), "n: expected an int >= 0"),
    (TypeError, lambda: vae.HVAE((2,), (1, 1), 4).sample(2.5), "n: expected an int"),
    (ValueError, lambda: vae.conv_encoder((1, 6, 8), 2), "image_shape"),
    (ValueError, lambda: vae.VAE(nn.Linear(2, 2), nn.Linear(1, 2), latent_shape=-1), "^latent_shape: expected an int"),
    *((error, lambda make=make, beta=beta, kw=kw: make()(torch.rand(4, 2).round(), 1, beta, **kw), f"^beta: {words}")
      for make, kw in ((lambda: vae.MLPVAE((2,), 1, (4,)), {}), (lambda: vae.BetaVAE((2,), 1, sizes=(4,)), {}),
                       (lambda: vae.MLPVAE((2,), 1, (4,)), {"loss_only": True}),
                       (lambda: vae.MLPVAE((2,), 1, (4,), likelihood="gaussian"), {"loss_only": True}),
                       (lambda: vae.HVAE((2,), (1, 1), 4), {}),
                       (lambda: vae.IWAE((2,), 1, n_samples=3, sizes=(4,)), {}),
                       (lambda: vae.MLPVAE((2,), 1, (4,), objective=vae.BoundObjective("dreg", 2)), {}),
                       (lambda: vae.DiscreteVAE(nn.Linear(2, 2), nn.Linear(2, 2), 2), {}))
      for error, beta, words in ((TypeError, "a", "expected a number, got str"), (TypeError, None, "expected a number"),
                                 (ValueError, torch.ones(7), r"expected a number or shape \(\) or \(4,\), got \(7,\)"),
                                 (TypeError, torch.ones(4).double(), "expected torch.float32 like the rate"),
                                 (ValueError, torch.ones(4, device="meta"), "expected device cpu like x, got meta"))),
    (ValueError, lambda: vae.VQVAE((1, 8, 8), 4, 2, (2, 2))(torch.rand(2, 1, 8, 8), beta=torch.ones(3)), "^beta: "),
    *((ValueError, lambda make=make: make().elbo(torch.rand(2, 1, 8, 8, device="meta")),
       "^x: expected device cpu like the .*'s parameters, got meta")
      for make in (lambda: vae.MLPVAE((1, 8, 8), 1, (4,)),
                   lambda: vae.ConvVAE((1, 8, 8), 1, (4,), likelihood="poisson"),
                   lambda: vae.NVAE((1, 8, 8), (1,), channels=4), lambda: vae.VQVAE((1, 8, 8), 4, 2, (2, 2)),
                   lambda: vae.DiscreteVAE(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), nn.Linear(2, 64), 2))),
    *((TypeError, lambda call=call: call(vae.MLPVAE((2,), 1, (4,)), torch.rand(4, 2).round(), torch.zeros(4)),
       f"^context: expected None, because the {network} takes one argument, got Tensor")
      for network, call in (("encoder", lambda model, x, y: model.elbo(x, context=y)),
                            ("encoder", lambda model, x, y: model(x, context=y, loss_only=True)),
                            ("decoder", lambda model, x, y: model.sample(2, y)))),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("prior", [lambda: flows.StandardNormal(2), lambda: flows.RealNVP(2, n_layers=1)])
def test_a_prior_follows_parameters_that_are_assigned(prior):
    def make():
        return vae.VAE(nn.Linear(3, 4), nn.Linear(2, 3), prior=prior())

    with torch.device("meta"):
        model = make()
    model.load_state_dict(make().double().state_dict(), assign=True)
    x = model.sample(4)
    assert x.dtype == torch.float64 and x.device.type == "cpu" and model.elbo(x).elbo.isfinite().all()
