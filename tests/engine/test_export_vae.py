"""Exported VAEs: with the noise given, the ELBO, its terms, encoder and decoder are the model's own."""

import json
import subprocess
import sys

import pytest
import torch

from fastflow import flows, vae
from fastflow.engine import build_model, load_settings
from fastflow.engine.export import export, load_exported

K = 3
MODELS = {
    "gaussian": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), likelihood="gaussian"),
    "iwae": lambda: vae.IWAE((1, 4, 4), 2, n_samples=5, sizes=(8,), likelihood="gaussian"),
    "learned prior": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), prior=vae.GaussianPrior((2,))),
    "low rank": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), posterior=vae.LowRankGaussianPosterior(1)),
    "full": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), posterior="full"),
    "mixture": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), posterior=vae.MixturePosterior(2)),
    "flow": lambda: vae.FlowPosteriorVAE((1, 4, 4), 2, sizes=(8,)),
    "deterministic": lambda: vae.WAE((1, 4, 4), 2, sizes=(8,)),
    "bits": lambda: vae.DiscreteVAE(vae.mlp_encoder((1, 4, 4), 3, (8,), n_params=3),
                                    vae.mlp_decoder(3, (1, 4, 4), (8,)), 3, prior="learned"),
    "classes": lambda: vae.DiscreteVAE(vae.mlp_encoder((1, 4, 4), 2, (8,), n_params=6),
                                       vae.mlp_decoder(6, (1, 4, 4), (8,)), 2, n_classes=3),
    "hierarchy": lambda: vae.HVAE((1, 4, 4), (2, 3), 8),
    "labels": lambda: vae.ConditionalVAE((1, 4, 4), 2, 3, (8,), prior=vae.ConditionalGaussianPrior(
        2, torch.nn.Embedding(3, 4))),
    "some labels": lambda: build_model(load_settings("m2-digits", ["model.latent_features=2",
                                                                   "model.hidden_features=8"])),
    "codes": lambda: vae.VQVAE((1, 4, 4), 8, 4, (8,)),
    "finite codes": lambda: vae.FSQVAE((1, 4, 4), (3, 4), (8,)),
}
READ = """
import sys, torch
from fastflow.engine.export import load_exported
for path in sys.argv[1:]:
    function = load_exported(path)
    cases = torch.load(path + ".cases", weights_only=True)
    torch.save([function(*case) for case in cases], path + ".found")
"""


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def noise(model, n):
    """K draws for n examples, without the code under test."""
    if isinstance(model, vae.QuantizedVAE):
        return ()
    if isinstance(model, vae.DiscreteVAE):
        return (torch.rand(K, n, *model.prior_logits.shape[1:]),)
    if isinstance(model, vae.HierarchicalVAE):
        return ([torch.randn(K, n, d) for d in (2, 3)],)
    more = {vae.LowRankGaussianPosterior: 1, vae.MixturePosterior: 1}.get(type(model.posterior), 0)
    return (torch.randn(K, n, 2 + more),)


def labels(name, n):
    """What a model is conditioned on."""
    return (torch.arange(n) % 3,) if "labels" in name else ()


def wanted(model, x, eps=None, context=None):
    """The ELBO's terms by the model itself."""
    if isinstance(model, vae.DiscreteVAE):
        q, p = model.posterior(x), model.prior()
        z = q.harden(q.perturb(eps))
        log_px_z = model.log_likelihood(x, z)
        rate, distortion = q.kl(p), -log_px_z.mean(0)
        log_w = log_px_z + p.log_prob(z) - q.log_prob(z)
        return {"elbo": -rate - distortion, "rate": rate, "distortion": distortion, "log_w": log_w}
    given = {} if context is None else {"context": context}
    bound = model.elbo(x) if eps is None else model.elbo(x, K, eps=eps, **given)
    return {"elbo": bound.elbo, "rate": bound.rate, "distortion": bound.distortion, "log_w": bound.log_w}


@pytest.mark.parametrize("name", ["gaussian", "low rank", "full", "mixture", "bits", "hierarchy", "codes",
                                  "finite codes", "labels", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("iwae", "learned prior", "classes", "some labels"))])
def test_a_graph_gives_the_models_own_terms(tmp_path, name):
    model = made(name)
    path = export(model, tmp_path / "m", "torch_export", n_samples=K)
    about = json.loads(path.with_name(f"{path.name}.json").read_text())
    size = 8 if name == "some labels" else 4
    assert about["function"] == "elbo" and about["inputs"][0]["shape"] == ["B", 1, size, size]
    assert len(about["inputs"]) == len((*noise(model, 2), *labels(name, 2))) + 1
    elbo = load_exported(path)
    for n in (1, 5):
        x, beside = torch.rand(n, 1, size, size).round(), (*noise(model, n), *labels(name, n))
        with torch.no_grad():
            want = wanted(model, x, *beside)
        found = elbo(x, *beside)
        assert set(found) == set(want)
        for term in want:
            torch.testing.assert_close(found[term], want[term], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "bits", "codes", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("classes", "hierarchy", "labels"))])
def test_graphs_encode_and_decode(tmp_path, name):
    model = made(name)
    x, beside = torch.rand(4, 1, 4, 4).round(), labels(name, 4)
    encode = load_exported(export(model, tmp_path / "e", "torch_export", function="encode"))(x, *beside)
    decode = load_exported(export(model, tmp_path / "d", "torch_export", function="decode"))
    with torch.no_grad():
        latents = next(iter(encode.values()))
        if isinstance(model, vae.DiscreteVAE):
            torch.testing.assert_close(latents, model.posterior(x).probs)
            latents = model.posterior(x).mode()
        torch.testing.assert_close(decode(latents, *beside), model.reconstruct(x, *beside), rtol=1e-5, atol=1e-5)
        if name == "gaussian":
            torch.testing.assert_close(encode["log_sigma"], model.posterior.moments(model.encoder(x))[1])


@pytest.mark.parametrize("name", ["full", "mixture", "flow", "deterministic"])
def test_a_decoder_needs_no_moments_of_the_posterior(tmp_path, name):
    model, z = made(name), torch.randn(4, 2)
    decode = load_exported(export(model, tmp_path / "d", "torch_export", function="decode"))
    with torch.no_grad():
        torch.testing.assert_close(decode(z), model.likelihood.mean(model.decode(z)), rtol=1e-5, atol=1e-5)


def test_a_conditional_flow_takes_its_context(tmp_path):
    model = flows.RealNVP(4, n_layers=2, hidden=(8,), context_features=2).eval()
    x, context = torch.randn(5, 4), torch.randn(5, 2)
    log_prob = load_exported(export(model, tmp_path / "m", "torch_export", context=context[:2]))
    with torch.no_grad():
        torch.testing.assert_close(log_prob(x, context), model.log_prob(x, context))


def test_what_has_no_graph_is_named(tmp_path):
    with pytest.raises(ValueError, match="context: a HVAE takes none"):
        export(vae.HVAE((4,), (2,), 8), tmp_path / "m", "torch_export", context=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="function: encode of a MLPVAE can't be exported"):
        export(vae.MLPVAE((4,), 2, (8,), posterior="full"), tmp_path / "m", "torch_export", function="encode")
    moved = vae.HamiltonianVAE(vae.mlp_encoder((4,), 2, (8,)), vae.mlp_decoder(2, (4,), (8,)), latent_shape=2)
    with pytest.raises(ValueError, match="function: elbo of a HamiltonianVAE can't be exported, because"):
        export(moved, tmp_path / "m", "torch_export")


@pytest.mark.slow  # compiles for a minute
def test_a_compiled_elbo_reloads_elsewhere(tmp_path):
    model = made("gaussian")
    path = export(model, tmp_path / "m", "aoti", n_samples=K)
    cases = [(torch.rand(n, 1, 4, 4), *noise(model, n)) for n in (1, 5)]
    torch.save(cases, f"{path}.cases")
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=300,
                          check=False)
    assert done.returncode == 0, done.stderr
    for case, found in zip(cases, torch.load(f"{path}.found", weights_only=True), strict=True):
        with torch.no_grad():
            want = wanted(model, *case)
        for term in want:
            torch.testing.assert_close(found[term], want[term], rtol=1e-5, atol=1e-5)
