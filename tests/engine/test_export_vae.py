"""Exported VAEs: with the noise given, the ELBO, its terms, encoder and decoder are the model's own."""

import json
import subprocess
import sys

import pytest
import torch

from fastflow import vae
from fastflow.engine.export import export, load_exported

K = 3
MODELS = {
    "gaussian": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), likelihood="gaussian"),
    "iwae": lambda: vae.IWAE((1, 4, 4), 2, n_samples=5, sizes=(8,), likelihood="gaussian"),
    "learned prior": lambda: vae.MLPVAE((1, 4, 4), 2, (8,), prior=vae.GaussianPrior((2,))),
    "bits": lambda: vae.DiscreteVAE(vae.mlp_encoder((1, 4, 4), 3, (8,), n_params=3),
                                    vae.mlp_decoder(3, (1, 4, 4), (8,)), 3, prior="learned"),
    "classes": lambda: vae.DiscreteVAE(vae.mlp_encoder((1, 4, 4), 2, (8,), n_params=6),
                                       vae.mlp_decoder(6, (1, 4, 4), (8,)), 2, n_classes=3),
    "hierarchy": lambda: vae.HVAE((1, 4, 4), (2, 3), 8),
    "codes": lambda: vae.VQVAE((1, 4, 4), 8, 4, (8,)),
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
    return (torch.randn(K, n, 2),)


def wanted(model, x, *eps):
    """The ELBO's terms by the model itself."""
    if isinstance(model, vae.DiscreteVAE):
        q, p = model.posterior(x), model.prior()
        z = q.harden(q.perturb(eps[0]))
        log_px_z = model.log_likelihood(x, z)
        rate, distortion = q.kl(p), -log_px_z.mean(0)
        log_w = log_px_z + p.log_prob(z) - q.log_prob(z)
        return {"elbo": -rate - distortion, "rate": rate, "distortion": distortion, "log_w": log_w}
    bound = model.elbo(x, K, eps=eps[0]) if eps else model.elbo(x)
    return {"elbo": bound.elbo, "rate": bound.rate, "distortion": bound.distortion, "log_w": bound.log_w}


@pytest.mark.parametrize("name", ["gaussian", "bits", "hierarchy", "codes", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("iwae", "learned prior", "classes"))])
def test_a_graph_gives_the_models_own_terms(tmp_path, name):
    model = made(name)
    path = export(model, tmp_path / "m", "torch_export", n_samples=K)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["function"] == "elbo" and about["inputs"][0]["shape"] == ["B", 1, 4, 4]
    elbo = load_exported(path)
    for n in (1, 5):
        x, eps = torch.rand(n, 1, 4, 4).round(), noise(model, n)
        with torch.no_grad():
            want = wanted(model, x, *eps)
        found = elbo(x, *eps)
        assert set(found) == set(want)
        for term in want:
            torch.testing.assert_close(found[term], want[term], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian", "bits", "codes", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("classes", "hierarchy"))])
def test_graphs_encode_and_decode(tmp_path, name):
    model = made(name)
    x = torch.rand(4, 1, 4, 4).round()
    encode = load_exported(export(model, tmp_path / "e", "torch_export", function="encode"))(x)
    decode = load_exported(export(model, tmp_path / "d", "torch_export", function="decode"))
    with torch.no_grad():
        latents = next(iter(encode.values()))
        if isinstance(model, vae.DiscreteVAE):
            torch.testing.assert_close(latents, model.posterior(x).probs)
            latents = model.posterior(x).mode()
        torch.testing.assert_close(decode(latents), model.reconstruct(x), rtol=1e-5, atol=1e-5)
        if name == "gaussian":
            torch.testing.assert_close(encode["log_sigma"], model.posterior.moments(model.encoder(x))[1])


def test_what_has_no_graph_is_named(tmp_path):
    with pytest.raises(ValueError, match="function: encode of a MLPVAE can't be exported"):
        export(vae.MLPVAE((4,), 2, (8,), posterior="full"), tmp_path / "m", "torch_export", function="encode")


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
