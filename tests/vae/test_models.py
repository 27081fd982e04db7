"""Ready models: what each maximises, that everything in it is trained, and that it generates."""

import copy
import math

import pytest
import torch

from fastflow import vae
from fastflow.vae.penalties import permute_dims

SHAPE = (1, 8, 8)
SMALL = {"sizes": (16,)}
MODELS = {
    "mlp": lambda: vae.MLPVAE(SHAPE, 3, (16,)),
    "conv": lambda: vae.ConvVAE(SHAPE, 3, (4, 8), likelihood=vae.GaussianLikelihood("optimal")),
    "beta": lambda: vae.BetaVAE(SHAPE, 3, beta=3.0, **SMALL),
    "beta-tc": lambda: vae.BetaTCVAE(SHAPE, 3, 1000, **SMALL),
    "factor": lambda: vae.FactorVAE(SHAPE, 3, discriminator_hidden=(8,), **SMALL),
    "dip": lambda: vae.DIPVAE(SHAPE, 3, kind="i", **SMALL),
    "info": lambda: vae.InfoVAE(SHAPE, 3, **SMALL),
    "wae": lambda: vae.WAE(SHAPE, 3, **SMALL),
    "adversarial": lambda: vae.AdversarialAutoencoder(SHAPE, 3, discriminator_hidden=(8,), **SMALL),
    "iwae": lambda: vae.IWAE(SHAPE, 3, n_samples=5, **SMALL),
    "vamp": lambda: vae.VampVAE(SHAPE, 3, n_components=4, **SMALL),
    "flow prior": lambda: vae.FlowPriorVAE(SHAPE, 3, n_layers=2, flow_hidden=(8,), **SMALL),
    "iaf": lambda: vae.FlowPosteriorVAE(SHAPE, 3, flow_options={"hidden": (8,)}, context_features=2, **SMALL),
    "planar": lambda: vae.FlowPosteriorVAE(SHAPE, 3, flow="planar", context_features=0, **SMALL),
    "full": lambda: vae.MLPVAE(SHAPE, 3, (16,), posterior="full"),
    "low rank": lambda: vae.ConvVAE(SHAPE, 3, (4,), posterior=vae.LowRankGaussianPosterior(2)),
    "mixture": lambda: vae.MLPVAE(SHAPE, 3, (16,), posterior=vae.MixturePosterior(2), prior=vae.MixturePrior(3, 2)),
    "autoregressive prior": lambda: vae.MLPVAE(SHAPE, 3, (16,), prior=vae.AutoregressivePrior(3, 2, (8,))),
    "pixels": lambda: vae.ConvVAE(SHAPE, 3, (4,), likelihood=vae.LogisticMixtureLikelihood(1, 2, 2)),
    "counts": lambda: vae.MLPVAE(SHAPE, 3, (16,), likelihood=vae.NegativeBinomialLikelihood()),
    "classes": lambda: vae.MLPVAE(SHAPE, 3, (16,), likelihood=vae.CategoricalLikelihood(4)),
}
X = torch.randint(0, 2, (6, *SHAPE), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("name", MODELS)
def test_trains_everything_in_it_and_generates(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    result = model(X)
    assert result.value.shape == (6,) and result.value.isfinite().all()
    assert result.rate.shape == result.distortion.shape == (6,)
    assert all(part.dim() == 0 and not part.requires_grad for part in result.parts.values())
    result.value.mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    bound = model.elbo(X, 2)
    torch.testing.assert_close(bound.elbo, -bound.distortion - bound.rate)
    assert model.sample(3).shape == model.reconstruct(X[:3]).shape == (3, *SHAPE)
    assert model.interpolate(X[:2], X[2:4], 3, path="slerp").shape == (3, 2, *SHAPE)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.elbo(X, seed=3).elbo, model.elbo(X, seed=3).elbo)


def normal(z, mean=0.0, log_sigma=0.0):
    """log N(z; mean, sigma^2), element by element."""
    return -0.5 * ((z - mean) / torch.as_tensor(log_sigma).exp()) ** 2 - log_sigma - 0.5 * math.log(2 * math.pi)


def classifier(model, z, other):
    """(T(z) (B,), cross-entropy of telling z from the others) of the model's discriminator."""
    discriminator = model.objective.penalties[0].discriminator
    on_z, on_other = discriminator(z).flatten(), discriminator(other).flatten()
    return on_z, -(torch.log(torch.sigmoid(on_z)).mean() + torch.log(1 - torch.sigmoid(on_other)).mean())


def tc_terms(z, mean, log_sigma, n):
    """(I, TC, sum of KLs) of every example, q(z) as the mixture that the batch stands for: an example itself weighs
    1/n, the next one what is missing, the others 1/(B - 1)."""
    batch = len(z)
    parts = []
    for i in range(batch):
        weights = torch.full((batch, 1), 1 / (batch - 1), dtype=z.dtype)
        weights[i] = 1 / n
        weights[(i + 1) % batch] = 1 - 1 / n - (batch - 2) / (batch - 1)
        each = normal(z[i], mean, log_sigma).exp()  # (B, D)
        whole, marginals = (weights * each.prod(1, keepdim=True)).sum().log(), (weights * each).sum(0).log().sum()
        own = normal(z[i], mean[i], log_sigma[i]).sum()
        parts.append(torch.stack([own - whole, whole - marginals, marginals - normal(z[i]).sum()]))
    return torch.stack(parts).unbind(1)


def squared_mmd(x, y):
    """Unbiased, with the inverse multiquadratic kernels of seven scales."""
    d, total = x.shape[1], 0.0
    for scale in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        def kernel(a, b, c=2 * d * scale):
            return c / (c + torch.cdist(a, b) ** 2)

        n, m = len(x), len(y)
        total = total + ((kernel(x, x).sum() - n) / (n * (n - 1)) + (kernel(y, y).sum() - m) / (m * (m - 1))
                         - 2 * kernel(x, y).mean())
    return total / 7


def dip(mean, log_sigma, diagonal=10.0, off_diagonal=5.0):
    c = torch.cov(mean.T, correction=0) + torch.diag((2 * log_sigma).exp().mean(0))
    off = c - torch.diag(c.diagonal())
    return off_diagonal * (off**2).sum() + diagonal * ((c.diagonal() - 1) ** 2).sum()


def mixture_of_inputs(model, z):
    mean, logvar = model.encoder(model.prior.inputs).chunk(2, 1)
    return torch.logsumexp(normal(z[:, None], mean, 0.5 * logvar).sum(2), 1) - math.log(len(mean))


def log_weights(t):
    log_q = normal(t["all"], t["mean"], t["log_sigma"]).sum(2)
    return t["log_px"] + normal(t["all"]).sum(2) - log_q


# What docs/elbo.md says each maximises, with the constructor's defaults: of the terms of one batch, written out.
OBJECTIVES = {
    "beta": (lambda: vae.BetaVAE(SHAPE, 3, **SMALL), lambda m, t: -t["d"] - 4.0 * t["kl"]),
    "beta of 2.5": (lambda: vae.BetaVAE(SHAPE, 3, beta=2.5, **SMALL), lambda m, t: -t["d"] - 2.5 * t["kl"]),
    "beta-tc": (lambda: vae.BetaTCVAE(SHAPE, 3, 1000, **SMALL),
                lambda m, t: -t["d"] - sum(w * term for w, term in zip((1.0, 6.0, 1.0), t["tc"](), strict=True))),
    "weighed beta-tc": (lambda: vae.BetaTCVAE(SHAPE, 3, 1000, alpha=0.5, beta=2.0, gamma=3.0, **SMALL),
                        lambda m, t: -t["d"] - sum(w * c for w, c in zip((0.5, 2.0, 3.0), t["tc"](), strict=True))),
    "factor": (lambda: vae.FactorVAE(SHAPE, 3, discriminator_hidden=(8,), **SMALL),
               lambda m, t: -t["d"] - t["kl"] - 10.0 * t["shuffled"]()[0] - t["shuffled"]()[1]),
    "dip": (lambda: vae.DIPVAE(SHAPE, 3, **SMALL), lambda m, t: -t["d"] - t["kl"] - dip(t["mean"], t["log_sigma"])),
    "info": (lambda: vae.InfoVAE(SHAPE, 3, **SMALL), lambda m, t: -t["d"] - t["kl"] - 9.0 * t["mmd"]()),
    "info of 0.3": (lambda: vae.InfoVAE(SHAPE, 3, alpha=0.3, scale=7.0, **SMALL),
                    lambda m, t: -t["d"] - 0.7 * t["kl"] - 6.3 * t["mmd"]()),
    "wae": (lambda: vae.WAE(SHAPE, 3, **SMALL), lambda m, t: -t["d"] - 10.0 * t["mmd"]()),
    "adversarial": (lambda: vae.AdversarialAutoencoder(SHAPE, 3, discriminator_hidden=(8,), **SMALL),
                    lambda m, t: -t["d"] - t["prior"]()[0] - t["prior"]()[1]),
    "iwae": (lambda: vae.IWAE(SHAPE, 3, **SMALL), lambda m, t: torch.log(torch.exp(log_weights(t)).mean(0))),
    "vamp": (lambda: vae.VampVAE(SHAPE, 3, n_components=4, **SMALL),
             lambda m, t: -t["d"] + mixture_of_inputs(m, t["z"]) - normal(t["z"], t["mean"], t["log_sigma"]).sum(1)),
    "flow prior": (lambda: vae.FlowPriorVAE(SHAPE, 3, n_layers=2, flow_hidden=(8,), **SMALL),
                   lambda m, t: -t["d"] + m.prior.log_prob(t["z"])
                   - normal(t["z"], t["mean"], t["log_sigma"]).sum(1)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_maximises_what_the_documentation_says(name):
    torch.manual_seed(0)
    make, formula = OBJECTIVES[name]
    model, x = make().double(), X.double()
    eps = torch.randn(50 if name == "iwae" else 1, 6, 3, dtype=torch.float64)
    value = model(x, n_samples=len(eps), eps=eps, generator=torch.Generator().manual_seed(3)).value
    mean, log_sigma = model.encoder(x), torch.full((6, 3), -math.inf, dtype=torch.float64)
    if name != "wae":
        mean, log_sigma = mean[:, :3], 0.5 * mean[:, 3:]
    z = mean + log_sigma.exp() * eps
    output = model.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    log_px = model.likelihood.log_prob(x, output)
    generator = torch.Generator().manual_seed(3)
    terms = {"all": z, "z": z[0], "mean": mean, "log_sigma": log_sigma, "log_px": log_px, "d": -log_px.mean(0),
             "kl": 0.5 * (mean**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(1),
             "tc": lambda: tc_terms(z[0], mean, log_sigma, 1000),
             "mmd": lambda: squared_mmd(z[0], model.sample_latents(6, generator=generator.manual_seed(3))),
             "prior": lambda: classifier(model, z[0], model.sample_latents(6, generator=generator.manual_seed(3))),
             "shuffled": lambda: classifier(model, z[0], permute_dims(z[0], generator.manual_seed(3)))}
    torch.testing.assert_close(value, formula(model, terms), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["beta-tc", "factor", "adversarial", "iwae", "vamp", "iaf", "mixture", "pixels"])
def test_works_in_float64_and_bfloat16_data(name):
    model = MODELS[name]().double()
    assert model(X.double()).value.dtype == torch.float64 and model.sample(2).dtype == torch.float64
    half = MODELS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(X).value.dtype == torch.float32


@pytest.mark.parametrize("name", ["factor", "adversarial", "beta-tc", "iaf", "mixture", "autoregressive prior"])
def test_works_in_bfloat16_and_without_data(name):
    """Its networks, discriminators too, take what they get in their dtype; the terms are float32."""
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    result = model(X.bfloat16())
    assert {term.dtype for term in (result.value, result.rate, result.distortion)} == {torch.float32}
    assert all(part.dtype == torch.float32 for part in result.parts.values())
    result.value.mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and model.sample(2).shape == (2, *SHAPE)
    assert model.to("meta")(X.bfloat16().to("meta")).value.is_meta


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta-tc", "factor", "iwae", "flow prior", "full", "pixels"])
def test_compiles_to_one_graph(name):
    model = MODELS[name]()
    eps = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    value = compiled(X, n_samples=2, eps=eps).value
    torch.manual_seed(0)
    torch.testing.assert_close(value, model(X, n_samples=2, eps=eps).value)


@pytest.mark.parametrize(("likelihood", "low", "high", "top"), [
    ("bernoulli", 0.0, 1.0, 1.0), (vae.DiscretizedLogisticLikelihood(256), 0.0, 255.0, 255.0),
    (vae.CategoricalLikelihood(4), 0.0, 3.0, 3.0), (vae.PoissonLikelihood(), 0.0, math.inf, 1.0)])
def test_pseudo_inputs_lie_where_the_data_do(likelihood, low, high, top):
    model = vae.VampVAE((5,), 2, likelihood=likelihood, sizes=(4,))
    inputs = model.prior.inputs
    assert model.prior.bounds == (low, high) and inputs.shape == (100, 5)
    assert low <= inputs.min() and inputs.max() <= top < 1.1 * inputs.max()
    assert torch.isfinite(model.sample_latents(3)).all()
    given = torch.full((3, 5), 1.0)
    for options in ({}, {"n_components": 3}, {"bounds": None}):
        assert torch.equal(vae.VampVAE((5,), 2, inputs=given, likelihood=likelihood, **options).prior.inputs, given)


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.VampVAE((6,), 2, n_components=100, inputs=torch.rand(3, 6)),
     r"^inputs: expected shape \(100, 6\), got \(3, 6\)"),
    (ValueError, lambda: vae.VampVAE((6,), 2, inputs=torch.rand(3, 5)), r"^inputs: expected shape \(3, 6\)"),
    (ValueError, lambda: vae.VampVAE((6,), 2, bounds="pixels"), "^bounds"),
    (ValueError, lambda: vae.VampVAE((6,), 2, bounds=(-math.inf, 1.0)), "^bounds: expected a finite low"),
    (ValueError, lambda: vae.MLPVAE(SHAPE, 0), "latent_features"),
    (ValueError, lambda: vae.BetaVAE(SHAPE, 2, network="transformer"), "network"),
    (ValueError, lambda: vae.MLPVAE(SHAPE, 2, (4, 0)), "hidden"),
    (ValueError, lambda: vae.ConvVAE((1, 4, 4), 2, (0,)), "channels"),
    (ValueError, lambda: vae.ConditionalVAE(SHAPE, 0, 3), "latent_features"),
    (ValueError, lambda: vae.ConditionalVAE(SHAPE, 2, 0), "n_classes"),
    (ValueError, lambda: vae.HVAE(SHAPE, (2, 0)), "latent_features"),
    (ValueError, lambda: vae.NVAE((1, 4, 4), (0,)), "groups"),
    (ValueError, lambda: vae.VDVAE((1, 4, 4), (1,), latent_channels=0), "latent_channels"),
    (TypeError, lambda: vae.MLPVAE(SHAPE, 2, likelihood=torch.nn.ReLU()), "likelihood"),
    (TypeError, lambda: vae.ConditionalVAE(SHAPE, 2, 3, likelihood=torch.nn.ReLU()), "likelihood: expected"),
    (ValueError, lambda: vae.FlowPosteriorVAE(SHAPE, 2, flow="spline"), "flow"),
    (ValueError, lambda: vae.FlowPriorVAE(SHAPE, 2, flow="glow"), "flow"),
    (TypeError, lambda: vae.MLPVAE(SHAPE, 2, posterior=torch.nn.ReLU()), "posterior"),
    *((TypeError, lambda make=make: make(6, 2), "^event_shape: expected a sequence of ints, got int")
      for make in (vae.MLPVAE, vae.BetaVAE, vae.HVAE, lambda *args: vae.ConditionalVAE(*args, 3), vae.mlp_encoder)),
    *((ValueError, lambda make=make: make((8, 8), 2), r"^image_shape: expected \(C, H, W\), got \(8, 8\)")
      for make in (vae.ConvVAE, lambda shape, _: vae.NVAE(shape), vae.VQVAE, lambda shape, _: vae.FSQVAE(shape),
                   vae.conv_encoder)),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
