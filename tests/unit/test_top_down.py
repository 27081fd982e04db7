"""top_down: values and gradients over modes, scales, sizes and batches; noise; threads; other instruction sets."""

import itertools

import pytest
import torch
from op_checks import check_with_instructions
from sweeps import rest_slow
from tolerances import GRADIENT_FACTOR, VALUE_FACTOR, assert_bitwise

from fastflow import backends, functional, reference
from fastflow.functional import LatentLevel, MLPBlock

# State above, features, latents and state below of each level, and the hidden layers of its networks: thin and wide
# ones, sizes that fill no vector, no hidden layer at all.
SIZES = (((5, 3, 2, 5, (7,)), (5, 4, 1, 6, (9, 20)), (6, 1, 3, 2, ())), ((64, 64, 16, 64, (64,)),) * 2,
         ((1, 1, 1, 1, (1,)),), ((33, 17, 40, 33, (50,)),))
BATCHES = (1, 15, 64, 65, 200)


def network(inputs, outputs, hidden, activation="silu", residual=False, dtype=torch.float64):
    weights, biases = [], []
    for width in (*hidden, outputs):
        weights.append(torch.randn(width, inputs, dtype=dtype) / max(inputs, 1)**0.5)
        biases.append(0.3 * torch.randn(width, dtype=dtype))
        inputs = width
    return MLPBlock(tuple(weights), tuple(biases), activation, residual)


def problem(sizes, batch, mode="residual", scale="soft_tanh", activation="silu", seed=0):
    """(h, features, levels, eps) in float64."""
    torch.manual_seed(seed)
    levels = []
    for state, features, latents, below, hidden in sizes:
        seen = features if mode == "ladder" else state + features
        levels.append(LatentLevel(
            network(state, 2 * latents, hidden, activation),
            network(seen, 2 * latents, hidden, activation, residual=seen >= 2 * latents),
            network(state + latents, below, hidden, activation, residual=below <= state), mode, scale))
    if scale == "std":  # positive raw scales
        for level in levels:
            for block in (level.prior, level.posterior):
                half = len(block.biases[-1]) // 2
                block.weights[-1][half:] *= 0.01
                block.biases[-1][half:] = 1.0
            level.posterior.residual = False
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return (randn(batch, sizes[0][0]), [randn(batch, size[1]) for size in sizes], levels,
            [randn(batch, size[2]) for size in sizes])


def converted(levels, convert):
    return [LatentLevel(*(MLPBlock(tuple(map(convert, b.weights)), tuple(map(convert, b.biases)), b.activation,
                                   b.residual) for b in level.networks), level.mode, level.scale) for level in levels]


def evaluate(module, problem, dtype, which=("h", "z", "kl", "log_q", "log_p"), **noise):
    """({name: result}, {name: gradient}) of one call, gradients of a weighted sum of the results in ``which``."""
    def leaf(t):
        return t.to(dtype).requires_grad_()
    h, features, levels, eps = problem
    h, features, levels = leaf(h), [leaf(d) for d in features], converted(levels, leaf)
    noise = noise or {"eps": [e.to(dtype) for e in eps]}
    out, latents, kl, log_q, log_p = module.top_down(h, features, levels, **noise)
    results = {"h": out, "z": torch.cat([z.flatten() for z in latents]), "kl": kl, "log_q": log_q, "log_p": log_p}
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for name, t in results.items():
        weight = torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype)
        if name in which:
            loss = loss + (weight * t).sum()
    params = [p for level in levels for b in level.networks for p in b.parameters]
    grads = torch.autograd.grad(loss, [h, *features, *params], allow_unused=True)
    return ({n: t.detach() for n, t in results.items()},
            {i: torch.zeros_like(t) if g is None else g
             for i, (g, t) in enumerate(zip(grads, [h, *features, *params], strict=True))})


def assert_exact(problem, **options):
    """In float64 to 1e-10."""
    truth = evaluate(reference, problem, torch.float64, **options)
    got = evaluate(functional, problem, torch.float64, **options)
    for part in (0, 1):
        for name, exact in truth[part].items():
            torch.testing.assert_close(got[part][name], exact, rtol=1e-10, atol=1e-10 * (1 + exact.abs().max()))


def assert_as_accurate_as_eager(problems, over=max):
    """In float32, by the error-ratio rule over all problems together, as ``over`` sums them up: the largest error of
    one small tensor says little about either side."""
    errors = [[[], []], [[], []]]  # of results and gradients, fused and eager
    for problem in problems:
        truth = evaluate(reference, problem, torch.float64)
        for side, module in enumerate((functional, reference)):
            got = evaluate(module, problem, torch.float32)
            for part in (0, 1):
                errors[part][side].append(max(
                    largest_error(got[part][name].double(), exact) for name, exact in truth[part].items()))
    for pair, factor in zip(errors, (VALUE_FACTOR, GRADIENT_FACTOR), strict=True):
        fused, eager = map(over, pair)
        assert fused <= factor * eager + 8 * torch.finfo(torch.float32).eps, errors


def largest_error(got, exact):
    """Relative to the largest value and at least 1, over what is finite in float64 (exp of a raw scale may not be)."""
    got, exact = got[exact.isfinite()], exact[exact.isfinite()]
    return ((got - exact).abs().max() / exact.abs().max().clamp(min=1)).item() if len(exact) else 0.0


@pytest.fixture(autouse=True)
def kernel():
    if not backends.available()["cpu"]:
        pytest.skip("the CPU kernels are not built")


@pytest.mark.parametrize("mode", reference.LEVEL_MODES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{len(s)} levels of {s[0][0]}")
def test_sizes_and_batches(sizes, mode):
    for batch in BATCHES:
        assert_exact(problem(sizes, batch, mode))
    # Densities of a narrow prior err much or little by chance, on either side.
    assert_as_accurate_as_eager([problem(sizes, batch, mode, seed=seed) for batch in BATCHES for seed in range(4)])


@pytest.mark.parametrize("scale", reference.SCALES)
def test_scales_modes_and_activations(scale):
    for mode, activation in itertools.product(reference.LEVEL_MODES, reference.ACTIVATIONS):
        if scale == "std" and mode == "residual":
            continue  # the sum of two standard deviations says nothing that "absolute" does not
        problems = [problem(SIZES[0], 70, mode, scale, activation, seed) for seed in range(6)]
        assert_exact(problems[0])
        if activation != "relu":  # whose kinks a rounding may cross
            assert_as_accurate_as_eager(problems)


@pytest.mark.parametrize("which", [("kl",), ("h",), ("z",), ("log_q", "log_p"), ("h", "kl")], ids=str)
def test_gradients_of_some_results_alone(which):
    for mode in reference.LEVEL_MODES:
        assert_exact(problem(SIZES[0], 9, mode), which=which)


def test_drawn_noise_is_the_stream_of_gaussian_sample_kl():
    h, features, levels, _ = problem(SIZES[0], 70)
    offset = 5
    eps = []
    for level in levels:
        zeros = torch.zeros(70, len(level.prior.biases[-1]), dtype=torch.float64)
        eps.append(functional.gaussian_sample_kl(zeros, seed=11, offset=offset)[0])
        offset += -(-eps[-1].numel() // 4)
    given = functional.top_down(h, features, levels, eps=eps)
    for seed in (11, torch.tensor(11)):
        drawn = functional.top_down(h, features, levels, seed=seed, offset=5)
        for a, b in zip((drawn[0], *drawn[1], *drawn[2:]), (given[0], *given[1], *given[2:]), strict=True):
            assert_bitwise(a, b)
    again = functional.top_down(h, features, levels, generator=torch.Generator().manual_seed(3))
    same = functional.top_down(h, features, levels, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again[0], same[0]) and not torch.equal(again[0], drawn[0])


def test_without_gradients_the_same_bits_and_any_strides():
    h, features, levels, eps = problem(SIZES[0], 130)
    with torch.no_grad():
        bare = functional.top_down(h, features, levels, eps=eps)
    recorded = functional.top_down(h.clone().requires_grad_(), features, levels, eps=eps)
    strided = functional.top_down(h.T.contiguous().T, [torch.cat([d, d], 1)[:, :d.shape[1]] for d in features],
                                  converted(levels, lambda t: t.T.contiguous().T if t.dim() == 2 else t), eps=eps)
    for results in (recorded, strided):
        for a, b in zip((results[0], *results[1], *results[2:]), (bare[0], *bare[1], *bare[2:]), strict=True):
            assert_bitwise(a.detach(), b)


def test_same_bits_on_any_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(evaluate(functional, problem(SIZES[1], 300), torch.float32))
    finally:
        torch.set_num_threads(before)
    for part in (0, 1):
        for name, t in found[0][part].items():
            assert_bitwise(found[1][part][name], t)


def test_no_samples():
    results, grads = evaluate(functional, problem(SIZES[0], 0), torch.float32)
    assert results["h"].shape == (0, 2) and results["kl"].shape == (3, 0)
    assert not any(g.any() for g in grads.values())


def test_double_backward_and_transforms_run_the_reference():
    h, features, levels, eps = problem(SIZES[2], 3)
    h.requires_grad_()
    weight = levels[0].posterior.weights[0].requires_grad_()
    call = lambda h, w: functional.top_down(h, features, [LatentLevel(  # noqa: E731
        levels[0].prior, MLPBlock((w, *levels[0].posterior.weights[1:]), levels[0].posterior.biases,
                                  residual=levels[0].posterior.residual), levels[0].merge)], eps=eps)[2]
    assert torch.autograd.gradcheck(call, (h, weight))
    assert torch.autograd.gradgradcheck(call, (h, weight))
    single = lambda h: functional.top_down(h, features, levels, eps=eps)[2].sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(single)(h.detach()), torch.autograd.grad(single(h), h)[0])
    drawn = functional.top_down(h, features, levels, seed=4)[2].sum()
    first, = torch.autograd.grad(drawn, h, create_graph=True, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(drawn, h)[0], rtol=1e-10, atol=1e-10)


def test_compiles_as_one_graph():
    h, features, levels, eps = problem(SIZES[0], 9)
    h.requires_grad_()
    call = lambda h, features, eps: functional.top_down(h, features, levels, eps=eps)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(h, features, eps), call(h, features, eps)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(out[2].sum() + out[0].sum(), h)[0] for out in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("error, change, message", [
    (TypeError, lambda a: a.update(h=a["h"].half()), "h"),
    (ValueError, lambda a: a.update(h=a["h"][0]), "h"),
    (ValueError, lambda a: a.update(features=a["features"][:1]), "features"),
    (ValueError, lambda a: a.update(features=[d[:2] for d in a["features"]]), r"features\[0\]"),
    (TypeError, lambda a: a.update(features=[d.float() for d in a["features"]]), r"features\[0\]"),
    (ValueError, lambda a: a.update(levels=[]), "levels"),
    (TypeError, lambda a: a.update(levels=[None] * 3), r"levels\[0\]"),
    (ValueError, lambda a: setattr(a["levels"][1], "mode", "relative"), r"levels\[1\].mode"),
    (ValueError, lambda a: setattr(a["levels"][1], "scale", "cubic"), r"levels\[1\].scale"),
    (ValueError, lambda a: setattr(a["levels"][0].merge, "activation", "gelu"), r"levels\[0\].merge.activation"),
    (ValueError, lambda a: setattr(a["levels"][0].prior, "biases", ()), r"levels\[0\].prior.biases"),
    (ValueError, lambda a: setattr(a["levels"][2], "posterior", a["levels"][0].posterior), r"levels\[2\].posterior"),
    (ValueError, lambda a: a.update(eps=[e[:, :0] for e in a["eps"]]), r"eps\[0\]"),
    (ValueError, lambda a: a.update(seed=3), "eps and seed"),
    (TypeError, lambda a: a.update(eps=None, seed=0.5), "seed"),
    (ValueError, lambda a: a.update(eps=None, seed=2**64), "seed"),
    (ValueError, lambda a: a.update(eps=None, seed=torch.zeros(4, dtype=torch.int64)), "seed"),
    (ValueError, lambda a: a.update(eps=None, offset=-1), "offset"),
    (TypeError, lambda a: a.update(eps=None, offset=1.5), "offset"),
    (TypeError, lambda a: a.update(eps=None, generator=0), "generator"),
    (ValueError, lambda a: a.update(features=None), "features: expected a sequence of 3 tensors.*got NoneType"),
    (ValueError, lambda a: a.update(eps=a["eps"][:2]), "eps: .*got 2"),
    (ValueError, lambda a: a.update(levels=[]), "levels: .*got none"),
])
def test_bad_arguments_are_named(error, change, message):
    arguments = dict(zip(("h", "features", "levels", "eps"), problem(SIZES[0], 4), strict=True))
    change(arguments)
    with pytest.raises(error, match=f"^{message}"):
        functional.top_down(**arguments)


SCRIPT = """
import statistics
import torch
from test_top_down import SIZES, assert_as_accurate_as_eager, assert_exact, problem
torch.set_num_threads(1)
for sizes in SIZES[:2]:
    for mode in ("residual", "absolute", "ladder"):
        assert_exact(problem(sizes, 75, mode))
        # Medians: the largest error is one badly conditioned sample's, whoever rounds that worse.
        assert_as_accurate_as_eager([problem(sizes, batch, mode, seed=seed) for batch in (30, 75) for seed in range(4)],
                                    statistics.median)
"""


@pytest.mark.parametrize("isa", rest_slow(["avx2", "baseline"], ["avx2"]))
def test_on_older_processors(isa):
    check_with_instructions(isa, SCRIPT)


@pytest.mark.parametrize("mode", ["residual", "absolute", "ladder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prior_mean_that_is_not_finite_shows_in_the_kl_divergence(mode, value):
    """Of "residual" too, whose KL divergence follows from what the posterior's network says alone."""
    h, features, levels, eps = problem(SIZES[0][:1], 70, mode)
    levels[0].prior.biases[-1].data[0] = value
    found = []
    for module in (functional, reference):
        bias = levels[0].posterior.biases[-1].detach().requires_grad_()
        levels[0].posterior.biases = (*levels[0].posterior.biases[:-1], bias)
        kl = module.top_down(h, features, levels, eps=eps)[2]
        found.append((kl.detach(), *torch.autograd.grad(kl.sum(), bias)))
    (kl, grad), (true_kl, true_grad) = found
    assert torch.equal(kl.isnan(), true_kl.isnan()) and not kl.isfinite().any()
    assert grad[true_grad.isnan()].isnan().all()
