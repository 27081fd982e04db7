"""torch.compile: one full graph with a dynamic batch, no graph break, few compilations, forward and backward."""

import pytest
import torch
from cases import (
    AFFINE_CASES,
    CONV_CASES,
    CPU_CASES,
    GAUSSIAN_CASES,
    SLOGDET_CASES,
    cotangents_of,
    evaluate,
    kernels_run,
    one_of_each_op,
)
from tolerances import assert_bitwise
from torch._dynamo.utils import counters

from fastflow import extension, functional

BATCHES = (5, 7, 33)
# The reference is eager PyTorch, which torch.compile traces op by op: slow, and no code of ours beyond one call each.
TRACED = (AFFINE_CASES[0], SLOGDET_CASES[0], GAUSSIAN_CASES[0])


def compiled(case, **options):
    """case.call compiled, as a function of the operands in the case's order."""
    names = tuple(case.shapes)

    @torch.compile(fullgraph=True, **options)
    def call(*operands):
        return case.call(dict(zip(names, operands, strict=True)))

    return call


def leaves_of(case, tensors, mark=False):
    """The operands with gradients asked of them, their batch marked dynamic."""
    leaves = {n: t.detach().requires_grad_(n in case.differentiable) for n, t in tensors.items()}
    if mark:
        for name, t in leaves.items():
            dim = case.batch_dim(name)
            if dim is not None and t.shape[dim] > 1:
                torch._dynamo.mark_dynamic(t, dim)
    return leaves


def check(case, call, tensors, mark=False):
    """Results and gradients of the compiled call equal those of the plain one."""
    leaves = leaves_of(case, tensors, mark)
    results = dict(zip(case.outputs, call(*leaves.values()), strict=True))
    cotangents = cotangents_of(case, tensors)
    grads = torch.autograd.grad([results[n] for n in cotangents], [leaves[n] for n in case.differentiable],
                                list(cotangents.values()))
    want_results, want_grads = evaluate(case, tensors, cotangents=cotangents)
    for name, t in results.items():
        torch.testing.assert_close(t.detach(), want_results[name], rtol=1e-5, atol=1e-5,
                                   msg=lambda m, n=name: f"{n}: {m}")
        assert t.dtype == want_results[name].dtype and t.stride() == want_results[name].stride(), name
    for name, grad in zip(case.differentiable, grads, strict=True):
        torch.testing.assert_close(grad, want_grads[name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", one_of_each_op(CPU_CASES), ids=str)
def test_aot_eager_with_a_dynamic_batch(case, backend, device):
    """Several batch sizes, at most two compilations, no break; the sizes are marked dynamic, which raises if the code
    specialises on them; and the compiled graph runs the backend's own kernels."""
    if backend == "reference" and case not in TRACED:
        return pytest.skip("the reference is traced once per op")
    call = compiled(case, backend="aot_eager", dynamic=True)
    for batch in BATCHES:
        check(case, call, case.tensors(torch.float32, device, batch=batch), mark=True)
    leaves = leaves_of(case, case.tensors(torch.float32, device, batch=12), mark=True)
    ran = {name.split("::")[0] for name in kernels_run(lambda: call(*leaves.values()))}
    assert ran == ({f"fastflow_{backend}"} if backend != "reference" else set())
    assert counters["stats"]["unique_graphs"] in (1, 2), dict(counters["stats"])
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])


@pytest.mark.parametrize("case", (AFFINE_CASES[2], SLOGDET_CASES[1], GAUSSIAN_CASES[1]), ids=str)
def test_without_a_gradient_and_in_inference_mode(case, fused, device):
    call = compiled(case, backend="aot_eager", dynamic=True)
    tensors = case.tensors(torch.float32, device)
    want = evaluate(case, tensors)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for name, t in zip(case.outputs, call(*tensors.values()), strict=True):
                torch.testing.assert_close(t, want[name], rtol=1e-5, atol=1e-5)
    assert sum(counters["graph_break"].values()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype, fused, device):
    for case in (AFFINE_CASES[1], GAUSSIAN_CASES[0]):
        call = compiled(case, backend="aot_eager", dynamic=True)
        tensors = case.tensors(dtype, device)
        leaves = [t.detach().requires_grad_(n in case.differentiable) for n, t in tensors.items()]
        results = call(*leaves)
        want, _ = evaluate(case, tensors)
        for name, t in zip(case.outputs, results, strict=True):
            assert t.dtype == want[name].dtype
            torch.testing.assert_close(t.detach(), want[name])
        grads = torch.autograd.grad([t.sum() for t in results], [t for t in leaves if t.requires_grad])
        assert all(g.dtype == t.dtype for g, t in zip(grads, [t for t in leaves if t.requires_grad], strict=True))


def test_noise_is_drawn_anew_by_every_call_of_a_compiled_function(backend, device):
    """The seed is drawn inside the graph, not frozen at compilation, and torch.manual_seed reproduces it."""
    params = torch.randn(3, 8, device=device)
    call = torch.compile(lambda p: functional.gaussian_sample_kl(p)[0], fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = call(params), call(params)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(call(params), first)
    seed = torch.tensor(5, device=device)
    given = torch.compile(lambda p, s: functional.gaussian_sample_kl(p, seed=s)[0], fullgraph=True, backend="aot_eager")
    one = given(params, seed)
    assert torch.equal(one, functional.gaussian_sample_kl(params, seed=5)[0])
    assert not torch.equal(given(params, seed + 1), one)


@pytest.mark.skipif(extension.NUMBER == "int", reason="torch's stable ABI takes no symbols here")
def test_numbers_that_vary_share_a_graph(fused, device):
    call = torch.compile(lambda p, k, s: functional.gaussian_sample_kl(p, n_samples=k, seed=s, offset=k),
                         fullgraph=True, backend="aot_eager")
    params = torch.randn(3, 8, device=device, requires_grad=True)
    for s in (3, 4, 7, -1, 2**31, -2**62 + 1):
        want = functional.gaussian_sample_kl(params, n_samples=2 + s % 3, seed=s, offset=2 + s % 3)
        assert_bitwise(call(params, 2 + s % 3, s)[0], want[0], str(s))
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"], dict(counters["stats"])


def test_own_passive_channels_compile_with_dynamic_channels(backend, device):
    """Half the channels as an int, computed from the shape while tracing."""
    def half(x, params):
        return functional.affine_coupling(x, params, scale="tanh", passive=-(x.shape[1] // 2))

    call = torch.compile(half, fullgraph=True, dynamic=True, backend="aot_eager")
    for channels in (4, 6):
        x, params = (torch.randn(3, channels, 5, device=device, requires_grad=True) for _ in range(2))
        got, want = call(x, params), half(x, params)
        grads = [torch.autograd.grad(y.sum() + logdet.sum(), (x, params)) for y, logdet in (got, want)]
        for out, expected in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
            assert_bitwise(out, expected)


def test_a_model_with_a_conditioner_compiles_whole(backend, device):
    """Convolution, coupling, 1x1 weight and log-det in one graph, under autocast, with channels_last."""
    net = torch.nn.Conv2d(4, 8, 3, padding=1).to(device)
    weight = torch.nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0].to(device))

    def model(x):
        logdet = functional.slogdet(weight)[1] * x.shape[2] * x.shape[3]
        x = torch.nn.functional.conv2d(x, weight[..., None, None])
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            params = net(x)
        return functional.affine_coupling(x, params, scale="sigmoid", logdet=logdet.expand(x.shape[0]), passive=x)

    call = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        x = torch.randn(batch, 4, 6, 6, device=device).to(memory_format=torch.channels_last)
        grads = []
        for function in (call, model):
            y, logdet = function(x)
            assert y.dtype == logdet.dtype == torch.float32
            loss = y.square().sum() - logdet.sum()
            grads.append([y, logdet, *torch.autograd.grad(loss, [weight, *net.parameters()])])
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert sum(counters["graph_break"].values()) == 0


@pytest.mark.parametrize("case", (
    AFFINE_CASES[0], SLOGDET_CASES[1], GAUSSIAN_CASES[1],
    *(pytest.param(case, marks=pytest.mark.slow) for case in (AFFINE_CASES[3], *SLOGDET_CASES[2:], CONV_CASES[0]))),
    ids=lambda c: f"{c.op}-{c}")
def test_inductor_once_per_op(case, fused, device):
    call = compiled(case, dynamic=True)
    for batch in (5, 7):
        check(case, call, case.tensors(torch.float32, device, batch=batch))
    assert counters["stats"]["unique_graphs"] <= 2 and sum(counters["graph_break"].values()) == 0


@pytest.mark.parametrize("case", CPU_CASES, ids=str)
def test_export(case, fused, device):
    """torch.export traces the op into one graph with a dynamic batch."""
    tensors = case.tensors(torch.float32, device, batch=5)

    class Module(torch.nn.Module):
        def forward(self, operands):
            return case.call(operands)

    batch = torch.export.Dim("batch", min=2, max=1000)
    dims = {n: case.batch_dim(n) for n in tensors}
    shapes = {n: {dims[n]: batch} if dims[n] is not None and t.shape[dims[n]] == 5 else None
              for n, t in tensors.items()}
    program = torch.export.export(Module(), (tensors,), dynamic_shapes=(shapes,))
    other = case.tensors(torch.float32, device, batch=9)
    for got, want in zip(program.module()(other), case.call(other), strict=True):
        torch.testing.assert_close(got, want)
