"""bernoulli_log_prob: values and gradients against float64 at many sizes, against torch.distributions, its non-finite
results, the order of its sums, and what it accepts."""

import layouts
import pytest
import torch
import torch.nn.functional as F
from cases import Case, check_by_ratio, cotangents_of, evaluate, kernels_run
from tolerances import assert_bitwise, assert_same_nonfinite

from fastflow import functional, reference

DOUBLE = torch.float64
KERNELS = {"fastflow_cpu::bernoulli_log_prob_fwd", "fastflow_cpu::bernoulli_log_prob_bwd"}
# (x, samples or None): grouped rows, one element, no event, a whole tile, more than one, images.
SIZES = [((7, 784), None), ((5, 33), 4), ((3, 1), 2), ((6,), 3), ((2, 2048), None), ((3, 5001), 2), ((2, 3, 20, 31), 3),
         ((3, 2, 3, 4, 5), 2)]


def operands(x, samples, dtype, spread=4.0):
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(x, generator=generator, dtype=DOUBLE)
    logits = spread * torch.randn(x if samples is None else (samples, *x), generator=generator, dtype=DOUBLE)
    return {"x": torch.where(data < 0.7, (data < 0.35).to(DOUBLE), data).to(dtype), "logits": logits.to(dtype)}


def case_of(tensors):
    return Case("sizes", "bernoulli_log_prob", {name: tuple(t.shape) for name, t in tensors.items()})


@pytest.mark.parametrize(("x", "samples"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16], ids=str)
def test_sizes(x, samples, dtype):
    for layout in (layouts.contiguous, layouts.channels_last, layouts.padded):
        tensors = operands(x, samples, dtype)
        if samples is None or layout is not layouts.channels_last:
            tensors = {name: layout(t) for name, t in tensors.items()}
        else:  # as a decoder gives it
            tensors["logits"] = layout(tensors["logits"].flatten(0, 1)).unflatten(0, (samples, x[0]))
        case = case_of(tensors)
        cotangents = cotangents_of(case, tensors)
        assert kernels_run(lambda c=case, t=tensors, g=cotangents: evaluate(c, t, cotangents=g)) == KERNELS
        check_by_ratio(case, tensors, cotangents=cotangents)


@pytest.mark.parametrize("shape", [((0, 3), (0, 3)), ((2, 0), (4, 2, 0)), ((0, 3), (2, 0, 3)), ((2, 3), (0, 2, 3))],
                         ids=str)
def test_zero_sizes(shape):
    x, logits = torch.rand(shape[0]), torch.randn(shape[1], requires_grad=True)
    log_p = functional.bernoulli_log_prob(x, logits)
    assert log_p.shape == shape[1][:-1] and not log_p.any()
    assert torch.autograd.grad(log_p.sum(), logits)[0].shape == shape[1]


def test_it_is_the_log_probability_of_independent_bits():
    """Against torch.distributions, and, by enumeration of all bits, normalised."""
    logits = torch.randn(3, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) * 3.0
    bits = torch.cartesian_prod(*[torch.tensor([0, 1])] * 5)
    log_p = functional.bernoulli_log_prob(bits, logits[:, None].expand(3, 32, 5))
    want = torch.distributions.Bernoulli(logits=logits[:, None]).log_prob(bits.to(DOUBLE)).sum(-1)
    torch.testing.assert_close(log_p, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(log_p.logsumexp(1), torch.zeros(3, dtype=DOUBLE), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("precise", [torch.float32, DOUBLE, torch.float16], ids=str)
def test_integer_and_bool_bits(dtype, precise):
    tensors = operands((4, 9), 3, precise)
    bits = (tensors["x"] > 0.5)
    got = functional.bernoulli_log_prob(bits.to(dtype), tensors["logits"])
    assert got.dtype == (DOUBLE if precise == DOUBLE else torch.float32)
    assert_bitwise(got, functional.bernoulli_log_prob(bits.to(precise), tensors["logits"]))


def test_a_confident_logit_loses_nothing():
    """x = 1 at l = 40: log p is -exp(-40), which 1 - sigmoid or log1p(-p) would lose."""
    logits = torch.tensor([[40.0], [-40.0]], dtype=DOUBLE)
    bits = torch.tensor([[1.0], [0.0]], dtype=DOUBLE)
    torch.testing.assert_close(functional.bernoulli_log_prob(bits, logits),
                               torch.full((2,), -40.0, dtype=DOUBLE).exp().neg(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("bit", [0.0, 1.0, 0.25])
@pytest.mark.parametrize("name", ["x", "logits"])
def test_non_finite_inputs_are_as_binary_cross_entropy_gives_them(value, bit, name):
    tensors = operands((3, 40), 2, torch.float32)
    tensors["x"][1, 20] = bit
    tensors[name][..., 1, 20] = value
    x, logits = tensors["x"], tensors["logits"].requires_grad_()
    got = functional.bernoulli_log_prob(x, logits)
    want = -F.binary_cross_entropy_with_logits(logits, x.expand(logits.shape), reduction="none").sum(-1)
    assert_same_nonfinite(got.detach(), want.detach(), "log p")
    slopes = [torch.autograd.grad(out.sum(), logits)[0] for out in (got, want)]
    assert_same_nonfinite(*slopes, "gradient", gradient=True)


def test_rows_do_not_depend_on_their_neighbours_nor_results_on_threads(threads):
    for shape, samples in (((301, 45), 3), ((5, 9001), 2)):
        tensors = operands(shape, samples, torch.float32)
        case = case_of(tensors)
        cotangents = cotangents_of(case, tensors)
        threads(1)
        results, grads = evaluate(case, tensors, cotangents=cotangents, needs=("logits",))
        threads(3)
        again, again_grads = evaluate(case, tensors, cotangents=cotangents, needs=("logits",))
        assert_bitwise(again["log_prob"], results["log_prob"])
        assert_bitwise(again_grads["logits"], grads["logits"])
        alone = functional.bernoulli_log_prob(tensors["x"][4:5], tensors["logits"][:, 4:5])
        assert_bitwise(alone, results["log_prob"][:, 4:5])


def test_a_large_gradient_written_past_the_caches():
    tensors = operands((64, 2049), 20, torch.float32)  # 10 MB, rows off every alignment
    case = case_of(tensors)
    check_by_ratio(case, tensors, needs=("logits",), cotangents=cotangents_of(case, tensors))


X, L = torch.rand(2, 3), torch.randn(4, 2, 3)


@pytest.mark.parametrize(("error", "argument", "x", "logits"), [
    (TypeError, "x", [1.0], L), (TypeError, "logits", X, None), (TypeError, "logits", X, L.long()),
    (TypeError, "x", X.to(torch.complex64), L), (ValueError, "x", torch.tensor(1.0), L),
    (ValueError, "logits", X, L[..., :2]), (ValueError, "logits", X, L[0, 0]),
    (ValueError, "logits", X, L.to("meta")), (TypeError, "x", X, L.double()), (TypeError, "logits", X.double(), L),
])
def test_errors_name_the_argument(error, argument, x, logits):
    with pytest.raises(error, match=f"^{argument}"):
        functional.bernoulli_log_prob(x, logits)


def test_reference_takes_the_same_arguments():
    torch.testing.assert_close(functional.bernoulli_log_prob(X, L), reference.bernoulli_log_prob(X, L))
