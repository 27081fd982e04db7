"""Quantisers: nearest codes, straight-through gradients, moving averages; the bound of what is built on them."""

import copy
import itertools
import math

import pytest
import torch
from gaussian_models import perturb, randn
from torch import nn

from fastflow import vae


def test_codes_are_the_nearest_vectors():
    quantizer, z = vae.VectorQuantizer(7, 3).double(), randn(4, 3, 2, 5, seed=0)
    found, codes, loss = quantizer(z)
    distances = (z[:, None] - quantizer.codebook[None, :, :, None, None]).square().sum(2)
    assert torch.equal(codes, distances.argmin(1)) and codes.shape == (4, 2, 5)
    torch.testing.assert_close(found, quantizer.codebook[codes].movedim(-1, 1))
    torch.testing.assert_close(quantizer.lookup(codes), found)
    torch.testing.assert_close(loss, 1.25 * distances.amin(1).flatten(1).sum(1))


def test_gradients_of_the_vector_quantizer():
    """Straight through to z; of the loss 2 beta (z - e) to z and 2 (e - z), summed by code, to the codebook."""
    quantizer, z = vae.VectorQuantizer(5, 2, commitment=0.3).double(), randn(6, 2, 4, seed=0).requires_grad_()
    found, codes, loss = quantizer(z)
    cotangent = randn(6, 2, 4, seed=1)
    gradient, = torch.autograd.grad(found, z, cotangent, retain_graph=True)
    assert torch.equal(gradient, cotangent)
    to_z, to_codebook = torch.autograd.grad(loss.sum(), (z, quantizer.codebook))
    torch.testing.assert_close(to_z, 0.6 * (z - found).detach())
    rows = (found - z).detach().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(to_codebook, torch.zeros(5, 2).double().index_add(0, codes.flatten(), 2 * rows))


def test_moving_average_codebook():
    """One step of N' = d N + (1-d) n, m' = d m + (1-d) sum z, e = m'/N'; it goes to the mean of what is assigned;
    unused codes stay, and move where that is asked for; eval changes nothing."""
    quantizer, z = vae.VectorQuantizer(3, 2, decay=0.9, commitment=1.0).double(), randn(50, 2, seed=0)
    before = quantizer.codebook.clone()
    _, codes, loss = quantizer(z)
    counts = torch.bincount(codes, minlength=3).double()
    sums = torch.stack([z[codes == k].sum(0) for k in range(3)])
    torch.testing.assert_close(quantizer.codebook, (0.9 * before + 0.1 * sums) / (0.9 + 0.1 * counts)[:, None])
    torch.testing.assert_close(loss, (z - before[codes]).square().sum(1))  # of the codebook that chose
    assert not list(quantizer.parameters())
    for _ in range(300):
        quantizer(z)
    codes = quantizer(z).codes
    for k in codes.unique():
        torch.testing.assert_close(quantizer.codebook[k], z[codes == k].mean(0), rtol=0, atol=1e-6)
    quantizer.eval()
    kept = quantizer.codebook.clone()
    quantizer(z + 1.0)
    assert torch.equal(quantizer.codebook, kept)

    far = vae.VectorQuantizer(3, 2, decay=0.5, restart_below=0.1).double()
    far.codebook[2] = 1e3
    for _ in range(6):
        far(z)
    assert (far.codebook[2].abs() < 5).all()


def test_a_threshold_above_one_restarts_only_codes_that_are_used_less():
    """Two codes with 50 vectors of a batch each stay, the one that has none is moved, whatever the threshold."""
    torch.manual_seed(0)
    z = torch.cat([torch.full((50, 2), 1.0), torch.full((50, 2), -1.0)]) + 0.01 * randn(100, 2, seed=0).float()
    quantizer, moves = vae.VectorQuantizer(3, 2, decay=0.9, restart_below=20.0), 0
    quantizer.codebook.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [100.0, 100.0]]))
    quantizer.sums.copy_(quantizer.codebook * quantizer.counts[:, None])
    for _ in range(30):
        before = quantizer.codebook.clone()
        quantizer(z)
        assert (quantizer.codebook[:2] - before[:2]).abs().max() < 0.1
        moves += int((quantizer.codebook[2] - before[2]).abs().max() > 0.5)
    assert moves and quantizer.codebook[2].abs().max() < 2.0
    assert (quantizer.counts >= 20.0).all()


def test_an_empty_batch_restarts_no_codes():
    quantizer = vae.VectorQuantizer(3, 2, decay=0.5, restart_below=0.5)
    before = quantizer.codebook.clone()
    for _ in range(4):
        found = quantizer(torch.zeros(0, 2))
        assert found.z.shape == (0, 2) and found.codes.shape == found.loss.shape == (0,)
    assert (quantizer.counts < 0.5).all()  # and at the next batch they do
    torch.testing.assert_close(quantizer.codebook, before)
    quantizer(torch.full((4, 2), 7.0))
    torch.testing.assert_close(quantizer.codebook, torch.full((3, 2), 7.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("levels", [(2,), (3, 4), (8, 5, 5), (1001,), (1024, 3), (100_000,)])
def test_fsq_has_every_code_once(levels):
    quantizer = vae.FSQ(levels)
    codes = torch.arange(quantizer.n_codes)
    vectors = quantizer.lookup(codes)
    grid = torch.tensor(list(itertools.product(*[[(i - n // 2) / (n // 2) for i in range(n)] for n in levels])))
    assert {tuple(v) for v in vectors.tolist()} == {tuple(v) for v in grid.tolist()}
    # Points that are bounded to a code come back as that code, far ones as the corners.
    half = 0.5 * (torch.tensor(levels) - 1.0) * (1.0 + torch.tensor([min(1e-3, 0.5 / n) for n in levels]))
    offset = torch.tensor([0.5 * (n % 2 == 0) for n in levels])
    sizes = torch.tensor([float(n // 2) for n in levels])
    z = torch.atanh(((vectors * sizes + offset) / half).double()) - torch.atanh(offset / half).double()
    found = quantizer(z)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.z.float(), vectors)
    assert quantizer(torch.full((1, len(levels)), 50.0)).codes.item() == quantizer.n_codes - 1
    assert quantizer(torch.full((1, len(levels)), -50.0)).codes.item() == 0
    assert torch.equal(found.loss.float(), torch.zeros(quantizer.n_codes))
    double = quantizer.double()
    assert torch.equal(double.lookup(codes), double(z).z) and not double.state_dict()


def test_fsq_codes_beyond_what_float32_counts():
    quantizer = vae.FSQ((16,) * 7)  # 2^28 codes
    found = quantizer(randn(50, 7, seed=0).float() * 2.0)
    assert torch.equal(quantizer.lookup(found.codes), found.z)
    assert found.codes.max() > 2**24 and found.codes.max() < quantizer.n_codes


def test_fsq_follows_parameters_that_are_assigned():
    def make():
        return vae.QuantizedVAE(nn.Linear(3, 2), vae.FSQ((4, 4)), nn.Linear(2, 3), vae.GaussianLikelihood())

    with torch.device("meta"):
        model = make()
    model.load_state_dict(make().double().state_dict(), assign=True)
    assert model.quantizer.lookup(torch.zeros(1, dtype=torch.int64)).dtype == torch.float64
    assert model.elbo(randn(4, 3, seed=0)).elbo.isfinite().all()


def test_fsq_gradient_is_that_of_the_bound():
    quantizer, z = vae.FSQ((5, 4)), randn(3, 2, 2, seed=0).requires_grad_()
    gradient, = torch.autograd.grad(quantizer(z).z.sum(), z)
    for d, n in enumerate((5, 4)):
        half, offset = 0.5 * (n - 1) * 1.001, 0.5 * (n % 2 == 0)
        expected = half * (1 - torch.tanh(z[:, d] + math.atanh(offset / half)).square()) / (n // 2)
        torch.testing.assert_close(gradient[:, d], expected.detach())


def small(prior=None, **options):
    return vae.QuantizedVAE(nn.Linear(4, 2), vae.VectorQuantizer(3, 2), nn.Linear(2, 4), vae.GaussianLikelihood(0.5),
                            prior, **options).double()


def test_bound_of_a_quantized_vae():
    """log p(x | z(x)) + log p(codes), below the model's log p(x), which enumeration over the codes gives."""
    x = randn(5, 4, seed=0)
    for prior in (None, perturb(vae.CodePrior(3, 4, 1).double())):
        model = small(prior)
        bound, codes = model.elbo(x, 2), model.codes(x)
        every = torch.arange(3)[:, None]
        log_prior = torch.full((3,), -math.log(3)).double() if prior is None else prior.log_prob(every)
        each = torch.stack([model.likelihood.log_prob(x, model.decoder(model.quantizer.lookup(c.expand(5))))
                            for c in every[:, 0]])
        evidence = torch.logsumexp(each + log_prior[:, None], 0)
        torch.testing.assert_close(bound.elbo, (each + log_prior[:, None]).gather(0, codes[None])[0])
        assert (bound.elbo <= evidence).all() and bound.log_w.shape == (2, 5)
        result = model(x)
        torch.testing.assert_close(result.value, bound.elbo - model.quantizer(model.encoder(x)).loss)
        n_used = len(codes.unique())
        assert 1.0 <= result.parts["perplexity"] <= n_used + 1e-9
        result.value.mean().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("make", [lambda: vae.VQVAE((1, 8, 8), 6, 4, (8, 8)),
                                  lambda: vae.FSQVAE((3, 8, 8), (3, 4), (8,), learned_prior=False,
                                                     likelihood=vae.DiscretizedLogisticLikelihood(16))])
def test_ready_models(make):
    torch.manual_seed(0)
    model = make()
    shape = (1, 8, 8) if isinstance(model, vae.VQVAE) else (3, 8, 8)
    x = torch.rand(4, *shape) if shape[0] == 1 else torch.randint(0, 16, (4, *shape))
    result = model(x)
    result.value.mean().backward()
    assert result.value.shape == (4,) and all(p.grad is not None for p in model.parameters())
    assert model.sample(3).shape == (3, *shape) and model.reconstruct(x).shape == (4, *shape)
    side = 2 if shape[0] == 1 else 4
    assert model.codes(x).shape == (4, side, side)
    if model.prior is None:
        torch.testing.assert_close(result.rate, torch.full((4,), side * side * math.log(12)))


def test_distances_and_counts_in_half_precision():
    """Codes are those of the same numbers in float32, and each of 300 vectors counts."""
    torch.manual_seed(0)
    half = vae.VectorQuantizer(50, 3, decay=0.5).bfloat16()
    full, z = copy.deepcopy(half).float(), torch.randn(300, 3).bfloat16()
    found, expected = half(z), full(z)
    assert torch.equal(found.codes, expected.codes) and found.loss.dtype == found.z.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(half.counts, full.counts.bfloat16())
    one = vae.VectorQuantizer(2, 1, decay=0.5).bfloat16()
    with torch.no_grad():
        one.codebook.copy_(torch.tensor([[0.0], [100.0]]))
    one(torch.zeros(1000, 1).bfloat16())
    assert one.counts.tolist() == [500.0, 0.5]


@pytest.mark.parametrize("make", [lambda: vae.VQVAE((1, 8, 8), 6, 4, (8, 8)),
                                  lambda: vae.VQVAE((1, 8, 8), 6, 4, (8, 8), decay=None),
                                  lambda: vae.FSQVAE((1, 8, 8), (3, 4), (8,))])
def test_models_in_half_precision(make):
    torch.manual_seed(0)
    model, x = make().bfloat16(), torch.rand(4, 1, 8, 8).bfloat16()
    result = model(x)
    result.value.mean().backward()
    assert {term.dtype for term in result.bound} == {torch.float32} and result.value.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(3).shape == (3, 1, 8, 8) and model.reconstruct(x).shape == (4, 1, 8, 8)
    assert model.interpolate(x, x, 3).shape == (3, 4, 1, 8, 8)


@pytest.mark.parametrize(("error", "make", "message"), [
    (ValueError, lambda: vae.VectorQuantizer(1, 2), "n_codes"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2, decay=1.0), "decay"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2, restart_below=0.5), "restart_below"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2, decay=0.9, restart_below=-1.0), "restart_below"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2, decay=0.9, restart_below=math.nan), "restart_below"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2, decay=0.9, restart_below=math.inf), "restart_below"),
    (TypeError, lambda: vae.VectorQuantizer(3, 2, decay=0.9, restart_below="few"), "restart_below"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2)(torch.zeros(2, 3)), "z"),
    (ValueError, lambda: vae.VectorQuantizer(3, 2, commitment=-1), "^commitment: expected a finite number"),
    (TypeError, lambda: vae.VectorQuantizer(3, 2, commitment="a"), "^commitment: expected a number"),
    (TypeError, lambda: vae.VectorQuantizer(3, 2, decay="a"), "^decay: expected a number"),
    (TypeError, lambda: vae.VectorQuantizer(3, 2)(torch.zeros(2, 2).double()), "^z: expected torch.float32 like"),
    (TypeError, lambda: vae.VectorQuantizer(3, 2).double()(torch.zeros(2, 2)), "^z: expected torch.float64 like"),
    *((error, lambda make=make, codes=codes: make().lookup(codes), f"^codes: {words}")
      for make in (lambda: vae.VectorQuantizer(9, 2), lambda: vae.FSQ((3, 3)))
      for error, codes, words in ((TypeError, torch.ones(1), "expected an int64 tensor, got torch.float32"),
                                  (TypeError, 3, "expected a torch.Tensor"),
                                  (ValueError, torch.tensor([9]), "expected labels below n_codes = 9, got 9"),
                                  (ValueError, torch.tensor([-1]), "expected labels from 0 on, got -1"))),
    (ValueError, lambda: vae.FSQ((3, 1)), "levels"),
    (ValueError, lambda: vae.FSQ((3, 3))(torch.zeros(2, 3)), "z"),
    (ValueError, lambda: small().sample(1), "code_shape"),
    (ValueError, lambda: small(vae.CodePrior(4)), "prior"),
])
def test_errors_name_the_argument(error, make, message):
    with pytest.raises(error, match=message):
        make()
