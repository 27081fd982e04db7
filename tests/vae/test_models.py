"""Ready models: what each maximises, that everything in it is trained, and that it generates."""

import copy

import pytest
import torch

from fastflow import vae

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


@pytest.mark.parametrize("name", ["beta-tc", "factor", "adversarial", "iwae", "vamp", "iaf", "mixture", "pixels"])
def test_works_in_float64_and_bfloat16_data(name):
    model = MODELS[name]().double()
    assert model(X.double()).value.dtype == torch.float64 and model.sample(2).dtype == torch.float64
    half = MODELS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(X).value.dtype == torch.float32


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


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.MLPVAE(SHAPE, 0), "latent_features"),
    (ValueError, lambda: vae.BetaVAE(SHAPE, 2, network="transformer"), "network"),
    (TypeError, lambda: vae.MLPVAE(SHAPE, 2, likelihood=torch.nn.ReLU()), "likelihood"),
    (ValueError, lambda: vae.FlowPosteriorVAE(SHAPE, 2, flow="spline"), "flow"),
    (ValueError, lambda: vae.FlowPriorVAE(SHAPE, 2, flow="glow"), "flow"),
    (TypeError, lambda: vae.MLPVAE(SHAPE, 2, posterior=torch.nn.ReLU()), "posterior"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
