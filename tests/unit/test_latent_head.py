"""sample_mean_kl: torch's own noise from torch's own generator, values and gradients against float64, and when torch
draws instead."""

import _thread
import contextlib
import sys
import threading
import types

import pytest
import torch
from cases import kernels_run
from tolerances import GRADIENT_FACTOR, assert_by_ratio
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastflow import backends, extension, reference
from fastflow.autograd import latent_head
from fastflow.autograd.latent_head import sample_mean_kl

KERNELS = {"fastflow_cpu::latent_head_fwd", "fastflow_cpu::latent_head_bwd"}
# One block of sixteen, blocks and a rest, tiles, more than the generator's words at once, more than one chunk of tiles.
SHAPES = [(1, 16), (1, 17), (31, 1), (4, 8, 3), (100, 16), (64, 33), (1025, 64), (65, 1024), (2, 33289)]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Threads that other tests left behind don't count."""
    if not backends.status()["cpu"].startswith("available"):
        pytest.skip("the CPU library is not built")
    everyone = threading.enumerate
    before = set(everyone()) - {threading.current_thread()}
    monkeypatch.setattr(threading, "enumerate", lambda: [t for t in everyone() if t not in before])


def operands(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for _ in "ml"]


def noise(shape):
    """What the kernel draws: not torch, with which it would be compared in vain."""
    zeros = torch.zeros(shape)
    assert latent_head._fits(zeros, zeros)
    return sample_mean_kl(zeros, zeros)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_and_generator_are_torchs(shape, threads):
    for count, start in ((1, 0), (2, 5), (2, 700)):
        threads(count)
        torch.manual_seed(11)
        torch.rand(start)
        state = torch.get_rng_state()
        expected, after = torch.randn(shape), torch.get_rng_state()
        torch.set_rng_state(state)
        assert (noise(shape) - expected).abs().max() <= 2e-6  # of normals up to 5.8; torch's are as far from exact
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape):
    mean, logvar = operands(shape)
    cotangents = torch.randn(shape), torch.tensor(0.7)
    found = {}
    for name in ("fused", "eager", "truth"):
        inputs = [t.detach().to(torch.float64 if name == "truth" else torch.float32).requires_grad_()
                  for t in (mean, logvar)]
        torch.manual_seed(5)
        eps = noise(shape)
        torch.manual_seed(5)
        if name == "fused":
            results = sample_mean_kl(*inputs)
        else:
            z, kl = reference.gaussian_sample_kl(inputs, eps=eps.to(inputs[0].dtype))
            results = z, kl.mean(0)
        found[name] = *results, *torch.autograd.grad(results, inputs, [c.to(inputs[0].dtype) for c in cotangents])
    for index, what in enumerate(("z", "kl", "grad of mean", "grad of logvar")):
        fused, eager, truth = (found[name][index] for name in ("fused", "eager", "truth"))
        assert_by_ratio(fused, eager, truth, factor=GRADIENT_FACTOR, what=what,
                        magnitude=(mean[0].numel() ** 0.5 if what == "kl" else 0.0))


def test_results_do_not_depend_on_threads(threads):
    both = []
    for count in (1, 2):
        threads(count)
        torch.manual_seed(2)
        inputs = operands((512, 300))
        results = sample_mean_kl(*inputs)
        both.append((*results, *torch.autograd.grad(results, inputs, (results[0].detach(), torch.ones(())))))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_one_gradient_alone_and_second_derivatives():
    mean, logvar = operands((7, 6))
    torch.manual_seed(4)
    eps = noise((7, 6))

    def expected(mean, logvar):
        z, kl = reference.gaussian_sample_kl((mean, logvar), eps=eps)
        return z, kl.mean(0)

    def found(mean, logvar):
        torch.manual_seed(4)
        return sample_mean_kl(mean, logvar)

    for which in (0, 1):
        got, want = (torch.autograd.grad(f(mean, logvar)[which].square().sum(), (mean, logvar), allow_unused=True)
                     for f in (found, expected))
        torch.testing.assert_close(got, want)
    for inputs in (mean,), (logvar,):
        got, want = (torch.autograd.grad(sum(r.sin().sum() for r in f(mean, logvar)), inputs, create_graph=True)[0]
                     for f in (found, expected))
        torch.testing.assert_close(got, want)
        got, want = (torch.autograd.grad(first.square().sum(), (mean, logvar), allow_unused=True)
                     for first in (got, want))
        torch.testing.assert_close(got, want)
    cotangents = torch.randn(5, 7, 6), torch.randn(5)
    got, want = (torch.autograd.grad(f(mean, logvar), (mean, logvar), cotangents, is_grads_batched=True)
                 for f in (found, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30], ids=str)
def test_non_finite_parameters(value):
    for which in (0, 1):
        inputs = operands((5, 9))
        with torch.no_grad():
            inputs[which][2, 3] = value
        torch.manual_seed(1)
        eps = noise((5, 9))
        torch.manual_seed(1)
        z, kl = sample_mean_kl(*inputs)
        expected, kls = reference.gaussian_sample_kl(inputs, eps=eps)
        torch.testing.assert_close(z, expected, equal_nan=True)
        torch.testing.assert_close(kl, kls.mean(0), equal_nan=True)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def runs_kernel(mean, logvar):
    cotangents = torch.ones_like(mean), torch.ones((), dtype=mean.dtype)
    return kernels_run(lambda: torch.autograd.grad(sample_mean_kl(mean, logvar), (mean, logvar),
                                                   cotangents)) == KERNELS


def test_where_torch_draws_its_noise_is_its_own_to_the_bit():
    assert runs_kernel(*operands((4, 8)))
    turned = [t.detach().t().requires_grad_() for t in operands((8, 4))]
    for mean, logvar in (operands((4, 8), torch.float64), operands((3, 5)), turned):
        assert not runs_kernel(mean, logvar)
        torch.manual_seed(0)
        expected = torch.randn_like(logvar)
        torch.manual_seed(0)
        zeros = torch.zeros_like(logvar)
        assert torch.equal(sample_mean_kl(zeros, zeros)[0], expected)
    with backends.use_backend("reference"):
        assert not runs_kernel(*operands((4, 8)))


def test_torch_draws_while_other_threads_might(monkeypatch):
    """Between a look at the generator's state and setting it, another thread could draw the same numbers."""
    class Monitor(threading.Thread):
        """As tqdm's, which redraws bars and draws no numbers."""

    done = threading.Event()
    for kind, alone in ((threading.Thread, False), (Monitor, True)):
        monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(TMonitor=Monitor))
        done.clear()
        other = kind(target=done.wait)
        other.start()
        try:
            assert runs_kernel(*operands((4, 8))) == alone
        finally:
            done.set()
            other.join()
    assert runs_kernel(*operands((4, 8)))


def test_a_torch_that_draws_otherwise_is_left_to_itself(monkeypatch):
    """The kernel's noise is compared with torch's once; a torch whose numbers or state are others draws them."""
    randn = torch.randn
    latent_head.draws_as_torch.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randn", lambda *sizes, **kwargs: randn(*sizes, **kwargs) + 1e-3)
            assert not runs_kernel(*operands((4, 8)))
        latent_head.draws_as_torch.cache_clear()
        assert runs_kernel(*operands((4, 8)))
    finally:
        latent_head.draws_as_torch.cache_clear()


def test_torch_draws_in_a_thread_that_python_did_not_start():
    """The main thread is another one, though the only one that is listed."""
    found, done = [], threading.Event()

    def call():
        try:
            found.append(runs_kernel(*operands((4, 8))))
        finally:
            done.set()

    _thread.start_new_thread(call, ())
    assert done.wait(60)
    assert found == [False]


@pytest.mark.parametrize("settings", [lambda: default_dtype(torch.float64), lambda: torch.device("meta"),
                                      lambda: FakeTensorMode(allow_non_fake_inputs=True)],
                         ids=["dtype", "device", "mode"])
def test_what_torch_draws_is_asked_whatever_the_callers_settings(settings):
    latent_head.draws_as_torch.cache_clear()
    try:
        with settings():
            assert latent_head.draws_as_torch()
    finally:
        latent_head.draws_as_torch.cache_clear()


def test_a_graph_of_make_fx_draws_at_every_run():
    mean, logvar = (t.detach() for t in operands((4, 8)))
    graph = make_fx(lambda m, s: sample_mean_kl(m, s)[0])(mean, logvar)
    results = []
    for call in (graph, graph, sample_mean_kl):
        torch.manual_seed(6)
        results.append(call(mean, logvar))
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2][0])


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad])
def test_under_transforms_and_compilers(transform):
    mean, logvar = operands((4, 16))
    if transform is torch.func.grad:
        found = torch.func.grad(lambda m: sample_mean_kl(m, logvar.detach())[1])(mean.detach())
        torch.testing.assert_close(found, mean.detach() / 4)
    else:
        kl = torch.func.vmap(lambda m, s: sample_mean_kl(m, s)[1], randomness="different")(
            mean.detach()[:, None], logvar.detach()[:, None])
        torch.testing.assert_close(kl.mean(), sample_mean_kl(mean, logvar)[1].detach())
    compiled = torch.compile(sample_mean_kl, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(mean, logvar)[1], sample_mean_kl(mean, logvar)[1])


def test_schema_says_that_the_state_moves():
    schema = extension.load("cpu")["latent_head_fwd"]._schema
    assert schema.arguments[2].alias_info.is_write
