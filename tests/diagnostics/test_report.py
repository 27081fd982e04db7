"""The collapse monitor, the density-ratio check, traversals and the report."""

import importlib.util
import math
import warnings

import pytest
import torch

from fastflow import diagnostics, vae
from fastflow.engine.aside import aside
from fastflow.engine.export import export
from tests.gaussian_models import linear, randn


def selective(gains):
    """A VAE whose latent d has the mean gains[d] * x_d and unit variance."""
    gains = torch.tensor(gains, dtype=torch.float64)
    d = len(gains)
    weight = torch.cat([torch.diag(gains), torch.zeros(d, d, dtype=torch.float64)])
    return vae.VAE(linear(weight, torch.zeros(2 * d).double()), linear(torch.eye(d).double(), torch.zeros(d).double()),
                   likelihood=vae.GaussianLikelihood(0.5))


def test_monitor_warns_of_collapse_once_and_recovers():
    model, x = selective([0.0, 0.0, 0.0]), randn(64, 3, seed=0)
    monitor = diagnostics.CollapseMonitor(every=2, patience=2)
    handle = monitor.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.elbo(x)
    with pytest.warns(diagnostics.CollapseWarning, match="0 of 3 latents"):
        model.elbo(x)
    assert monitor.collapsed and monitor.active == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model.elbo(x)
        with torch.no_grad():
            model.encoder.weight[0, 0] = 1.0
        for _ in range(2):
            model.elbo(x)
        assert not monitor.collapsed and monitor.active == 1
        assert monitor.kl[0].item() == pytest.approx(0.5 * x[:, 0].square().mean().item(), rel=1e-12)
        before = monitor.kl
        model.eval()
        model.elbo(x)
        handle.remove()
        model.train()
        for _ in range(2):
            model.elbo(x)
        assert monitor.kl is before


def test_monitor_counts_a_share_after_warmup():
    messages = []
    monitor = diagnostics.CollapseMonitor(0.75, every=1, patience=1, warmup=2, callback=messages.append)
    kl = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    for _ in range(2):
        monitor.update(kl)
    assert not messages
    monitor.update(kl)
    assert len(messages) == 1 and "2 of 4" in messages[0]
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="^least_active"):
            diagnostics.CollapseMonitor(bad)


class Constant(torch.nn.Module):
    """The same for every x (B, *event)."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, x, context=None):
        return self.value.expand(len(x), *self.value.shape)


def by_label():
    table = torch.nn.Embedding(2, 4, dtype=torch.float64)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([3.0, 3.0, 2.0 * math.log(0.5), 2.0 * math.log(0.5)]))
    return vae.ConditionalGaussianPrior(2, table)


def learned_to(mean, sigma):
    prior = vae.GaussianPrior(2, "std").double()
    with torch.no_grad():
        prior.mean.fill_(mean)
        prior.raw.fill_(sigma)
    return prior


@pytest.mark.parametrize("make", [
    lambda: torch.distributions.Normal(torch.tensor(3.0).double(), 0.5),
    lambda: torch.distributions.Independent(torch.distributions.Normal(torch.full((2,), 3.0).double(), 0.5), 1),
    lambda: learned_to(3.0, 0.5), by_label], ids=["normal", "independent", "learned", "conditional"])
def test_every_look_at_collapse_is_at_the_prior_of_the_model(make):
    """N(3, 0.5^2) under a prior that is the same carries nothing; of what is moved away as much as the rate says."""
    prior = make()
    model = vae.VAE(Constant([3.0, 3.0, 2.0 * math.log(0.5), 2.0 * math.log(0.5)]), lambda z, context=None: z,
                    prior=prior, likelihood=vae.GaussianLikelihood(1.0))
    x = randn(6, 2, seed=0)
    context = torch.arange(6) % 2 if isinstance(prior, vae.ConditionalGaussianPrior) else None
    for mean, active in ((3.0, 0), (4.0, 2)):
        with torch.no_grad():
            model.encoder.value[:2] = mean
        attached, looked = (diagnostics.CollapseMonitor(every=1, patience=9) for _ in range(2))
        handle = attached.attach(model)
        rate = model.elbo(x, context=context).rate.mean()
        handle.remove()
        looked.look(model, x, context, when="now")
        assert attached.active == looked.active == active
        torch.testing.assert_close(attached.kl.sum(), rate)
        torch.testing.assert_close(attached.kl, looked.kl)
        found = diagnostics.diagnose(model, x, context)
        assert found.kl.sum().item() == pytest.approx(found.point.rate, abs=1e-12)
        if context is None:
            torch.testing.assert_close(diagnostics.traversal_grid(model, x).kl.sum(), rate)
            assert found.information.kl.item() == pytest.approx(found.point.rate, abs=6.0 * found.information.kl_error)


def test_a_look_leaves_a_codebook_as_it_is():
    torch.manual_seed(0)
    model = vae.VQVAE((1, 4, 4), 8, 4, (8,)).train()
    x = torch.bernoulli(torch.full((6, 1, 4, 4), 0.4))
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnostics.CollapseMonitor().look(model, x, when="now")
    diagnostics.kl_per_latent(model, x)
    model.codes(x)
    model.reconstruct(x)
    model.interpolate(x, x.flip(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model(x)
    assert not torch.equal(model.quantizer.codebook, before["quantizer.codebook"])


def test_density_ratio_tells_a_shifted_posterior_from_the_prior():
    """N(1, 1) against N(0, 1): KL 1/2, and the best classifier is right Phi(1/2) of the time."""
    q, p = randn(4000, 1, seed=0) + 1.0, randn(4000, 1, seed=1)
    state = torch.get_rng_state()
    found = diagnostics.density_ratio_check(q, p, steps=120)
    assert torch.equal(state, torch.get_rng_state())
    assert found.kl == pytest.approx(0.5, abs=4.0 * found.kl_error) and found.kl_error < 0.04
    assert found.accuracy == pytest.approx(0.5 * (1.0 + math.erf(0.5 / math.sqrt(2.0))), abs=0.03)
    assert found.z_score > 6.0 and found.loss < 2.0 * math.log(2.0)
    same = diagnostics.density_ratio_check(randn(4000, 1, seed=2), p, steps=120)
    assert abs(same.z_score) < 4.0 and -0.1 < same.kl < 4.0 * same.kl_error


@pytest.mark.parametrize(("n", "least"), [(4000, 0.2), (300, -math.inf)], ids=["fitted", "overfitted"])
def test_density_ratio_is_a_lower_bound_in_four_dimensions(n, least):
    """N(0, 1.3^2 I) against N(0, I). Where the classifier knows its 150 samples by heart, its mean logit overrates the
    KL, even on samples that it hasn't seen; the bound does not."""
    kl = 2.0 * (1.69 - 1.0 - math.log(1.69))
    found = [diagnostics.density_ratio_check(1.3 * randn(n, 4, seed=2 * i), randn(n, 4, seed=2 * i + 1), steps=120)
             for i in range(4)]
    assert all(f.kl < kl + 4.0 * f.kl_error for f in found)
    mean, error = sum(f.kl for f in found) / 4, math.sqrt(sum(f.kl_error**2 for f in found)) / 4
    assert least < mean < kl + 2.0 * error


class Discriminator(torch.nn.Module):
    """A small network of two numbers with that part in its middle."""

    def __init__(self, part):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 8), part, torch.nn.SiLU(), torch.nn.Linear(8, 1))

    def forward(self, x):
        self.seen = x
        return self.layers(x)


@pytest.mark.parametrize("part", [torch.nn.BatchNorm1d(8), torch.nn.Dropout()], ids=["batch norm", "dropout"])
def test_density_ratio_judges_in_eval_mode(part, monkeypatch):
    """What it says is what the trained classifier gives in eval mode; no generator has moved, no other was seeded."""
    q, p = (randn(60, 2, seed=seed).float() + 2.0 * (1 - seed) for seed in (0, 1))
    discriminator, seeded = Discriminator(part).train(), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    found = diagnostics.density_ratio_check(q, p, discriminator=discriminator, steps=5)
    assert torch.equal(state, torch.get_rng_state()) and not seeded and discriminator.training and part.training
    discriminator.eval()
    right = (discriminator(q[30:]) > 0).double().mean() + (discriminator(p[30:]) <= 0).double().mean()
    assert found.accuracy == pytest.approx(0.5 * right.item(), abs=1e-12)


def test_density_ratio_of_odd_input():
    q, p = randn(20, 2, seed=0), randn(20, 2, seed=1)
    with torch.inference_mode():
        inside = diagnostics.density_ratio_check(q.clone(), p.clone(), steps=2)
    assert inside == diagnostics.density_ratio_check(q, p, steps=2)
    unknown = diagnostics.density_ratio_check(torch.full_like(q, math.nan), p, steps=2)
    assert math.isnan(unknown.accuracy) and math.isnan(unknown.z_score)
    for options in ({"steps": -1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}"):
            diagnostics.density_ratio_check(q, p, **options)


def test_traversal_ranks_latents_by_kl():
    model, x = selective([0.2, 0.0, 2.0]), randn(200, 3, seed=0)
    grid = diagnostics.traversal_grid(model, x, 2, [-1.0, 0.0, 1.0], index=3)
    assert grid.dims.tolist() == [2, 0] and grid.images.shape == (2, 3, 3)
    torch.testing.assert_close(grid.images[0, :, 2], torch.tensor([-1.0, 0.0, 1.0]).double())
    torch.testing.assert_close(grid.images[0, :, 0], (0.2 * x[3, 0]).expand(3))


def test_report_of_a_semi_supervised_vae_without_all_labels():
    """Unknown labels are the classifier's."""
    torch.manual_seed(0)
    encoder = vae.Conditioned(vae.mlp_encoder((6 + 3,), 2, (8,)), 3, flatten=True)
    decoder = vae.Conditioned(vae.mlp_decoder(2 + 3, (6,), (8,)), 3)
    model = vae.SemiSupervisedVAE(encoder, decoder, torch.nn.Linear(6, 3), 3, latent_shape=2).double()
    x = (randn(30, 6, seed=0) > 0).double()
    likeliest = model.classify(x).argmax(1)
    some = torch.where(torch.arange(30) < 10, (likeliest + 1) % 3, likeliest)
    for given, labels in ((None, likeliest), (torch.where(torch.arange(30) < 10, some, -1), some)):
        found, want = (diagnostics.diagnose(model, x, c, generator=torch.Generator().manual_seed(0))
                       for c in (given, labels))
        assert found.point == want.point and torch.equal(found.kl, want.kl)


def test_report_of_a_gaussian_vae():
    model, x = selective([2.0, 0.0, 1.0]), randn(300, 3, seed=0)
    found = diagnostics.diagnose(model, x, n_dims=2, generator=torch.Generator().manual_seed(0))
    assert model.training
    assert found.active.tolist() == [True, False, True]
    assert found.point.active == 2 and found.point.beta == 1.0
    assert found.kl.sum().item() == pytest.approx(found.point.rate, rel=1e-12)
    assert found.point.elbo == pytest.approx(-found.point.rate - found.point.distortion, rel=1e-12)
    # The aggregate of latent 2 is about N(0, 2): KL (1 - log 2) / 2.
    assert found.marginal_kl[2].item() == pytest.approx(0.5 * (1.0 - math.log(2.0)), abs=0.06)
    assert found.prediction.threshold == pytest.approx(0.25)
    text = found.summary()
    assert "active units 2 of 3" in text and "mutual information" in text and "a linear model keeps 3 of 3" in text
    assert found.bits_per_dim == pytest.approx(-found.point.elbo / (3 * math.log(2.0)))


@pytest.mark.parametrize("options", [{"posterior": lambda: "full"}, {"prior": lambda: vae.MixturePrior((2,), 3)}],
                         ids=["posterior", "prior"])
def test_report_of_other_models(options):
    torch.manual_seed(0)
    model = vae.MLPVAE((6,), 2, (8,), **{name: make() for name, make in options.items()})
    x = torch.randint(0, 2, (400, 6)).float()
    found = diagnostics.diagnose(model, x)
    assert math.isfinite(found.point.elbo) and found.summary()
    assert (found.kl is None) == ("posterior" in options)
    if found.information is not None:
        # The rate estimated with these z's: a normalised aggregate and the mixture prior.
        assert found.information.kl.item() == pytest.approx(found.point.rate, abs=0.5)
    conditional = vae.ConditionalVAE((6,), 2, 3)
    labels = torch.arange(len(x)) % 3
    found = diagnostics.diagnose(conditional, x, labels)
    assert found.kl is not None and found.traversal is None
    with pytest.raises(ValueError, match="^x: expected at least one example, got none"):
        diagnostics.diagnose(model, x[:0])


@pytest.mark.parametrize("make", [
    lambda: vae.MLPVAE((1, 8, 8), 2, (8,), likelihood="gaussian"),
    lambda: vae.DiscreteVAE(vae.mlp_encoder((1, 8, 8), 3, (8,), n_params=3), vae.mlp_decoder(3, (1, 8, 8), (8,)), 3),
    lambda: vae.VDVAE((1, 8, 8), (1, 1), channels=8, latent_channels=2),
    lambda: vae.VQVAE((1, 8, 8), 4, 2, (4,))], ids=["gaussian", "discrete", "hierarchical", "quantised"])
def test_report_of_one_example(make):
    """What several are needed for is left out; the bound and the KLs are those of the example."""
    torch.manual_seed(0)
    model, x = make(), torch.bernoulli(torch.full((1, 1, 8, 8), 0.4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnostics.diagnose(model, x)
    assert math.isfinite(found.point.elbo) and found.kl.isfinite().all()
    assert found.information is None and found.prediction is None
    assert (found.active is None) == (not isinstance(model, vae.HierarchicalVAE))
    text = found.summary()
    assert "1 example of 64 numbers" in text and "is left out" in text and "nan" not in text


def test_a_moved_z_is_not_taken_for_its_start():
    """Of a Hamiltonian VAE nothing is said of the encoder's Gaussian, which z left."""
    torch.manual_seed(0)
    plain, x = vae.MLPVAE((6,), 2, (8,)), torch.bernoulli(torch.full((20, 6), 0.3))
    model = vae.HamiltonianVAE(plain.encoder, plain.decoder)
    found = diagnostics.diagnose(model, x)
    assert math.isfinite(found.point.elbo) and found.point.active is None and "mutual" not in found.summary()
    assert found.kl is None and found.information is None and diagnostics.kl_per_latent(model, x) is None
    for call in (lambda: diagnostics.posterior_moments(model, x), lambda: diagnostics.CollapseMonitor().attach(model)):
        with pytest.raises(TypeError, match="^model: .* HamiltonianVAE"):
            call()


def test_numbers_that_are_not_finite_are_no_collapse():
    model, x = vae.MLPVAE((6,), 2, (8,)), torch.bernoulli(torch.full((20, 6), 0.3))
    with torch.no_grad():
        model.encoder[-1].weight.fill_(math.nan)
    text, warned = diagnostics.diagnose(model, x).summary(), []
    assert "collapse" not in text and "not finite" in text
    diagnostics.CollapseMonitor(patience=1, callback=warned.append).look(model, x, when="2 steps")
    assert len(warned) == 1 and warned[0].startswith("2 of 2 latents have a KL that is not finite after 2 steps")


def test_a_monitor_counts_no_draws_of_a_vamp_prior():
    model, x = vae.VampVAE((6,), 2, n_components=3, sizes=(8,)), torch.bernoulli(torch.full((20, 6), 0.3))
    monitor, alone = (diagnostics.CollapseMonitor(every=1, patience=9) for _ in range(2))
    monitor.attach(model)
    model.sample(5)
    assert monitor.kl is None
    model(x)
    alone.look(model, x, when="now")
    torch.testing.assert_close(monitor.kl, alone.kl)
    with pytest.raises(ValueError, match=r"^kl: expected shape \(B, D\)"):
        monitor.update(torch.zeros(3))


def test_a_generator_is_the_only_one_that_a_hierarchys_report_draws_from():
    torch.manual_seed(0)
    model, x = vae.HVAE((6,), (2, 3), 8), torch.bernoulli(torch.full((20, 6), 0.3))
    state = torch.get_rng_state()
    found = diagnostics.diagnose(model, x, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state, torch.get_rng_state()) and found.level_sizes == (2, 3)


@pytest.mark.parametrize("call", [diagnostics.diagnose, diagnostics.rate_distortion])
def test_a_model_without_a_bound_is_named(call):
    with pytest.raises(TypeError, match="^model: expected one with elbo, .* got Linear"):
        call(torch.nn.Linear(2, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("name", ["max_examples", "batch_size", "n_samples", "n_dims"])
def test_bad_counts_are_named(name):
    with pytest.raises(ValueError, match=f"^{name}"):
        diagnostics.diagnose(vae.MLPVAE((6,), 2, (8,)), torch.zeros(3, 6), **{name: 0})


def test_what_looks_at_a_model_leaves_every_part_in_its_mode(tmp_path):
    """A part that is kept in eval mode while the rest trains, as a pretrained encoder with batch statistics is."""
    model = vae.MLPVAE((6,), 2, (8,)).train()
    model.encoder.eval()
    x = torch.bernoulli(torch.full((8, 6), 0.4))

    def look():
        with aside(model, torch.device("cpu"), seed=0):
            assert not any(module.training for module in model.modules())

    calls = [look, lambda: diagnostics.diagnose(model, x), lambda: export(model, tmp_path / "one", "torch_export")]
    if importlib.util.find_spec("constriction"):
        calls.append(lambda: diagnostics.BitsBack(model).encode(x))
    for call in calls:
        call()
        assert model.training and model.decoder.training
        assert not any(module.training for module in model.encoder.modules())
