"""Gradients: every combination of what requires one and of what is differentiated, finite differences of first and
second order, and the rules of a well-behaved autograd Function."""

import contextlib

import pytest
import torch
from cases import (
    AFFINE_CASES,
    CPU_CASES,
    GAUSSIAN_CASES,
    Case,
    activated_conv_case,
    conv_case,
    cotangents_of,
    evaluate,
    mlp_case,
    noise_of_the_backend,
    subsets,
)
from tolerances import assert_bitwise

from fastflow import functional, reference
from fastflow.backends import use_backend

by_case = pytest.mark.parametrize("case", CPU_CASES, ids=str)


def differentiable_results(case):
    return tuple(name for name in case.outputs if name != "sign")


@by_case
def test_every_requires_grad_mask_and_every_set_of_results(case, fused, device):
    """2^n masks x {each non-empty set of results}: gradients equal the reference's, None elsewhere."""
    tensors = case.tensors(torch.float64, device)
    cotangents = cotangents_of(case, tensors)
    for used in subsets(differentiable_results(case), at_least=1):
        chosen = {name: cotangents[name] for name in used}
        for needs in subsets(case.differentiable):
            results, grads = evaluate(case, tensors, needs=needs, cotangents=chosen)
            want_results, want = evaluate(case, tensors, needs=needs, cotangents=chosen, module=reference)
            assert set(grads) == set(want)
            for name, t in results.items():
                torch.testing.assert_close(t, want_results[name], rtol=1e-11, atol=1e-12)
            for name, grad in grads.items():
                expected = torch.zeros_like(tensors[name]) if want[name] is None else want[name]
                got = torch.zeros_like(tensors[name]) if grad is None else grad
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11,
                                           msg=lambda m, c=(needs, used, name): f"{c}: {m}")


@by_case
def test_requires_grad_of_results(case, backend, device):
    """A result requires a gradient if something that it depends on does; sign never; nothing does under no_grad."""
    tensors = case.tensors(torch.float64, device)
    leaves = {name: t.requires_grad_(name in case.differentiable) for name, t in tensors.items()}
    for name, t in zip(case.outputs, case.call(leaves), strict=True):
        # The log-det of an additive coupling depends on the log-det carried in alone, which this case has.
        assert t.requires_grad == (name != "sign"), name
    with torch.no_grad():
        assert not any(t.requires_grad for t in case.call(leaves))


@by_case
def test_operands_without_a_gradient_get_none(case, backend, device):
    tensors = case.tensors(torch.float64, device)
    for name in case.differentiable:
        leaves = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
        sum(t.sum() for t in case.call(leaves) if t.requires_grad).backward()
        assert [n for n, t in leaves.items() if t.grad is not None] == [name]


@by_case
def test_nothing_is_written_into(case, backend, device):
    """Operands, saved tensors and incoming gradients keep their bytes and versions; a second backward over the same
    graph gives the same bits."""
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    leaves = {name: t.clone().requires_grad_(name in case.differentiable) for name, t in tensors.items()}
    incoming = {name: t.clone() for name, t in cotangents.items()}
    versions = {name: t._version for name, t in {**leaves, **incoming}.items()}
    results = dict(zip(case.outputs, case.call(leaves), strict=True))
    kept = {name: t.detach().clone() for name, t in results.items()}
    grads = [torch.autograd.grad([results[n] for n in incoming], [leaves[n] for n in case.differentiable],
                                 list(incoming.values()), retain_graph=True) for _ in range(2)]
    for name, first, second in zip(case.differentiable, *grads, strict=True):
        assert_bitwise(second, first, name)
    for name, t in leaves.items():
        assert_bitwise(t.detach(), tensors[name], name)
    for name, t in incoming.items():
        assert_bitwise(t, cotangents[name], name)
    for name, t in results.items():
        assert_bitwise(t.detach(), kept[name], name)
    assert versions == {name: t._version for name, t in {**leaves, **incoming}.items()}


@by_case
def test_results_and_gradients_share_no_memory(case, backend, device):
    """No result is a view of an operand, and no two gradients are views of one buffer."""
    tensors = case.tensors(torch.float64, device)
    results, grads = evaluate(case, tensors, cotangents=cotangents_of(case, tensors))
    storages = [t.untyped_storage().data_ptr() for t in (*tensors.values(), *results.values()) if t.numel()]
    assert len(set(storages)) == len(storages)
    owned = [t.untyped_storage().data_ptr() for name, t in grads.items()
             if t is not None and t.numel() and name not in ("logdet", "passive")]
    assert len(set(owned)) == len(owned) and not set(owned) & set(storages)


def small(case, device):
    """The case at its own sizes with leaves in float64 and raw scales away from kinks, for finite differences."""
    return [t.to(device).requires_grad_(name in case.differentiable) for name, t in case.tensors(seed=4).items()]


def as_function(case):
    names = tuple(case.shapes)

    def function(*operands):
        results = dict(zip(case.outputs, case.call(dict(zip(names, operands, strict=True))), strict=True))
        return tuple(results[name] for name in differentiable_results(case))

    return function


@by_case
def test_gradcheck(case, backend, device):
    """Analytic gradients against finite differences along a random direction, and against themselves on a second
    run."""
    assert torch.autograd.gradcheck(as_function(case), small(case, device), fast_mode=True, nondet_tol=0.0)


TINY = (
    Case("exp", "affine_coupling", {"x": (2, 2), "params": (2, 4), "logdet": (2,)}),
    Case("sigmoid_inverse", "affine_coupling", {"x": (2, 2), "raw": (2, 2), "shift": (2, 2), "passive": (2, 1)},
         {"scale": "sigmoid", "inverse": True, "shift_first": True}),
    Case("tanh", "affine_coupling", {"x": (2, 1, 2), "params": (2, 2, 2)},
         {"scale": functional.ScaleMap("tanh", clamp=1.5, eps=0.1, shift_gain=0.5), "layout": "interleave"}),
    Case("softplus_shift_first", "affine_coupling", {"x": (2, 2), "params": (2, 4)},
         {"scale": "softplus", "shift_first": True}),
    Case("atan_inverse", "affine_coupling", {"x": (2, 2), "params": (2, 4)}, {"scale": "atan", "inverse": True}),
    Case("rational", "affine_coupling", {"x": (2, 2), "params": (2, 4)}, {"scale": "rational"}),
    Case("additive", "affine_coupling", {"x": (2, 2), "params": (2, 2), "logdet": (2,)}, {"scale": "additive"}),
    Case("slogdet", "slogdet", {"weight": (2, 3, 3)}),
    Case("slogdet_inverse", "slogdet_inverse", {"weight": (2, 3, 3)}),
    Case("plu_weight", "plu_weight", {"lower": (2, 3, 3), "upper": (2, 3, 3), "log_s": (2, 3), "sign_s": (2, 3),
                                      "perm": (2, 3)}),
    conv_case("conv_net", (1, 1, 2, 2), 16, 1, negative_slope=0.3),
    activated_conv_case("activated_conv", (1, 1, 3, 2), 16, (2, 2), stride=2, padding=1, activation="silu"),
    activated_conv_case("activated_conv_transposed", (1, 16, 1, 2), 1, (3, 2), stride=2, padding=1, transposed=True,
                        activation="silu"),
    mlp_case("mlp_silu", (2, 3, 2), batch=2, activation="silu"),
    mlp_case("mlp_residual_tanh", (2, 2, 2, 2, 1), batch=2, activation="tanh", residual=True),
    mlp_case("wide_mlp", (2, 3, 2), op="wide_mlp", batch=2, activation="silu"),
    Case("rq", "spline", {"x": (2, 2), "params": (2, 10), "logdet": (2,)}),
    Case("rq_soft_inverse", "spline", {"x": (2, 2), "params": (2, 10)}, {"inverse": True, "clamp": 5.0}),
    Case("linear_spline_inverse", "spline", {"x": (2, 1, 2), "params": (2, 3, 2)}, {"kind": "linear", "inverse": True}),
    *(Case(scale, "gaussian_sample_kl", {"params": (2, 4), "eps": (2, 2)}, {"scale": scale, "return_logq": True})
      for scale in reference.SCALES),
    Case("prior_seed", "gaussian_sample_kl",
         {"mean": (2, 2), "raw": (2, 2), "prior_mean": (1, 2), "prior_raw": (1, 2)},
         {"scale": "logstd", "seed": 2, "n_samples": 2, "reduce": "none", "return_logq": True}),
)


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck_exhaustive_and_gradgradcheck(case, backend, device):
    """Every entry of the Jacobian, and of the Jacobian of the gradients: a backward that stashes an intermediate
    without differentiating through it is silently half right, and this is what sees it."""
    operands = small(case, device)
    assert torch.autograd.gradcheck(as_function(case), operands)
    assert torch.autograd.gradgradcheck(as_function(case), operands)


@pytest.mark.parametrize("case", [c for c in TINY if c.op in ("affine_coupling", "gaussian_sample_kl")], ids=str)
def test_second_derivative_of_one_result_alone(case, fused, device):
    """create_graph with the other results unused: the gradient's gradient equals the reference's."""
    tensors = {n: t.to(device) for n, t in case.tensors(seed=4).items()}
    for name in case.outputs:
        found = []
        for module in (functional, reference):
            leaves = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in tensors.items()}
            with noise_of_the_backend(case, tensors) if module is reference else contextlib.nullcontext():
                out = dict(zip(case.outputs, case.call(leaves, module), strict=True))[name]
            if not out.requires_grad:
                continue
            sources = [leaves[n] for n in case.differentiable]
            first = torch.autograd.grad(out.square().sum(), sources, create_graph=True, allow_unused=True)
            penalty = sum(g.square().sum() for g in first if g is not None)
            found.append(torch.autograd.grad(penalty, sources, allow_unused=True))
        for got, want, source in zip(*found, case.differentiable, strict=True) if found else ():
            zeros = torch.zeros_like(tensors[source])
            torch.testing.assert_close(zeros if got is None else got, zeros if want is None else want, rtol=1e-10,
                                       atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh", "atan", "softplus", "rational", "additive"])
def test_log_det_is_that_of_the_autograd_jacobian(scale, inverse, backend, device):
    """Brute force: log|det| of the full Jacobian of x -> y, sign convention included, and fwd + inverse = 0."""
    for seed in range(5):
        channels = 3 if scale == "additive" else 6
        case = Case("jacobian", "affine_coupling", {"x": (1, 3, 2), "params": (1, channels, 2)},
                    {"scale": scale, "inverse": inverse, "shift_first": bool(seed % 2)})
        t = case.tensors(torch.float64, device, seed=seed)
        y, logdet = case.call(t)
        jacobian = torch.autograd.functional.jacobian(lambda x, c=case, t=t: c.call({**t, "x": x})[0], t["x"])
        sign, expected = torch.linalg.slogdet(jacobian.reshape(6, 6))
        assert sign == 1
        torch.testing.assert_close(logdet[0], expected, rtol=1e-12, atol=1e-12)
        back = Case("back", "affine_coupling", case.shapes, {**case.options, "inverse": not inverse})
        x, logdet_back = back.call({**t, "x": y})
        torch.testing.assert_close(x, t["x"], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(logdet_back, -logdet, rtol=1e-13, atol=1e-13)


def test_one_tensor_in_several_roles(fused, device):
    """x as its own scale and shift: the three gradients add up."""
    x = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    y, logdet = functional.affine_coupling(x, (x, x), scale="tanh", passive=x)
    (got,) = torch.autograd.grad(y.square().sum() + logdet.sum(), x)
    y, logdet = reference.affine_coupling(x, (x, x), scale="tanh", passive=x)
    (want,) = torch.autograd.grad(y.square().sum() + logdet.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    eps = torch.randn(3, 5, dtype=torch.float64, device=device)
    z, kl = functional.gaussian_sample_kl((x, x), prior=(x, x), eps=eps)
    (got,) = torch.autograd.grad(z.square().sum() + kl.sum(), x)
    z, kl = reference.gaussian_sample_kl((x, x), prior=(x, x), eps=eps)
    (want,) = torch.autograd.grad(z.square().sum() + kl.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", (AFFINE_CASES[0], GAUSSIAN_CASES[1], GAUSSIAN_CASES[2]), ids=str)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(case, reentrant, fused, device):
    """The recomputed forward draws the same noise, even without torch's RNG state being kept."""
    tensors = case.tensors(torch.float64, device)
    function, grads = as_function(case), []

    def run(*leaves):
        with use_backend(fused):  # also where autograd runs it again, in a thread of its own
            return function(*leaves)

    for checkpointed in (False, True):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        out = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant, preserve_rng_state=False) \
            if checkpointed else run(*leaves)
        grads.append(torch.autograd.grad(sum(o.sin().sum() for o in out), leaves) if not reentrant or not checkpointed
                     else _backward(out, leaves))
    for got, want in zip(*grads, strict=True):
        assert_bitwise(got, want)


def _backward(out, leaves):
    sum(o.sin().sum() for o in out).backward()
    return [t.grad for t in leaves]


def test_softmax_upstream_keeps_what_it_saved(fused, device):
    """An op that wrote into its operand would corrupt the output that softmax saved for its own backward."""
    logits = torch.randn(4, 6, dtype=torch.float64, device=device, requires_grad=True)

    def loss(logits, module):
        x = torch.softmax(logits, 1)
        y, logdet = module.affine_coupling(x, (x.exp(), x.sin()))
        return (y.square().sum() + logdet.sum()) * torch.softmax(y, 1)[0, 0]

    grads = [torch.autograd.grad(loss(logits, m), logits)[0] for m in (functional, reference)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
