"""slogdet, slogdet_inverse and plu_weight: values and gradients, structure (permutations, signs, batches) and what is
singular, empty or not finite."""

import math

import pytest
import torch
from cases import Case, check_by_ratio, cotangents_of, evaluate
from tolerances import GRADIENT_FACTOR, assert_bitwise

from fastflow import backends, functional, reference
from fastflow.functional import plu_weight, slogdet, slogdet_inverse

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 49, 64, 65, 96]


def well_conditioned(shape, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(w)[0] * torch.linspace(0.5, 2, shape[-1], dtype=torch.float64)).to(device, dtype)


def skip_above_limit(backend, size):
    if backend == "triton" and size > 32:
        pytest.skip("the Triton kernel refuses what does not fit in registers")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_at_every_size(size, dtype, backend, device):
    skip_above_limit(backend, size)
    for op in ("slogdet", "slogdet_inverse"):
        case = Case(op, op, {"weight": (3, size, size)})
        tensors = {"weight": well_conditioned((3, size, size), dtype, device)}
        if dtype == torch.float64:  # the truth is torch's float64, with rounding errors that grow with the size
            cotangents = cotangents_of(case, tensors)
            results, grads = evaluate(case, tensors, cotangents=cotangents)
            for got, want in zip((results, grads), evaluate(case, tensors, cotangents=cotangents, module=reference),
                                 strict=True):
                for name, t in got.items():
                    torch.testing.assert_close(t, want[name], rtol=1e-13, atol=2e-15 * size,
                                               msg=lambda m, n=name: f"{n}: {m}")
        else:  # the inverse is log|det|'s gradient; test_slogdet_accuracy.py holds the medians to 1.5x
            results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors),
                                            value_factor=GRADIENT_FACTOR)
        assert set(results["sign"].tolist()) <= {-1.0, 1.0}
    identity = tensors["weight"].double() @ results["inverse"].double()
    eye = torch.eye(size, dtype=torch.float64, device=device).expand_as(identity)
    torch.testing.assert_close(identity, eye, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, backend, device):
    """Results float64 for float64, else float32; the gradient in the weight's dtype."""
    case = Case("inverse", "slogdet_inverse", {"weight": (2, 6, 6)})
    tensors = {"weight": well_conditioned((2, 6, 6), dtype, device)}
    results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in results.values()} == {expected} and grads["weight"].dtype == dtype


@pytest.mark.parametrize("batch", [(), (1,), (7,), (8,), (9,), (16,), (17,), (2, 3), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("size", [3, 12, 20])
def test_batch_shapes(batch, size, backend, device):
    """Any leading dims; a matrix gives the same alone, in a batch of 8 and as the ninth of 9."""
    w = well_conditioned((*batch, size, size), torch.float32, device)
    sign, logabsdet, inverse = slogdet_inverse(w)
    assert sign.shape == logabsdet.shape == batch and inverse.shape == w.shape
    flat = w.reshape(-1, size, size)
    for i in {0, len(flat) // 2, len(flat) - 1}:
        alone = slogdet_inverse(flat[i])
        for got, want in zip((sign.reshape(-1)[i], logabsdet.reshape(-1)[i], inverse.reshape(-1, size, size)[i]), alone,
                             strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for got, want in zip(slogdet(w), (sign, logabsdet), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0), (0, 0, 0), (0, 0), (3, 0, 2, 2)], ids=str)
def test_empty(shape, backend, device):
    """Like torch.linalg: an empty batch gives empty results, a 0x0 matrix has determinant 1."""
    w = torch.zeros(shape, device=device, requires_grad=True)
    sign, logabsdet, inverse = slogdet_inverse(w)
    want_sign, want_logabsdet = torch.linalg.slogdet(w)
    assert_bitwise(sign, want_sign)
    assert_bitwise(logabsdet, want_logabsdet)
    assert inverse.shape == shape
    (grad,) = torch.autograd.grad(logabsdet.sum() + inverse.sum(), w)
    assert grad.shape == shape
    assert [t.shape for t in slogdet(w)] == [want_sign.shape] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 33, 48, 60])
def test_permutations_have_log_det_zero_and_their_parity(size, backend, device):
    """Pivoting must follow every row exchange: exact, for every one of 20 permutations."""
    skip_above_limit(backend, size)
    generator = torch.Generator().manual_seed(size)
    perms = torch.stack([torch.randperm(size, generator=generator) for _ in range(20)])
    w = torch.eye(size)[perms].to(device)
    sign, logabsdet, inverse = slogdet_inverse(w)
    parity = []
    for perm in perms.tolist():
        seen, cycles = set(), 0
        for start in range(size):
            cycles += start not in seen
            while start not in seen:
                seen.add(start)
                start = perm[start]
        parity.append((-1.0) ** (size - cycles))
    assert sign.tolist() == parity
    assert_bitwise(logabsdet.abs(), torch.zeros(20, device=device))
    assert_bitwise(inverse + 0.0, w.mT + 0.0)


def test_negative_determinants_and_scaling(backend, device):
    """sign flips with a row's sign and log|cA| = log|A| + C log|c|, over a range where det itself over- and
    underflows."""
    w = well_conditioned((4, 10, 10), torch.float64, device)
    sign, logabsdet = slogdet(w)
    flipped = w.clone()
    flipped[:, 3] *= -1
    assert_bitwise(slogdet(flipped)[0], -sign)
    for c in (1e-40, 1e40):
        scaled_sign, scaled = slogdet(c * w)
        assert_bitwise(scaled_sign, sign)
        torch.testing.assert_close(scaled, logabsdet + 10 * math.log(c), rtol=1e-13, atol=0)


def test_log_det_of_a_product(backend, device):
    a, b = (well_conditioned(shape, torch.float64, device) for shape in ((5, 9, 9), (1, 9, 9)))
    (sign_a, log_a), (sign_b, log_b), (sign, log) = slogdet(a), slogdet(b), slogdet(a @ b)
    assert_bitwise(sign, sign_a * sign_b)
    torch.testing.assert_close(log, log_a + log_b, rtol=1e-12, atol=1e-12)


def test_tiny_pivots_are_not_taken_for_zero(backend, device):
    """No threshold: diag(1e-11, 1) and a float32 subnormal are regular; det underflows, log|det| does not."""
    diagonals = [1e-11, 1.0, 1.0], [1e-20, 1e-20, 1e-20], [1e-30, 1e30, 1.0]
    w = torch.stack([torch.diag(torch.tensor(d)) for d in diagonals])
    sign, logabsdet = slogdet(w.to(device))
    assert sign.tolist() == [1, 1, 1]
    torch.testing.assert_close(logabsdet.cpu().double(), w.double().diagonal(dim1=1, dim2=2).log().sum(1), rtol=1e-6,
                               atol=1e-6)


SINGULAR = {
    "zeros": lambda n: torch.zeros(n, n),
    "zero_row": lambda n: torch.eye(n).index_fill(0, torch.tensor([n - 1]), 0.0),
    "zero_column": lambda n: torch.eye(n).index_fill(1, torch.tensor([0]), 0.0),
    "ones": lambda n: torch.ones(n, n),
}


@pytest.mark.parametrize("name", SINGULAR)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 9, 20, 50])
def test_singular_matrices_spoil_no_other(name, size, backend, device):
    """Exactly singular: sign 0, log|det| -inf, inverse NaN, no exception; its neighbours keep their bits."""
    skip_above_limit(backend, size)
    good = well_conditioned((9, size, size), torch.float32, device)
    for place in (0, 4, 8):
        bad = good.clone()
        bad[place] = SINGULAR[name](size)
        sign, logabsdet, inverse = slogdet_inverse(bad)
        assert sign[place] == 0 and logabsdet[place] == -math.inf and torch.isnan(inverse[place]).all()
        keep = torch.arange(9, device=device) != place
        for got, want in zip((sign, logabsdet, inverse), slogdet_inverse(good), strict=True):
            assert_bitwise(got[keep], want[keep], f"{name} at {place}")
        assert_bitwise(slogdet(bad)[1], logabsdet)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 17, 33, 48, 49, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_equal_rows_are_singular_without_rounding(size, dtype, fused, device):
    """Multipliers are quotients, so equal rows cancel exactly: a product with the pivot's reciprocal would leave 1e-17
    of one matrix in eight, and torch.linalg does of most."""
    skip_above_limit(fused, size)
    w = torch.randn(64, size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype)
    w[:, -1] = w[:, 0]
    sign, logabsdet, inverse = slogdet_inverse(w.to(device))
    assert not sign.any() and (logabsdet == -math.inf).all() and torch.isnan(inverse).all()


def test_gradient_of_a_batch_with_a_singular_matrix(backend, device):
    """The regular matrices' gradients are right; the singular one's is not finite and raises nothing."""
    w = well_conditioned((3, 4, 4), torch.float32, device)
    w[1] = 0.0
    w.requires_grad_()
    (grad,) = torch.autograd.grad(slogdet(w)[1].sum(), w)
    assert not torch.isfinite(grad[1]).any()
    want = torch.linalg.inv(w[[0, 2]].detach().double()).mT
    torch.testing.assert_close(grad[[0, 2]].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["create_graph", "grad", "jacrev", "jvp"])
def test_derivatives_of_a_batch_with_broken_matrices(how, backend, device):
    """The same where they must be differentiable or a transform asks for them, of log-determinant and inverse, for a
    singular matrix and one with an infinity and one with a NaN."""
    w = well_conditioned((4, 3, 3), torch.float64, device)
    w[1], w[2, 0, 1], w[3, 1, 1] = 0.0, math.inf, math.nan
    weights = torch.randn(3, 3, dtype=torch.float64, device=device)

    def total(w):
        _, logabsdet, inverse = slogdet_inverse(w)
        return logabsdet + (inverse * weights).sum((-2, -1)) + slogdet(w)[1]

    context = backends.use_backend(backend if how == "create_graph" else None)
    with context:
        if how == "create_graph":
            leaf = w.clone().requires_grad_()
            (found,) = torch.autograd.grad(total(leaf)[0], leaf, create_graph=True)
            (second,) = torch.autograd.grad(found[0].sum(), leaf)
            assert second[0].isfinite().all()
        elif how == "grad":
            found = torch.func.grad(lambda w: total(w).sum())(w)
        elif how == "jacrev":
            found = torch.func.jacrev(total)(w)[torch.arange(4), torch.arange(4)]
        else:
            found = torch.func.jvp(total, (w,), (torch.ones_like(w),))[1]
    assert torch.isnan(found[1:]).all()
    inverse = torch.linalg.inv(w[0])
    want = 2 * inverse.mT - inverse.mT @ weights @ inverse.mT
    torch.testing.assert_close(found[0], want.sum() if how == "jvp" else want)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13, 40, 56])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
def test_one_non_finite_entry(size, poison, backend, device):
    """A pivot search that compares loses a NaN: it must come out, wherever it stands, in its own matrix alone."""
    skip_above_limit(backend, size)
    good = well_conditioned((9, size, size), torch.float32, device)
    clean = slogdet_inverse(good)
    last = size - 1
    for place, row, column in {(0, 0, 0), (4, last, 0), (8, 0, last), (3, last, last), (7, size // 2, size // 3)}:
        bad = good.clone()
        bad[place, row, column] = poison
        results = slogdet_inverse(bad)
        if math.isnan(poison):
            assert all(torch.isnan(t[place]).all() for t in results), (place, row, column)
        else:
            assert not torch.isfinite(results[1][place])
            assert torch.equal(torch.isnan(results[0]), torch.isnan(results[1]))
            assert torch.isnan(results[2][place]).all()
        keep = torch.arange(9, device=device) != place
        for got, want in zip(results, clean, strict=True):
            assert_bitwise(got[keep], want[keep])


def test_equal_candidates_for_a_pivot(backend, device):
    """All entries of the first column equal in size: an exact integer determinant, whichever is taken."""
    w = torch.tensor([[1.0, 2, 3], [1, 4, 9], [-1, 8, 20]], device=device)
    sign, logabsdet, inverse = slogdet_inverse(w)
    determinant = 1 * (4 * 20 - 9 * 8) - 2 * (20 + 9) + 3 * (8 + 4)
    assert sign.item() == math.copysign(1, determinant)
    assert math.exp(logabsdet) == pytest.approx(abs(determinant), rel=1e-6)


class TestPluWeight:
    def operands(self, n, size, dtype=torch.float64, device="cpu"):
        return Case("plu", "plu_weight", {"lower": (n, size, size), "upper": (n, size, size), "log_s": (n, size),
                                          "sign_s": (n, size), "perm": (n, size)}).tensors(dtype, device)

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 12, 33, 48, 96])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_values_and_gradients(self, size, dtype, backend, device):
        case = Case("plu", "plu_weight", {"lower": (3, size, size), "upper": (3, size, size), "log_s": (3, size),
                                          "sign_s": (3, size), "perm": (3, size)})
        tensors = {n: t * 0.3 if n in ("lower", "upper", "log_s") else t
                   for n, t in case.tensors(dtype, device).items()}
        results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
        assert results["weight"].dtype == dtype
        assert not grads["lower"].triu().any() and not grads["upper"].tril().any()

    def test_against_the_definition_one_entry_at_a_time(self, backend, device):
        t = self.operands(2, 4, device=device)
        w = plu_weight(**t)
        for n in range(2):
            low = torch.eye(4, dtype=torch.float64) + t["lower"][n].cpu().tril(-1)
            up = t["upper"][n].cpu().triu(1) + torch.diag(t["sign_s"][n].cpu() * t["log_s"][n].cpu().exp())
            for i in range(4):
                row = low[t["perm"][n, i].item()] @ up
                torch.testing.assert_close(w[n, i].cpu(), row, rtol=1e-13, atol=1e-13)

    def test_log_det_is_the_sum_of_log_s(self, backend, device):
        t = self.operands(5, 6, device=device)
        sign, logabsdet = functional.slogdet(plu_weight(**t))
        torch.testing.assert_close(logabsdet, t["log_s"].sum(1), rtol=1e-11, atol=1e-11)
        parity = torch.linalg.det(torch.eye(6, dtype=torch.float64, device=device)[t["perm"]])
        torch.testing.assert_close(sign, t["sign_s"].prod(1) * parity, rtol=1e-12, atol=0)

    def test_signs_carry_no_gradient(self, backend, device):
        t = self.operands(2, 4, device=device)
        assert not plu_weight(**{**t, "sign_s": t["sign_s"].requires_grad_()}).requires_grad
        t["log_s"].requires_grad_()
        plu_weight(**t).sum().backward()
        assert t["sign_s"].grad is None and t["log_s"].grad is not None

    @pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
    def test_empty(self, shape, backend, device):
        t = self.operands(*shape, device=device)
        leaves = {n: v.requires_grad_(n in ("lower", "upper", "log_s")) for n, v in t.items()}
        w = plu_weight(**leaves)
        assert w.shape == (*shape, shape[1])
        w.sum().backward()
        assert leaves["lower"].grad.shape == w.shape and leaves["log_s"].grad.shape == shape

    def test_parts_that_are_not_read_may_hold_anything(self, backend, device):
        """What stands on and above lower's diagonal, and on and below upper's, is ignored, NaN included."""
        t = self.operands(2, 5, device=device)
        clean = plu_weight(**t)
        mask = torch.ones(5, 5, dtype=torch.bool, device=device).triu()
        lower, upper = t["lower"].masked_fill(mask, math.nan), t["upper"].masked_fill(mask.mT, math.nan)
        assert_bitwise(plu_weight(**{**t, "lower": lower, "upper": upper}), clean)
        assert_bitwise(reference.plu_weight(**t), reference.plu_weight(**{**t, "lower": t["lower"].tril(-1)}))
