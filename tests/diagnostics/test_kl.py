"""The KL of every latent and the information of discrete latents, against the models' own terms and enumeration."""

import math

import pytest
import torch

from fastflow import diagnostics, estimators, vae
from fastflow.diagnostics.kl import site_kl
from tests.gaussian_models import randn

MODELS = {
    "gaussian": lambda: vae.MLPVAE((6,), 3, (8,)),
    "learned prior": lambda: vae.MLPVAE((6,), 3, (8,), prior=vae.GaussianPrior((3,))),
    "bits": lambda: vae.DiscreteVAE(vae.mlp_encoder((6,), 4, (8,), n_params=4), vae.mlp_decoder(4, (6,), (8,)), 4,
                                    prior="learned"),
    "classes": lambda: vae.DiscreteVAE(vae.mlp_encoder((6,), 2, (8,), n_params=6), vae.mlp_decoder(6, (6,), (8,)), 2,
                                       n_classes=3, prior="learned"),
    "hierarchy": lambda: vae.HVAE((6,), (2, 3), 8),
    "residual hierarchy": lambda: vae.NVAE((1, 4, 4), (1, 1), channels=4, latent_channels=2),
    "codes": lambda: vae.VQVAE((1, 4, 4), 8, 4, (8,)),
    "codes, uniform prior": lambda: vae.VQVAE((1, 4, 4), 8, 4, (8,), learned_prior=False),
}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    shape = (1, 4, 4) if "codes" in name or name.startswith("residual") else (6,)
    return model, (randn(20, *shape, seed=1) > 0).double()


@pytest.mark.parametrize("name", MODELS)
def test_kl_per_latent_sums_to_the_models_rate(name):
    model, x = made(name)
    model.eval()
    kl = diagnostics.kl_per_latent(model, x, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        noise = {"generator": torch.Generator().manual_seed(5)}
        rate = model.elbo(x, **noise).rate.mean()
    assert kl.dim() == 1 and (kl >= 0).all() and kl.max() > 1e-3
    torch.testing.assert_close(kl.sum(), rate, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_diagnosis_splits_the_rate_of_every_model(name):
    model, x = made(name)
    found = diagnostics.diagnose(model, x, generator=torch.Generator().manual_seed(5), constant=2.0)
    sampled = "hierarchy" in name  # its KLs are averages over samples of the levels above
    assert found.kl.sum().item() == pytest.approx(found.point.rate, rel=0.3 if sampled else 1e-10)
    assert found.point.elbo == pytest.approx(-found.point.rate - found.point.distortion, rel=1e-12)
    plain = diagnostics.diagnose(model, x, generator=torch.Generator().manual_seed(5))
    assert found.point.distortion == pytest.approx(plain.point.distortion + 2.0, rel=1e-12)
    if sampled:
        assert found.information is None and sum(found.level_kl) == pytest.approx(found.kl.sum().item(), rel=1e-10)
        torch.testing.assert_close(found.level_images[-1], model.reconstruct(x[:8]))
    else:
        terms = found.information
        assert terms.kl.item() == pytest.approx(found.point.rate, abs=4.0 * terms.kl_error.item() + 1e-6)
        assert terms.mutual_information <= math.log(20) + 1e-9
    if "codes" in name:
        assert found.codes.counts.sum() == 20 * 4 and found.active is None
        assert 1.0 <= found.codes.perplexity <= found.codes.used <= 8
    if name in ("bits", "classes"):
        assert found.traversal.images.shape == (len(found.kl), model.n_classes, 6)


def test_information_of_bits_against_enumeration():
    torch.manual_seed(0)
    q = estimators.Bernoulli(2.0 * torch.randn(5, 3, dtype=torch.float64))
    p = estimators.Bernoulli(torch.randn(1, 3, dtype=torch.float64))
    states = q.states()
    each = q.log_prob(states[:, None].expand(-1, 5, -1))  # (S, N)
    mixture = torch.logsumexp(each, 1) - math.log(5)
    prior = p.log_prob(states[:, None])[:, 0]
    mutual = (each.exp() * (each - mixture[:, None])).sum(0).mean()
    aggregate = (mixture.exp() * (mixture - prior)).sum()
    found = diagnostics.discrete_information(q, p, n_samples=40_000, generator=torch.Generator().manual_seed(1))
    assert abs(found.mutual_information - mutual) < 4 * found.mutual_information_error < 0.01
    assert abs(found.aggregate_kl - aggregate) < 4 * found.aggregate_kl_error < 0.02
    classes = estimators.Categorical(torch.stack([torch.zeros_like(q.logits), q.logits], -1))
    same = diagnostics.discrete_information(
        classes, estimators.Categorical(torch.stack([torch.zeros_like(p.logits), p.logits], -1)), n_samples=40_000,
        generator=torch.Generator().manual_seed(2))
    assert abs(same.mutual_information - mutual) < 4 * same.mutual_information_error


def test_classes_that_never_happen_have_no_part_in_what_latents_carry():
    """Of three classes with one masked everywhere the KL and the information are those of the other two."""
    torch.manual_seed(0)
    q, p = torch.randn(5, 2, 2, dtype=torch.float64), torch.randn(1, 2, 2, dtype=torch.float64)
    found = []
    for pad in (False, True):
        laws = [estimators.Categorical(torch.nn.functional.pad(t, (0, 1), value=-math.inf) if pad else t)
                for t in (q, p)]
        terms = diagnostics.discrete_information(*laws, n_samples=4000, generator=torch.Generator().manual_seed(0))
        found.append((site_kl(*laws), terms))
    torch.testing.assert_close(found[1][0], found[0][0])
    terms, masked = found[0][1], found[1][1]
    for name in ("mutual_information", "aggregate_kl"):
        error = getattr(terms, f"{name}_error") + getattr(masked, f"{name}_error")
        assert abs(getattr(terms, name) - getattr(masked, name)) < 4 * error


def test_information_of_codes_is_their_entropy():
    codes = torch.tensor([[[0, 1]], [[0, 1]], [[1, 1]], [[2, 0]]])
    found = diagnostics.code_information(codes, torch.full((4,), -math.log(9.0)))
    assert found.mutual_information.item() == pytest.approx(1.5 * math.log(2.0), rel=1e-12)
    assert found.aggregate_kl.item() == pytest.approx(math.log(9.0) - 1.5 * math.log(2.0), rel=1e-6)
    assert found.mutual_information_error == found.aggregate_kl_error == found.kl_error == 0.0


def test_code_usage():
    found = diagnostics.code_usage(torch.tensor([[0, 0, 2], [2, 0, 2]]), 5)
    assert found.counts.tolist() == [3, 0, 3, 0, 0] and found.used == 2
    assert found.perplexity == pytest.approx(2.0, rel=1e-12)
    with pytest.raises(ValueError, match="^codes: expected at least one, all from 0 to 1"):
        diagnostics.code_usage(torch.tensor([2]), 2)
    with pytest.raises(TypeError, match="^codes"):
        diagnostics.code_usage(torch.tensor([0.5]), 2)


def test_bits_that_do_not_depend_on_x_are_not_active():
    model, x = made("bits")
    with torch.no_grad():
        last = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Linear)][-1]
        last.weight[1] = 0.0
        last.weight[2] = 10.0 * randn(8, seed=2)
        last.bias[2] = -last.weight[2] @ model.encoder[:-1](x).mean(0)  # so that it is now 0, now 1
    found = diagnostics.diagnose(model, x)
    assert not found.active[1] and found.active[2] and found.kl[1] > 0.0  # it differs from the prior all the same


def test_models_without_such_terms():
    assert diagnostics.kl_per_latent(vae.MLPVAE((6,), 2, (8,), posterior="full"), torch.zeros(3, 6)) is None
    with pytest.raises(ValueError, match="^x: expected at least one"):
        diagnostics.kl_per_latent(made("gaussian")[0], torch.zeros(0, 6))
    with pytest.raises(ValueError, match="^batch_size"):
        diagnostics.kl_per_latent(made("gaussian")[0], torch.zeros(3, 6), batch_size=0)
    with pytest.raises(ValueError, match="^n_samples"):
        diagnostics.discrete_information(*[estimators.Bernoulli(torch.zeros(2, 3))] * 2, n_samples=0)


def test_eigenvalues_of_fewer_examples_than_numbers():
    x = randn(5, 9, seed=0)
    centred = x - x.mean(0)
    want = torch.linalg.eigvalsh(centred.mT @ centred / 5).flip(0)
    torch.testing.assert_close(diagnostics.data_eigenvalues(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, dim, values", [("bits", 2, [0.0, 1.0]), ("classes", 1, None)])
def test_a_discrete_latent_takes_all_its_values(name, dim, values):
    model, x = made(name)
    z = model.posterior(x).mode()[3]
    images = model.traverse(z, [dim])
    for value in range(model.n_classes):
        moved = z.clone()
        if values:
            moved[dim] = values[value]
        else:
            moved[dim] = torch.eye(3, dtype=z.dtype)[value]
        torch.testing.assert_close(images[0, value], model.likelihood.mean(model.decode(moved[None]))[0])
    with pytest.raises(ValueError, match="^dims"):
        model.traverse(z, [9])


def test_a_hierarchy_decodes_what_it_encodes():
    for name in ("hierarchy", "residual hierarchy"):
        model, x = made(name)
        torch.testing.assert_close(model.likelihood.mean(model.decode(model.encode(x))), model.reconstruct(x))
    with pytest.raises(ValueError, match="^latents: expected 2 tensors"):
        model.decode(model.encode(x)[:1])
