"""Terms of the rate and of the information as objectives: what the training step takes is what the functions give."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gaussian_models import linear, perturb, randn
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow import estimators, vae
from fastflow.engine import TrainStep

X, K = randn(5, 3, seed=0), 3


def mlp(objective=None, **options):
    torch.manual_seed(0)
    return vae.MLPVAE((3,), 2, (4,), likelihood=vae.GaussianLikelihood(0.7), objective=objective, **options).double()


def ladder(objective=None):
    torch.manual_seed(0)
    return perturb(vae.HVAE((3,), (2, 3), 4, likelihood=vae.GaussianLikelihood(0.7), objective=objective).double())


def drawn(model, beta=1.0, **given):
    """(inference, ELBO) with the noise of seed 1."""
    torch.manual_seed(1)
    inference = model.infer(X, K, **given)
    return inference, model.elbo_of(X, inference, beta, **given)


def check_training(model, expected, context=None, beta=1.0):
    """Of the same noise a step's loss is minus the mean of ``expected`` (B,), its gradient that of the same."""
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(-expected.mean(), parameters, allow_unused=True, materialize_grads=True)
    step = TrainStep(model, torch.optim.SGD(parameters, 1.0), n_samples=K, beta=beta)
    torch.manual_seed(1)
    torch.testing.assert_close(step(X, context), -expected.mean().detach())
    for p, old, gradient in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(old - p, gradient, rtol=1e-9, atol=1e-11)
    assert any(g.abs().max() > 1e-3 for g in gradients)
    return step


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_free_bits_of_each_level(beta):
    model = ladder()
    inference, bound = drawn(model)
    kl = inference.kl.mean(1).T
    least = kl.detach().mean().item()
    assert kl.mean(0).min() < least < kl.mean(0).max()  # one level is free, one is not
    model.objective = vae.PenalizedELBO(vae.FreeBits(least, "group"))
    step = check_training(model, -bound.distortion - beta * vae.free_bits(kl, least), beta=beta)
    torch.testing.assert_close(step.parts["free_bits"], vae.free_bits(kl, least).mean().detach())


def maps(objective=None):
    torch.manual_seed(0)
    return perturb(vae.NVAE((1, 4, 4), (1, 1), channels=4, latent_channels=2, likelihood=vae.GaussianLikelihood(0.7),
                            objective=objective).double())


@pytest.mark.parametrize(("make", "per"), [(ladder, "dim"), (maps, "dim"), (maps, "channel")])
def test_free_bits_of_each_latent_of_a_hierarchy(make, per):
    """Whose KL is that of two Gaussians at the latents drawn above, by torch.distributions."""
    model, x = make(), X if make is ladder else randn(5, 1, 4, 4, seed=0)
    eps = [randn(K, *kl.shape, seed=i) for i, kl in enumerate(model.latent_kl(x))]
    bound, terms, h, units = model.elbo(x, K, eps=eps), model.infer(x, K, eps=eps), model._top(K * 5), []
    for level, d, z in zip(model.levels, model._features(x, K), terms.latents, strict=True):
        params = level.gaussians(h, d)
        mean, log_sigma = params.moments()
        prior = level._prior(h)
        kl = kl_divergence(Normal(mean, log_sigma.exp()), Normal(prior[0], prior[2].exp()))
        h = level.down(h, z.flatten(0, 1))
        kl = kl.unflatten(0, (K, 5)).mean(0)
        units.append(kl.flatten(1) if per == "dim" else kl.sum((2, 3)))
    kl = torch.cat(units, 1)
    torch.testing.assert_close(kl.sum(1), bound.rate)
    least = kl.mean().item()
    assert kl.mean(0).min() < least < kl.mean(0).max()
    model.objective = vae.PenalizedELBO(vae.FreeBits(least, per))
    expected, parameters = -bound.distortion - 0.4 * vae.free_bits(kl, least), list(model.parameters())
    found = model(x, K, 0.4, eps=eps)
    torch.testing.assert_close(found.value, expected)
    assert (expected - bound.elbo).abs().max() > 1e-3
    for a, b in zip(*(torch.autograd.grad(value.mean(), parameters) for value in (found.value, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    of_elements = model.infer(x, K, by_element=True, eps=eps)
    torch.testing.assert_close(of_elements[:5], terms[:5])
    torch.testing.assert_close(torch.stack([kl.flatten(2).sum(2) for kl in of_elements.kl_by_element]), terms.kl)


@pytest.mark.parametrize(("beta", "balanced"), [(0.4, True), (1.0, False)])
@pytest.mark.parametrize("sizes", [True, False])
def test_levels_are_balanced_while_the_rate_warms_up(beta, balanced, sizes):
    model = ladder()
    inference, bound = drawn(model)
    rate = vae.kl_balance(inference.kl.mean(1), (2, 3) if sizes else None)[0] if balanced else bound.rate
    assert not balanced or (rate - bound.rate).abs().max() > 1e-3
    model.objective = vae.PenalizedELBO(vae.KLBalance(sizes=sizes))
    torch.manual_seed(1)
    of_tensor = model(X, K, torch.tensor(beta, dtype=torch.float64)).value
    torch.testing.assert_close(of_tensor, -bound.distortion - beta * rate)
    check_training(model, -bound.distortion - beta * rate, beta=beta)


def gradient_of_rows(rows, term):
    """Of a hierarchy's mean value over some of the rows, with noise given to each row."""
    model = ladder(vae.PenalizedELBO(term))
    eps = [randn(K, 5, d, seed=d)[:, rows] for d in (2, 3)]
    value = model(X[rows], K, 0.4, eps=eps).value.mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), allow_unused=True,
                                                               materialize_grads=True)[1:]])


TERMS = (vae.FreeBits(0.35, "group"), vae.KLBalance())


def on_a_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([gradient_of_rows(slice(2 * rank, 2 * rank + 2), term) for term in TERMS], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_levels_of_two_ranks_are_one_batch(tmp_path):
    """The mean of the ranks' gradients is that of all rows together; of halves apart it is not."""
    mp.spawn(on_a_rank, (str(tmp_path),), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for term, *of_ranks in zip(TERMS, *found, strict=True):
        together = gradient_of_rows(slice(0, 4), term)
        torch.testing.assert_close(sum(of_ranks) / 2, together, rtol=1e-9, atol=1e-11)
        apart = (gradient_of_rows(slice(0, 2), term) + gradient_of_rows(slice(2, 4), term)) / 2
        assert (apart - together).abs().max() > 1e-3


def test_capacity_of_a_hierarchy():
    model = ladder(vae.PenalizedELBO(vae.Capacity(2.0, 5.0), beta=0.0))
    _, bound = drawn(model)
    check_training(model, -bound.distortion - 5.0 * (bound.rate - 2.0).abs())


@pytest.mark.parametrize(("name", "options"), [("iwae", {}), ("renyi", {"alpha": 0.5})])
def test_bounds_of_a_hierarchy(name, options):
    model = ladder(vae.BoundObjective(name, K, **options))
    _, bound = drawn(model)
    check_training(model, getattr(vae, name)(bound.log_w, **options))


def test_a_group_is_the_whole_latent_of_any_posterior():
    """A flow's KL has no closed form; the gate is on the batch's mean of what was sampled."""
    torch.manual_seed(0)
    model = vae.FlowPosteriorVAE((3,), 2, sizes=(4,), likelihood=vae.GaussianLikelihood(0.7)).double()
    _, bound = drawn(model)
    for factor in (0.5, 2.0):
        least = factor * bound.rate.mean().abs().item()
        model.objective = vae.PenalizedELBO(vae.FreeBits(least, "group"))
        torch.manual_seed(1)
        rate = vae.free_bits(bound.rate[:, None], least)
        torch.testing.assert_close(model(X, K).value, -bound.distortion - rate)


def test_free_bits_to_a_conditional_prior():
    labels = torch.tensor([0, 2, 1, 0, 2])
    torch.manual_seed(0)
    prior = vae.ConditionalGaussianPrior(2, nn.Embedding(3, 4))
    model = vae.ConditionalVAE((3,), 2, 3, (4,), likelihood=vae.GaussianLikelihood(0.7), prior=prior).double()
    inference, bound = drawn(model, context=labels)
    mean, log_sigma = model.posterior.moments(inference.params)
    mean_p, log_variance_p = prior.network(labels).chunk(2, 1)
    kl = kl_divergence(Normal(mean, log_sigma.exp()), Normal(mean_p, (0.5 * log_variance_p).exp()))
    torch.testing.assert_close(kl.sum(1), bound.rate)
    least = kl.mean().item()
    model.objective = vae.PenalizedELBO(vae.FreeBits(least))
    check_training(model, -bound.distortion - vae.free_bits(kl, least), labels)


def information(name, model, inference, bound):
    """The bound by its function, of a table of densities made element by element."""
    if name == "barber_agakov":
        return estimators.barber_agakov(bound.log_px_z.mean(0), 1.5)
    mean, log_sigma = model.posterior.moments(inference.params)
    found = []
    for z in inference.z:
        table = torch.stack([Normal(m, s.exp()).log_prob(z).sum(1) for m, s in zip(mean, log_sigma, strict=True)])
        if name == "nwj":
            table = 1.0 + table - Normal(0.0, 1.0).log_prob(z).sum(1)
        found.append((estimators.leave_one_out_upper if name == "leave_one_out" else getattr(estimators, name))(table))
    return sum(found) / K


@pytest.mark.parametrize(("name", "weight"), [("info_nce", 0.5), ("nwj", 0.3), ("barber_agakov", 2.0),
                                              ("leave_one_out", -0.5)])
def test_information_is_its_functions(name, weight):
    term = vae.MutualInformation(name, weight, entropy=1.5 if name == "barber_agakov" else 0.0)
    model = mlp(vae.PenalizedELBO(term, beta=0.7))
    inference, bound = drawn(model, 0.7)
    expected = information(name, model, inference, bound)
    step = check_training(model, bound.elbo + weight * expected)
    torch.testing.assert_close(step.parts["information"], expected.detach())


def test_information_of_a_gaussian_channel():
    """x ~ N(0, 1), q(z | x) = N(r x, 1 - r^2), whose aggregate is the prior, and p(x | z) its inverse: I(x; z) =
    -log(1 - r^2)/2. NWJ and Barber-Agakov reach it on average, the others are on their sides of it."""
    r = 0.8
    exact, runs, size = -0.5 * math.log1p(-r * r), 300, 4
    weight, spread = torch.tensor([[r], [0.0]]), torch.tensor([0.0, math.log1p(-r * r)])
    for name, sign in (("nwj", 0), ("barber_agakov", 0), ("info_nce", -1), ("leave_one_out", 1)):
        term = vae.MutualInformation(name, -1.0 if sign > 0 else 1.0, entropy=0.5 * math.log(2 * math.pi * math.e))
        model = vae.VAE(linear(weight, spread), linear(torch.tensor([[r]]), torch.zeros(1)),
                        likelihood=vae.GaussianLikelihood(math.sqrt(1 - r * r)), objective=vae.PenalizedELBO(term))
        with torch.no_grad():
            found = torch.stack([model(x, seed=i).parts["information"]
                                 for i, x in enumerate(randn(runs, size, 1, seed=5))])
        errors = (found.mean() - exact) / (found.std() / math.sqrt(runs))
        assert abs(errors) < 4 if sign == 0 else sign * errors > 4, (name, errors)


@pytest.mark.parametrize("posterior", [vae.FullGaussianPosterior(), vae.MixturePosterior(2)])
def test_information_of_any_posterior_with_a_density(posterior):
    model = mlp(vae.PenalizedELBO(vae.MutualInformation()), posterior=posterior)
    inference, bound = drawn(model)
    tables = [torch.stack([model.posterior.log_prob(row.expand(5, -1), z[None])[0] for row in inference.params])
              for z in inference.z]
    expected = sum(estimators.info_nce(table) for table in tables) / K
    check_training(model, bound.elbo + expected)


def test_a_delta_posterior_trains_and_keeps_its_rate():
    least = 0.3
    model = mlp(posterior=vae.DeltaGaussianPosterior(least))
    inference, bound = drawn(model)
    mean, log_variance = vae.delta_gaussian(*model.encoder(X).chunk(2, 1), least)
    q = Normal(mean, (0.5 * log_variance).exp())
    kl = kl_divergence(q, Normal(torch.zeros_like(mean), 1.0))
    assert (kl >= least * (1.0 - 1e-9)).all()
    torch.testing.assert_close(bound.rate, kl.sum(1))
    torch.testing.assert_close(bound.log_qz, q.log_prob(inference.z).sum(2))
    torch.testing.assert_close(model.posterior.log_prob(inference.params, inference.z), bound.log_qz)
    torch.testing.assert_close(model.posterior.mean(inference.params), mean)
    check_training(model, bound.elbo)
    strong = TrainStep(model, torch.optim.Adam(model.parameters(), 0.1), beta=50.0)
    for _ in range(40):
        strong(X)
    rate = model(X).rate
    assert (rate >= 2 * least * (1.0 - 1e-9)).all() and rate.mean() < 2 * least + 0.2


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("make", "objective"), [
    *((mlp, vae.PenalizedELBO(penalty)) for penalty in (
        vae.FreeBits(0.1), vae.Capacity(2.0, 1.0), vae.MutualInformation("nwj"), vae.TotalCorrelation(100), vae.DIP(),
        vae.MMD())),
    (mlp, vae.BoundObjective("dreg", 3)), (ladder, vae.PenalizedELBO(vae.FreeBits(0.1, "group"))),
    (ladder, vae.PenalizedELBO(vae.FreeBits(0.1))),
    (ladder, vae.PenalizedELBO(vae.KLBalance())),
    (ladder, vae.BoundObjective("stl", 3)), (ladder, vae.BoundObjective("piwae", 4, groups=2)),
])
def test_a_step_makes_no_tensor_of_python_numbers(make, objective):
    """Nor reads one: on a GPU either is a copy between host and device, that a CUDA graph can't record."""
    host = {"aten.lift_fresh.default", "aten._local_scalar_dense.default"}
    model, beta = make(objective), torch.tensor(0.5, dtype=torch.float64)
    with Operators() as ran:
        X.new_tensor([2.0]).item()
    assert host <= set(ran.names)
    with Operators() as ran:
        model(X, beta=beta).value.mean().backward()
    assert len(ran.names) > 20 and host.isdisjoint(ran.names)


@pytest.mark.parametrize(("error", "call", "message"), [
    (TypeError, lambda: ladder(vae.PenalizedELBO(vae.DIP()))(X), "^model: DIP needs a VAE with one z, got HVAE"),
    (TypeError, lambda: ladder("elbo"), "^objective"),
    *((TypeError, lambda term=term: vae.HamiltonianVAE(nn.Linear(3, 4), nn.Linear(2, 3), objective=vae.PenalizedELBO(
        term)).double()(X), f"^model: {words} .* HamiltonianVAE") for term, words in (
            (vae.FreeBits(0.1), "free bits of each latent need"), (vae.TotalCorrelation(9), "the total correlation"),
            (vae.MutualInformation(), "the information"))),
    (TypeError, lambda: mlp(vae.PenalizedELBO(vae.KLBalance()))(X), "^model: KLBalance needs a hierarchy, got MLPVAE"),
    (ValueError, lambda: vae.PenalizedELBO(vae.FreeBits(0.1, "group"), vae.DIP(), vae.Capacity(2.0, 1.0)),
     "^penalties: FreeBits and Capacity each stand in the place of the rate"),
    (ValueError, lambda: vae.MutualInformation("mine"), "bound"),
    (ValueError, lambda: vae.MutualInformation("leave_one_out", 1.0), "^weight: expected a negative number"),
    (ValueError, lambda: vae.MutualInformation("info_nce", -1.0), "^weight: expected a positive number"),
    (ValueError, lambda: vae.DeltaGaussianPosterior(math.inf), "least"),
    (ValueError, lambda: mlp(posterior=vae.DeltaGaussianPosterior(0.1), prior=vae.GaussianPrior((2,)))(X), "^prior"),
])
def test_errors_name_the_argument(error, call, message):
    with pytest.raises(error, match=message):
        call()
