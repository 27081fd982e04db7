"""Priors: normalised, sampled as they say, and at home in a VAE."""

import copy
import io
import itertools
import math

import pytest
import torch
from gaussian_models import PPCA, perturb, randn
from torch import nn
from torch.distributions import Categorical, Independent, Laplace, MixtureSameFamily, MultivariateNormal, Normal

from fastflow import flows, vae

AXIS = torch.linspace(-9, 9, 361, dtype=torch.float64)
PLANE = torch.cartesian_prod(AXIS, AXIS)


def vamp(n_components=4):
    """A VampPrior in a VAE of linear networks, over two latents."""
    problem = PPCA(3, 2)
    prior = vae.VampPrior(randn(n_components, 3, seed=1)).double()
    model = vae.VAE(problem.encoder(torch.tensor([-0.5, 0.3], dtype=torch.float64)), problem.decoder(), prior=prior,
                    likelihood="gaussian").double()
    return prior, model, problem


PRIORS = {
    "gaussian": lambda: perturb(vae.GaussianPrior((2,)).double()),
    "mixture": lambda: perturb(vae.MixturePrior(2, 3).double()),
    "vamp": lambda: vamp()[0],
    "autoregressive": lambda: perturb(vae.AutoregressivePrior(2, 3, (8,), activation=nn.SiLU).double(), 0.15),
    "reordered": lambda: perturb(vae.AutoregressivePrior(2, 2, (8, 8), order=[1, 0], activation=nn.SiLU).double(),
                                 0.15),
    "maf": lambda: perturb(flows.MAF(2, n_layers=2, hidden=(8,), actnorm=False, activation=nn.SiLU).double(), 0.1),
}


@pytest.mark.parametrize("name", PRIORS)
def test_integrates_to_one_and_samples_have_its_moments(name):
    """The moments by the same quadrature, the samples within 4 standard errors of them."""
    prior = PRIORS[name]()
    with torch.no_grad():
        mass = prior.log_prob(PLANE).exp() * (AXIS[1] - AXIS[0]) ** 2
    assert abs(mass.sum() - 1) < 1e-6
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    z = prior.sample(n, generator=generator).detach()
    for moment in (lambda z: z, lambda z: z.square(), lambda z: z.prod(1, keepdim=True)):
        values = moment(z)
        assert ((values.mean(0) - (mass[:, None] * moment(PLANE)).sum(0)).abs()
                < 4.5 * values.std(0) / math.sqrt(n)).all()
    assert torch.equal(prior.sample(3, generator=generator.manual_seed(5)),
                       prior.sample(3, generator=generator.manual_seed(5)))


def test_mixture_agrees_with_torch():
    prior = perturb(vae.MixturePrior((2, 3), 4).double())
    components = Independent(Normal(prior.mean, prior.log_sigma.exp()), 2)
    expected = MixtureSameFamily(Categorical(logits=prior.logits), components)
    z = randn(5, 2, 3, seed=1)
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z))
    assert prior.sample(0).shape == (0, 2, 3)
    cold = prior.sample(50, temperature=0.0)
    assert (cold[:, None] == prior.mean).flatten(2).all(2).any(1).all()


def test_autoregressive_starts_at_the_standard_normal_and_depends_on_what_came_before():
    z = randn(6, 3, seed=0)
    start = vae.AutoregressivePrior(3, 1).double()
    torch.testing.assert_close(start.log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(1))
    prior = perturb(vae.AutoregressivePrior(3, 2, (8,), order=[2, 0, 1]).double())
    z.requires_grad_()
    params = prior.network(z).unflatten(1, (3, 6)).sum(2)
    seen = torch.stack([torch.autograd.grad(params[:, i].sum(), z, retain_graph=True)[0].abs().sum(0) > 0
                        for i in range(3)])
    assert seen.tolist() == [[False, False, True], [True, False, True], [False, False, False]]


def test_vamp_is_the_mixture_of_posteriors():
    prior, model, problem = vamp(4)
    params = model.encoder(prior.inputs)
    mean, log_variance = params.chunk(2, 1)
    components = MultivariateNormal(mean, torch.diag_embed(log_variance.exp()))
    expected = MixtureSameFamily(Categorical(torch.ones(4, dtype=torch.float64)), components)
    z = randn(6, 2, seed=3)
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z))
    cold, warm = (prior.sample(40, generator=torch.Generator().manual_seed(0), temperature=t) for t in (0.0, 0.5))
    assert all((mean == z).all(1).any() for z in cold)
    full = prior.sample(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warm, 0.5 * (cold + full))
    # With the data themselves as pseudo-inputs the prior is the aggregate posterior: KL is the mutual information.
    prior = vae.VampPrior(problem.x, trainable=False)
    model = vae.VAE(model.encoder, model.decoder, prior=prior, likelihood="gaussian").double()
    bound = model(problem.x, n_samples=20_000, seed=0)
    mutual = bound.kl.mean()
    assert 0 < mutual < math.log(len(problem.x))
    assert not any(p.requires_grad for p in prior.parameters())


def test_vamp_shares_the_models_networks():
    """One copy in the state dict, gradients to encoder and pseudo-inputs, and a deep copy stands on its own."""
    prior, model, problem = vamp()
    assert [name for name in model.state_dict() if name.startswith("prior")] == ["prior.inputs"]
    model(problem.x).elbo.sum().backward()
    assert prior.inputs.grad.abs().sum() > 0 and model.encoder.weight.grad.abs().sum() > 0
    copied, z = copy.deepcopy(model), randn(3, 2, seed=0)
    before = model.prior.log_prob(z)
    with torch.no_grad():
        copied.encoder.bias.add_(1.0)
    torch.testing.assert_close(model.prior.log_prob(z), before)
    assert not torch.allclose(copied.prior.log_prob(z), before)
    bounded = vae.VampPrior(torch.full((2, 3), 0.5), bounds=(0, 1))
    with torch.no_grad():
        bounded.inputs.add_(9.0)
    assert torch.equal(bounded.pseudo_inputs(), torch.ones(2, 3))


def test_vamp_follows_its_model_alone():
    """It uses the encoder and posterior that the model has now, and belongs to no second model, which would have other
    ones; copies and stored models have priors of their own."""
    prior, model, problem = vamp()
    z = randn(3, 2, seed=0)
    before = prior.log_prob(z)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    others = copy.deepcopy(model), torch.load(stored, weights_only=False)
    with pytest.raises(ValueError, match="^prior: expected a VampPrior for this model alone"):
        vae.VAE(nn.Linear(3, 4).double(), model.decoder, prior=prior, likelihood="gaussian")
    torch.testing.assert_close(prior.log_prob(z), before)
    model.encoder = nn.Linear(model.encoder.in_features, 4).double()
    mean, log_variance = model.encoder(prior.inputs).chunk(2, 1)
    each = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z[:, None]).sum(2)
    torch.testing.assert_close(prior.log_prob(z), each.logsumexp(1) - math.log(len(mean)))
    for other in others:
        torch.testing.assert_close(other.prior.log_prob(z), before)


def test_code_prior_sums_to_one():
    prior = perturb(vae.CodePrior(3, hidden=6, n_layers=2).double())
    sequences = torch.tensor(list(itertools.product(range(3), repeat=4)))
    p = prior.log_prob(sequences.view(-1, 2, 2)).exp()
    assert abs(p.sum() - 1) < 1e-12 and p.std() > 1e-3
    n = 20_000
    drawn = prior.sample(n, (2, 2), generator=torch.Generator().manual_seed(0)).flatten(1)
    frequency = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81) / n
    assert ((frequency - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt()).all()
    # Beyond its receptive field of 4 a code is forgotten, and a long sample sees no more than that either.
    long = torch.zeros(1, 7, dtype=torch.int64)
    changed = torch.cat([torch.full_like(long[:, :1], 2), long[:, 1:]], 1)
    given = [prior._logits(c)[0, :] for c in (long, changed)]
    differs = (given[0] - given[1]).abs().amax(1) > 1e-12
    assert differs.tolist() == [True] * 4 + [False] * 3
    greedy = prior.sample(1, (9,), temperature=0.0)
    before = torch.cat([torch.tensor([[3]]), greedy[:, :-1]], 1)
    assert torch.equal(prior._logits(before).argmax(2), greedy)
    uniform = vae.CodePrior(5)
    torch.testing.assert_close(uniform.log_prob(torch.randint(0, 5, (2, 3, 3))), torch.full((2,), -9 * math.log(5)))
    assert torch.equal(prior.sample(2, (3,), temperature=0.0), prior.sample(2, (3,), temperature=0.0))


@pytest.mark.parametrize("name", ["mixture", "autoregressive", "maf", "logistic"])
def test_monte_carlo_kl_in_a_vae(name):
    """The mean of log q - log p at the samples; gradients reach the prior."""
    prior = flows.StandardLogistic(2).double() if name == "logistic" else PRIORS[name]()
    problem = PPCA(3, 2)
    model = vae.VAE(problem.encoder(torch.zeros(2, dtype=torch.float64)), problem.decoder(), prior=prior,
                    likelihood=vae.GaussianLikelihood(0.7))
    bound = model(problem.x, n_samples=3, seed=1)
    z = model.infer(problem.x, 3, seed=1).z
    torch.testing.assert_close(bound.log_pz, prior.log_prob(z.flatten(0, 1)).view(3, -1))
    torch.testing.assert_close(bound.kl, (bound.log_qz - bound.log_pz).mean(0))
    bound.elbo.sum().backward()
    assert all(p.grad is not None for p in prior.parameters()) and model.sample(4).shape == (4, 3)


def test_conditional_prior_has_an_analytic_kl():
    """One Gaussian for each label, the same as each label's own GaussianPrior."""
    table = nn.Embedding(3, 4).double()
    prior, problem = vae.ConditionalGaussianPrior(2, table), PPCA(3, 2)
    encoder, decoder = problem.encoder(torch.zeros(2, dtype=torch.float64)), problem.decoder()

    class Ignore(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, context):
            return self.network(x)

    model = vae.VAE(Ignore(encoder), Ignore(decoder), prior=prior, likelihood=vae.GaussianLikelihood(0.7))
    labels = torch.tensor([2, 0, 1, 2])
    bound = model.elbo(problem.x, 3, context=labels, kl="analytic", seed=0)
    for row, label in enumerate(labels):
        own = vae.GaussianPrior(2).double()
        with torch.no_grad():
            own.mean.copy_(table.weight[label, :2])
            own.raw.copy_(table.weight[label, 2:])
        plain = vae.VAE(encoder, decoder, prior=own, likelihood=vae.GaussianLikelihood(0.7))
        noise = model.infer(problem.x, 3, context=labels, seed=0).z
        torch.testing.assert_close(bound.kl[row], plain(problem.x).kl[row])
        torch.testing.assert_close(bound.log_pz[:, row], own.log_prob(noise[:, row]))
    assert model.sample(5, labels).shape == (5, 4, 3)
    with pytest.raises(ValueError, match="context"):
        model.sample(5)


@pytest.mark.parametrize("make", [lambda: Normal(0.0, 2.0), lambda: Laplace(1.0, 2.0)], ids=["normal", "laplace"])
def test_a_prior_of_one_number_is_that_of_every_element(make):
    """Samples have the shape that the bound had, whether that is known from it or from the decoder."""
    model, law = vae.MLPVAE((4,), 3, (8,), prior=make()), make()
    z = model.sample_latents(20_000, generator=torch.Generator().manual_seed(0))
    assert z.shape == (20_000, 3)
    torch.testing.assert_close(z.mean(0), law.mean.expand(3), rtol=0, atol=4 * law.stddev.item() / 20_000**0.5)
    torch.testing.assert_close(torch.corrcoef(z.T), torch.eye(3), rtol=0, atol=4 / 20_000**0.5)
    x = torch.rand(5, 4)
    inference = model.infer(x, 2, seed=0)
    torch.testing.assert_close(model.elbo(x, 2, seed=0).log_pz, law.log_prob(inference.z).sum(2))
    assert model.sample(2).shape == (2, 4)
    images = vae.VAE(nn.Conv2d(1, 2, 2, 2), nn.ConvTranspose2d(1, 1, 2, 2), prior=make())
    with pytest.raises(ValueError, match="^latent_shape: the shape of z is not known yet"):
        images.sample(2)
    images.elbo(torch.rand(2, 1, 4, 6))
    assert images.sample_latents(3).shape == (3, 1, 2, 3) and images.sample(3).shape == (3, 1, 4, 6)


@pytest.mark.parametrize("make", [
    lambda: vae.MixturePrior(1), lambda: vae.MixturePrior(2), lambda: vae.GaussianPrior(1, "std"),
    lambda: vae.GaussianPrior(2, "std"), lambda: vae.AutoregressivePrior(2), lambda: Normal(torch.zeros(1), 2.0),
    lambda: Normal(torch.zeros(2), 2.0), lambda: Laplace(torch.zeros(1), 2.0), lambda: flows.DiagonalNormal(1),
    lambda: flows.DiagonalNormal(2), lambda: flows.FullNormal(1), lambda: flows.StudentT(2),
    lambda: MultivariateNormal(torch.zeros(1), torch.eye(1))])
def test_a_prior_of_another_shape_is_named(make):
    x, wanted = torch.rand(5, 4), r"^prior: expected one over \(3,\), the shape of z, got \([12],\)"
    for call in (lambda model: model.elbo(x), lambda model: model(x, loss_only=True).value,
                 lambda model: model.elbo(x, kl="monte_carlo"), lambda model: (model.encode(x), model.sample(2))):
        with pytest.raises(ValueError, match=wanted):
            call(vae.MLPVAE((4,), 3, (8,), prior=make()))


class Foreign(nn.Module):
    """A flow as other libraries have it: its sample takes a number alone, and may give the density too."""

    def __init__(self, pair):
        super().__init__()
        self.scale, self.pair = nn.Parameter(torch.tensor(2.0)), pair

    def log_prob(self, z):
        return Normal(0.0, self.scale).log_prob(z).sum(1)

    def sample(self, num_samples=1):
        z = self.scale * torch.randn(num_samples, 3)
        return (z, self.log_prob(z)) if self.pair else z


@pytest.mark.parametrize("pair", [False, True])
def test_a_flow_of_another_library_is_sampled(pair):
    prior = Foreign(pair)
    model = vae.VAE(vae.mlp_encoder((4,), 3, (8,)), vae.mlp_decoder(3, (4,), (8,)), prior=prior)
    model(torch.rand(5, 4)).elbo.sum().backward()
    assert prior.scale.grad is not None and model.sample(6).shape == (6, 4)
    first, second = (model.sample_latents(6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, model.sample_latents(6))
    with pytest.raises(ValueError, match="^temperature: expected 1 for the prior Foreign, whose sample takes none"):
        model.sample(2, temperature=0.5)


def test_conditional_flow_prior():
    flow, problem = perturb(flows.RealNVP(2, n_layers=2, context_features=1).double(), 0.1), PPCA(3, 2)
    make = lambda n: vae.Conditioned(nn.Linear(n + 1, 4 if n == 3 else 3).double())  # noqa: E731
    model = vae.VAE(make(3), make(2), prior=flow, conditional_prior=True, likelihood="gaussian")
    context = randn(4, 1, seed=0)
    bound = model.elbo(problem.x, 2, context=context, seed=0)
    z = model.infer(problem.x, 2, context=context, seed=0).z
    torch.testing.assert_close(bound.log_pz[1], flow.log_prob(z[1], context))
    assert model.sample(3, context).shape == (3, 4, 3)


@pytest.mark.parametrize("law", [torch.distributions.Normal(0.0, 1.0),
                                 torch.distributions.Laplace(torch.zeros(2), torch.ones(2)),
                                 torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))])
def test_laws_of_torch_follow_the_model_to_float64(law):
    model = vae.MLPVAE((3,), 2, (4,), prior=law, likelihood="gaussian").double()
    assert model.elbo(randn(4, 3, seed=0)).elbo.dtype == torch.float64
    assert model.sample(3).dtype == torch.float64


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.MixturePrior(2, 0), "n_components"),
    (ValueError, lambda: vae.VampPrior(torch.zeros(3)), "inputs"),
    (ValueError, lambda: vae.VampPrior(torch.zeros(3, 2), bounds=(1, 0)), "bounds"),
    (ValueError, lambda: vae.VampPrior(torch.full((3, 2), 1.5), bounds=(0.0, 1.0)), "inputs"),
    (RuntimeError, lambda: vae.VampPrior(torch.zeros(3, 2)).log_prob(torch.zeros(1, 2)), "VAE"),
    (ValueError, lambda: vae.VampVAE((4,), 2, n_components=3, sizes=(4,), posterior="full").sample(2, temperature=0.5),
     "temperature"),
    (ValueError, lambda: vae.AutoregressivePrior(2, 0), "n_components"),
    (ValueError, lambda: vae.AutoregressivePrior(2).log_prob(torch.zeros(3, 1)), "z"),
    (ValueError, lambda: vae.CodePrior(1), "n_codes"),
    (TypeError, lambda: vae.CodePrior(3).log_prob(torch.zeros(2, 3)), "codes"),
    *((ValueError, lambda codes=codes: vae.CodePrior(3).log_prob(torch.tensor(codes)), "^codes: expected labels")
      for codes in ([[3, 0]], [[0, 3]], [[-1, 0]], [-100])),
    (ValueError, lambda: vae.GaussianPrior(-1), "^latent_shape: expected an int >= 1, got -1"),
    *((error, lambda make=make, z=z: make().log_prob(z), f"^z: {words}")
      for make in (lambda: vae.GaussianPrior(2), lambda: vae.MixturePrior(2), lambda: vae.AutoregressivePrior(2))
      for error, z, words in ((TypeError, 3, "expected a torch.Tensor, got int"),
                              (TypeError, torch.zeros(3, 2).double(), "expected torch.float32 like the prior"),
                              (ValueError, torch.zeros(3, 2, device="meta"), "expected device cpu like the prior"))),
    *((TypeError, lambda make=make: make().sample(2, generator=3), "^generator: expected a torch.Generator, got int")
      for make in (lambda: vae.GaussianPrior(2), lambda: vae.MixturePrior(2), lambda: vae.AutoregressivePrior(2),
                   lambda: vae.BitPrior(2), lambda: vae.VampVAE((4,), 2, n_components=3, sizes=(4,)).prior)),
    (TypeError, lambda: vae.ConditionalGaussianPrior(2, torch.nn.Embedding(3, 4)).given(3), "^context: expected a"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
