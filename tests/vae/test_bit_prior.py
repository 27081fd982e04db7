"""The autoregressive prior of bits, and the discrete VAE under it, against sums over all bits in float64."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from fastflow import diagnostics, vae

X = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
D = 3
EVERY = torch.tensor(list(itertools.product((0.0, 1.0), repeat=D)), dtype=torch.float64)


def prior(seed=0):
    torch.manual_seed(seed)
    made = vae.BitPrior(D, (8,)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def model(estimator):
    torch.manual_seed(7)
    made = vae.DiscreteVAE(nn.Linear(4, D), nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 4)), D,
                           estimator=estimator, prior="autoregressive").double()
    made.bit_prior = prior()
    return made


def terms(made):
    """log p(x | z), log p(z), log q(z | x) of every z, (S,)."""
    log_px = -binary_cross_entropy_with_logits(made.decoder(EVERY), X.expand(len(EVERY), 4), reduction="none").sum(1)
    log_qz = -binary_cross_entropy_with_logits(made.encoder(X).expand_as(EVERY), EVERY, reduction="none").sum(1)
    return log_px, made.bit_prior.log_prob(EVERY[None])[0], log_qz


def enumerated(made, beta):
    log_px, log_pz, log_qz = terms(made)
    return (log_qz.exp() * (log_px + beta * (log_pz - log_qz))).sum()


def gradient(made, value):
    parameters = [p for p in made.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


def test_the_prior_is_normalised_and_starts_uniform():
    torch.testing.assert_close(prior().log_prob(EVERY[None]).exp().sum(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(vae.BitPrior((1, 3)).log_prob(torch.ones(2, 5, 1, 3)),
                               -3 * torch.full((2, 5), 2.0).log())


def test_samples_have_the_priors_law():
    """Each of the 8 states, and of logits divided by the temperature; at 0 the likelier bit each time."""
    made, n = prior(1), 40_000
    for temperature in (1.0, 0.5):
        drawn = made.sample(n, generator=torch.Generator().manual_seed(0), temperature=temperature)
        index = (drawn @ torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)).long()
        logits = made.given(EVERY).logits / temperature
        expected = torch.exp(-binary_cross_entropy_with_logits(logits, EVERY, reduction="none").sum(1))
        error = (index.bincount(minlength=8) / n - expected).abs()
        assert (error < 4.5 * (expected * (1.0 - expected) / n).sqrt()).all()
    cold = made.sample(4, temperature=0.0)
    assert torch.equal(cold, (made.given(cold).logits > 0).double())


def test_enumeration_is_the_elbo():
    made = model("enumeration")
    for beta in (1.0, 0.3):
        bound = made(X, beta=beta)
        torch.testing.assert_close(bound.elbo[0], enumerated(made, beta), rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient(made, bound.elbo.sum()), gradient(made, enumerated(made, beta)), rtol=0,
                                   atol=1e-12)
        torch.testing.assert_close(-bound.distortion - beta * bound.rate, bound.elbo)


@pytest.mark.parametrize("estimator", ["disarm", "rloo", "vimco"])
def test_the_bound_and_its_gradient_are_unbiased(estimator):
    """Within 4.5 standard errors of the enumerated ones (of VIMCO's K = 2 bound, of log_w's mean)."""
    made, n = model(estimator), 4000
    torch.manual_seed(0)
    bound = made(X.expand(n, 4), 2, 0.7)
    log_px, log_pz, log_qz = terms(made)
    rate = (log_qz.exp() * (log_qz - log_pz)).sum()
    weight = (log_qz.exp() * (log_px + log_pz - log_qz)).sum()
    for values, expected in ((bound.rate, rate), (bound.log_w.mean(0), weight)):
        assert abs(values.mean() - expected) < 4.5 * values.std() / n**0.5
    if estimator != "vimco":
        assert abs(bound.elbo.mean() - enumerated(made, 0.7)) < 4.5 * bound.elbo.std() / n**0.5
        parts = torch.stack([gradient(made, made(X.expand(100, 4), 2, 0.7).elbo.mean()) for _ in range(40)])
        error = parts.std(0) / 40**0.5
        assert ((parts.mean(0) - gradient(made, enumerated(made, 0.7))).abs() < 4.5 * error + 1e-12).all()


def test_evaluation_and_diagnosis():
    """Without gradients the rate is that at the samples; the KLs of the bits sum to it."""
    made = model("disarm").eval()
    with torch.no_grad():
        bound = made(X.expand(2000, 4), 3)
    torch.testing.assert_close(bound.elbo, -bound.distortion - bound.rate)
    torch.testing.assert_close(bound.distortion, -bound.log_px_z.mean(0))
    _, log_pz, log_qz = terms(made)
    rate = (log_qz.exp() * (log_qz - log_pz)).sum()
    assert abs(bound.rate.mean() - rate) < 4.5 * bound.rate.std() / 2000**0.5 + 1e-12
    each = diagnostics.kl_per_latent(made, X.expand(4000, 4), generator=torch.Generator().manual_seed(0))
    assert each.shape == (D,) and abs(each.sum() - rate) < 0.05 * rate
    found = diagnostics.diagnose(made, X.expand(50, 4))
    assert found.information.mutual_information.abs() < 1e-6 and "bit" in found.summary()


def test_errors():
    with pytest.raises(ValueError, match="prior: 'autoregressive' is for bits, got 3 classes"):
        vae.DiscreteVAE(nn.Identity(), nn.Identity(), 2, 3, prior="autoregressive")
    with pytest.raises(ValueError, match="b: expected shape"):
        prior().given(torch.zeros(2, D + 1, dtype=torch.float64))
