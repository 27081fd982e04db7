"""Memory layouts: every operand in every layout, incoming gradients in every layout, odd and zero sizes, and the memory
format of what comes out."""

import layouts
import pytest
import torch
from cases import CASES, CPU_CASES, FULL_PRECISION, Case, check_by_ratio, cotangents_of, evaluate
from tolerances import assert_bitwise

from fastflow import functional

every_layout = pytest.mark.parametrize("layout", layouts.ALL, ids=layouts.by_name)
by_case = pytest.mark.parametrize("case", CPU_CASES, ids=str)
SUGGEST = torch._prims_common.suggest_memory_format


def in_layout(layout, tensors, names):
    """``tensors`` with those of ``names`` in ``layout``; vectors and masks of indices stay as they are."""
    return {name: layout(t) if name in names and t.dim() >= 2 and name != "perm" else t for name, t in tensors.items()}


@every_layout
@by_case
def test_every_operand_in_every_layout(case, layout, fused, device):
    """One operand at a time, then all, by the ratio rule (nothing promises the same bits for another layout)."""
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    for names in [(name,) for name in tensors] + [tuple(tensors)]:
        if case.op.startswith("slogdet") and layout in layouts.STRIDE_ZERO[1:]:
            continue  # equal rows or columns: singular, covered by its own tests
        check_by_ratio(case, in_layout(layout, tensors, names), cotangents=cotangents, what=f"{names}")


@every_layout
@by_case
def test_incoming_gradients_in_every_layout(case, layout, fused, device):
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    check_by_ratio(case, tensors, cotangents=in_layout(layout, cotangents, tuple(cotangents)), what=layout.__name__)


@by_case
def test_gradients_of_sums(case, backend, device):
    """.sum() hands out gradients whose strides are all zero; a transposed sum and a cat's split hand out views."""
    tensors = case.tensors(torch.float32, device)
    for name in cotangents_of(case, tensors):
        grads = []
        for reduce in (lambda t: t.sum(), lambda t: t.mT.sum() if t.dim() > 1 else t.flip(0).sum(),
                       lambda t: torch.cat([t, t])[: len(t)].sum()):
            leaves = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in tensors.items()}
            out = dict(zip(case.outputs, case.call(leaves), strict=True))[name]
            grads.append(torch.autograd.grad(reduce(out), [leaves[n] for n in case.differentiable], allow_unused=True))
        for other in grads[1:]:
            for got, want in zip(other, grads[0], strict=True):
                assert (got is None) == (want is None)
                if got is not None:
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        ones = {name: torch.ones(out.shape, dtype=out.dtype, device=device)}
        _, dense = evaluate(case, tensors, cotangents=ones)
        for got, want in zip(grads[0], dense.values(), strict=True):
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", layouts.AMBIGUOUS_SHAPES, ids=str)
@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last, layouts.channel_slice, layouts.padded],
                         ids=layouts.by_name)
def test_ambiguous_channels_last_shapes(shape, layout, fused, device):
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    for case in (Case("affine", "affine_coupling", {"x": shape, "params": doubled, "passive": shape},
                      {"scale": "tanh"}),
                 Case("pair", "affine_coupling", {"x": shape, "raw": shape, "shift": shape}, {"inverse": True}),
                 Case("gaussian", "gaussian_sample_kl", {"params": doubled}, {"seed": 3, "reduce": "channel"})):
        tensors = case.tensors(torch.float32, device)
        cotangents = cotangents_of(case, tensors)
        for names in [(name,) for name in tensors] + [tuple(tensors)]:
            check_by_ratio(case, in_layout(layout, tensors, names), cotangents=cotangents, what=f"{names}")


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 4, 3, 4, 5), (3, 4, 6), (3, 4), *layouts.AMBIGUOUS_SHAPES],
                         ids=str)
@pytest.mark.parametrize("layout", layouts.ALL, ids=layouts.by_name)
def test_memory_format_of_y_is_x_s(shape, layout, backend, device):
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    for inverse, passive in ((False, False), (True, True)):
        case = Case("format", "affine_coupling",
                    {"x": shape, "params": doubled, **({"passive": shape} if passive else {})}, {"inverse": inverse})
        tensors = case.tensors(torch.float32, device)
        tensors["x"] = layout(tensors["x"])
        y = evaluate(case, tensors)[0]["y"]
        assert y.is_contiguous(memory_format=SUGGEST(tensors["x"])), (y.stride(), tensors["x"].stride())


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (2, 4, 3, 4, 5), (3, 4, 6), (3, 4)], ids=str)
@pytest.mark.parametrize("layout", layouts.ALL, ids=layouts.by_name)
def test_memory_format_of_gradients_is_their_operand_s(shape, layout, backend, device):
    """One dense gradient buffer in the params' own format, which the conditioner's backward takes as it is."""
    doubled = (shape[0], 2 * shape[1], *shape[2:])
    for case in (Case("packed", "affine_coupling", {"x": shape, "params": doubled}, {"layout": "interleave"}),
                 Case("pair", "affine_coupling", {"x": shape, "raw": shape, "shift": shape}),
                 Case("additive", "affine_coupling", {"x": shape, "params": shape}, {"scale": "additive"}),
                 Case("gaussian", "gaussian_sample_kl", {"params": doubled}, {"seed": 3}),
                 Case("gaussian_pair", "gaussian_sample_kl", {"mean": shape, "raw": shape}, {"seed": 3})):
        tensors = case.tensors(torch.float32, device)
        cotangents = cotangents_of(case, tensors)
        tensors = in_layout(layout, tensors, tuple(tensors))
        for name, grad in evaluate(case, tensors, cotangents=cotangents)[1].items():
            if name != "x" or backend != "reference":  # of x only kernels promise it
                assert grad.is_contiguous(memory_format=SUGGEST(tensors[name])), (case.name, name, grad.stride())


@pytest.mark.parametrize("packing", ["chunk", "interleave"])
def test_memory_format_of_gradients_that_are_differentiable(packing, backend, device):
    """As of the first gradient; and gradients of gradients and batches of them are right in that format."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device)
    params = torch.randn(2, 6, 4, 5, dtype=torch.float64, device=device).to(memory_format=torch.channels_last)
    params.requires_grad_()

    def losses(params):
        y, logdet = functional.affine_coupling(x, params, layout=packing)
        z, kl = functional.gaussian_sample_kl(params, layout=packing, seed=1)
        return torch.stack([y.square().sum() + logdet.square().sum(), z.square().sum() + kl.square().sum()])

    for loss in losses(params):
        (grad,) = torch.autograd.grad(loss, params, create_graph=True)
        assert grad.is_contiguous(memory_format=torch.channels_last)
        (second,) = torch.autograd.grad(grad.square().sum(), params, retain_graph=True)
        assert second.isfinite().all()
    rows = torch.stack([torch.autograd.grad(loss, params, retain_graph=True)[0] for loss in losses(params)])
    torch.testing.assert_close(torch.autograd.functional.jacobian(losses, params, vectorize=True), rows)
    assert torch.autograd.gradgradcheck(lambda p: losses(p).sum(), (params,), nondet_tol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 5), (2, 4, 2, 2, 2, 2)], ids=len)
def test_gradients_of_other_ranks_are_contiguous_whatever_comes_in(shape, create_graph, backend, device):
    parts = [torch.randn(shape, device=device, requires_grad=True) for _ in range(2)]
    incoming = layouts.permuted(torch.randn(shape, device=device))
    y, _ = functional.affine_coupling(torch.randn(shape, device=device), parts)
    z, _ = functional.gaussian_sample_kl(parts, seed=1)
    for result in (y, z):
        grads = torch.autograd.grad(result, parts, incoming, create_graph=create_graph)
        assert not incoming.is_contiguous() and all(grad.is_contiguous() for grad in grads)


@by_case
def test_other_results_are_contiguous(case, backend, device):
    tensors = in_layout(layouts.channels_last, case.tensors(torch.float32, device), tuple(case.shapes))
    for name, t in evaluate(case, tensors)[0].items():
        assert name == "y" or t.is_contiguous(), (name, t.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@by_case
def test_every_misalignment(case, dtype, fused, device):
    """Operands that begin 1, 2, 3, ... elements into their storage, after an aligned call of the same shape."""
    if case.op in FULL_PRECISION and dtype not in (torch.float32, torch.float64):
        return pytest.skip(f"the kernels of {case.op} take float32 and float64")
    tensors = case.tensors(dtype, device)
    cotangents = cotangents_of(case, tensors)
    aligned = check_by_ratio(case, tensors, cotangents=cotangents)
    for start in (1, 2, 3, 5):
        def shifted(t, start=start):
            flat = torch.full((t.numel() + 8,), 7, dtype=t.dtype, device=t.device)
            return flat[start : start + t.numel()].view(t.shape).copy_(t)

        moved = {name: shifted(t) for name, t in tensors.items()}
        shifted_cotangents = {name: shifted(t) for name, t in cotangents.items()}
        if case.op == "wide_mlp":  # torch's own products, which on some processors round otherwise where data moved
            check_by_ratio(case, moved, cotangents=shifted_cotangents)
            continue
        results, grads = evaluate(case, moved, cotangents=shifted_cotangents)
        for part, want in ((results, aligned[0]), (grads, aligned[1])):
            for name, t in part.items():
                assert_bitwise(t, want[name], f"{case} {name} at offset {start}")


ZERO_SHAPES = [((0, 4), (0, 8)), ((3, 0), (3, 0)), ((0, 4, 2, 2), (0, 8, 2, 2)), ((3, 4, 0), (3, 8, 0)),
               ((3, 4, 0, 5), (3, 8, 0, 5)), ((0, 0, 0), (0, 0, 0)), ((2, 0, 3, 3), (2, 0, 3, 3))]


@pytest.mark.parametrize(("shape", "doubled"), ZERO_SHAPES, ids=str)
@pytest.mark.parametrize("layout", [layouts.contiguous, layouts.channels_last], ids=layouts.by_name)
def test_zero_sizes(shape, doubled, layout, backend, device):
    """Empty in, empty out: log-det and KL of nothing are 0, gradients have their operand's shape, and the next call on
    ordinary operands is right."""
    cases = (Case("affine", "affine_coupling", {"x": shape, "params": doubled, "logdet": shape[:1]}, {"scale": "tanh"}),
             Case("passive", "affine_coupling", {"x": shape, "raw": shape, "shift": shape,
                                                 "passive": (shape[0], 2, *shape[2:])}, {"inverse": True}),
             Case("gaussian", "gaussian_sample_kl", {"params": doubled}, {"seed": 3, "return_logq": True}),
             Case("samples", "gaussian_sample_kl", {"mean": shape, "raw": shape},
                  {"seed": 3, "n_samples": 2, "reduce": "channel", "return_logq": True}),
             Case("prior", "gaussian_sample_kl", {"mean": shape, "raw": shape, "prior_mean": (1, *shape[1:]),
                                                  "prior_raw": (1, *shape[1:])}, {"seed": 3, "reduce": "none"}))
    for case in cases:
        tensors = {name: layout(t) for name, t in case.tensors(torch.float32, device).items()}
        results, grads = check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors))
        for name in ("logdet", "kl", "logq"):
            if name in results and 0 in shape[1:]:
                carried = tensors.get(name, torch.zeros_like(results[name]))
                assert_bitwise(results[name], carried, name)
        for name, t in tensors.items():
            assert grads[name] is None or grads[name].shape == t.shape
    ordinary = CASES[0].tensors(torch.float32, device)
    check_by_ratio(CASES[0], ordinary, cotangents=cotangents_of(CASES[0], ordinary))


def test_no_passive_channels_is_no_passive(backend, device):
    case = Case("none", "affine_coupling", {"x": (3, 4, 5), "params": (3, 8, 5)})
    t = case.tensors(torch.float32, device)
    plain, _ = evaluate(case, t)
    empty, _ = evaluate(case, {**t, "passive": t["x"][:, :0]})
    assert_bitwise(empty["y"], plain["y"])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129])
def test_odd_sizes(size, fused, device):
    for batch in (1, 2, 5):
        for case in (Case("flat", "affine_coupling", {"x": (batch, size), "params": (batch, 2 * size)}),
                     Case("channel", "affine_coupling", {"x": (batch, 1, size), "params": (batch, 2, size)},
                          {"layout": "interleave", "scale": "sigmoid"}),
                     Case("gaussian", "gaussian_sample_kl", {"params": (batch, 2 * size)}, {"seed": 1}),
                     Case("gaussian", "gaussian_sample_kl", {"params": (batch, 2, size)},
                          {"seed": 1, "n_samples": 3, "layout": "interleave", "reduce": "channel"})):
            tensors = case.tensors(torch.float32, device)
            check_by_ratio(case, tensors, cotangents=cotangents_of(case, tensors), what=f"{size}")
