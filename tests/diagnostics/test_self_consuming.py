"""Chains of models trained on their own samples, against the recursion of their moments."""

import math

import pytest
import torch

from fastflow import diagnostics, vae
from fastflow.diagnostics import GaussianChain

CHAINS = 20000


def simulate(n, fraction, generations, temperature=1.0, seed=0):
    """(generations + 1, 2, CHAINS): mean and variance; the chains run side by side, as features of the data."""
    generator = torch.Generator().manual_seed(seed)

    def normal(m):
        return torch.randn(m, CHAINS, generator=generator, dtype=torch.float64)

    def fit(x):
        return torch.stack([x.mean(0), x.var(0, correction=0)])

    def sample(model, m):
        return model[0] + temperature * model[1].sqrt() * normal(m)

    chain = diagnostics.self_consuming_chain(fit, sample, normal, n, generations, fresh_fraction=fraction)
    return torch.stack(chain.models)


@pytest.mark.parametrize("fraction, temperature", [(0.0, 1.0), (0.3, 1.0), (0.2, 1.2), (1.0, 1.0)])
def test_simulated_chain_has_the_moments_of_the_recursion(fraction, temperature):
    models = simulate(10, fraction, 8, temperature)
    expected = GaussianChain(10, fresh_fraction=fraction, temperature=temperature).expected(8)
    for column, values in enumerate((models[:, 1], models[:, 0].square())):
        error = values.std(1) / math.sqrt(CHAINS)
        assert ((values.mean(1) - expected[:, column]).abs() < 4.0 * error).all()
        # A recursion without the correction for the fitted mean, n for n - 1, would be seen.
    if fraction == 0.0:
        assert (models[8, 1].mean() - 1.0).abs() > 20.0 * models[8, 1].std() / math.sqrt(CHAINS)


def test_variance_decays_by_the_closed_form():
    chain = GaussianChain(100)
    assert chain.decay == pytest.approx(0.99, abs=1e-15)
    assert chain.expected(500)[500, 0] / chain.expected(0)[0, 0] == pytest.approx(0.00657, abs=1e-5)
    assert chain.log_drift(unbiased=True) == pytest.approx(-0.010135, abs=1e-6)
    assert not chain.settles and chain.limit()[0] == 0.0
    assert chain.limit()[1] == pytest.approx(chain.expected(5000)[-1, 1].item(), rel=1e-9)
    log_v = simulate(10, 0.0, 8)[:, 1].log()
    drift = (log_v[8] - log_v[0]) / 8
    assert (drift.mean() - GaussianChain(10).log_drift()).abs() < 4.0 * drift.std() / math.sqrt(CHAINS)


def test_fresh_data_prevents_divergence():
    n, temperature = 50, 1.1
    assert GaussianChain(n, temperature=temperature).decay > 1.0
    assert GaussianChain(n, temperature=temperature).limit() == (math.inf, math.inf)
    boundary = 1.0 - 1.0 / (temperature**2 * (1.0 - 1.0 / n))  # of the decay; the mean's share in it is small
    low = GaussianChain(n, fresh_fraction=boundary - 0.04, temperature=temperature)
    high = GaussianChain(n, fresh_fraction=boundary + 0.04, temperature=temperature)
    assert low.rate > 1.0 and not low.settles and high.settles and high.rate < 1.0
    assert low.expected(400)[-1, 0] > low.expected(200)[-1, 0] > 10.0
    torch.testing.assert_close(high.expected(4000)[-1], torch.tensor(high.limit(), dtype=torch.float64))
    least = GaussianChain.least_fresh_fraction(n, 0.05)
    before = GaussianChain(n, fresh_fraction=least - 1.0 / n).limit()[0]
    assert GaussianChain(n, fresh_fraction=least).limit()[0] >= 0.95 * (1 - 1 / n) > before
    assert GaussianChain(n, fresh_fraction=1.0).limit()[0] == pytest.approx(1 - 1 / n, rel=1e-12)


def test_chain_of_vaes_loses_variance_without_fresh_data():
    """Linear VAEs in closed form: probabilistic PCA with one latent, fitted by its eigenvectors."""
    generator = torch.Generator().manual_seed(0)

    def fresh(m):
        return torch.randn(m, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 0.5, 0.5]).double()

    def fit(x):
        values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
        s2 = values[:2].mean()
        return x.mean(0), vectors[:, 2] * (values[2] - s2).sqrt(), s2

    def sample(model, m):
        z, e = (torch.randn(m, k, generator=generator, dtype=torch.float64) for k in (1, 3))
        return model[0] + z * model[1] + model[2].sqrt() * e

    def variance(model):
        return (model[1].square().sum() + 3 * model[2]).item()

    alone = diagnostics.self_consuming_chain(fit, sample, fresh, 20, 150, measure=variance)
    mixed = diagnostics.self_consuming_chain(fit, sample, fresh, 20, 150, fresh_fraction=0.5, measure=variance)
    assert len(alone.figures) == 151
    assert alone.figures[-1] < 0.1 * 4.5 < 0.5 * 4.5 < mixed.figures[-1]


def test_augment_mixes_to_the_ratio():
    model = vae.MLPVAE((4,), 2, (8,))
    x = torch.randint(0, 2, (30, 4)).float()
    mixed, synthetic = diagnostics.augment(model, x, 0.25, generator=torch.Generator().manual_seed(0))
    assert mixed.shape == (40, 4) and int(synthetic.sum()) == 10
    assert torch.equal(mixed[~synthetic], x) and ((mixed == 0) | (mixed == 1)).all()
    whole, none = diagnostics.augment(model, x, 0.0)
    assert torch.equal(whole, x) and not none.any()
    conditional = vae.ConditionalVAE((4,), 2, 3)
    mixed, _ = diagnostics.augment(conditional, x, 0.25, context=torch.arange(10) % 3)
    assert mixed.shape == (40, 4)
    with pytest.raises(ValueError, match="^ratio: "):
        diagnostics.augment(model, x, 1.0)
    with pytest.raises(ValueError, match="^context: expected 10"):
        diagnostics.augment(conditional, x, 0.25, context=torch.arange(3))


class Draws:
    """A model whose samples are these."""

    def __init__(self, *values, dtype=torch.float32):
        self.values = torch.tensor(values, dtype=dtype)

    def sample(self, n, **_):
        return self.values.expand(n, -1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_augment_makes_no_integers_of_what_is_none(dtype):
    x = torch.ones(4, 2, dtype=dtype)
    mixed, synthetic = diagnostics.augment(Draws(1.0, 0.0), x, 0.5)
    assert mixed.dtype == dtype and torch.equal(mixed[synthetic], torch.tensor([[1, 0]] * 4, dtype=dtype))
    for values, into in ((Draws(0.4, 1.0), dtype), (Draws(math.nan, 1.0), dtype), (Draws(-1.0, 1.0), torch.uint8),
                         (Draws(256, 1, dtype=torch.int64), torch.uint8), (Draws(2.0, 1.0), torch.bool)):
        with pytest.raises(ValueError, match=f"^model.sample's result: expected whole numbers within {into}"):
            diagnostics.augment(values, x.to(into), 0.5)
    assert diagnostics.augment(Draws(0.4, -1.0), x.float(), 0.5)[0].dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="^n: "):
        GaussianChain(1)
    with pytest.raises(ValueError, match="^generations: "):
        GaussianChain(5).expected(-1)
    with pytest.raises(ValueError, match="^fresh_fraction: "):
        GaussianChain(5, fresh_fraction=1.5)
    with pytest.raises(ValueError, match="^log_drift: "):
        GaussianChain(5, fresh_fraction=0.4).log_drift()
