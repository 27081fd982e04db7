"""Which backend runs: what is available, what explain() promises, what use_backend() forces, and a spy on what ran."""

import os
import pathlib
import platform
import shutil
import threading
import time

import pytest
import torch
from cases import CPU_CASES, FULL_PRECISION, cotangents_of, evaluate, kernels_run

from fastflow import backends, extension, functional, reference

NAMES = ("reference", "cpu", "triton", "cuda")
KERNELS = {"affine_coupling": ("affine_coupling_fwd", "affine_coupling_bwd"), "slogdet": ("slogdet_fwd",),
           "slogdet_inverse": ("slogdet_fwd",), "plu_weight": ("plu_weight_fwd", "plu_weight_bwd"),
           "gaussian_sample_kl": ("gaussian_fwd", "gaussian_bwd"), "conv_net": ("conv_net_fwd", "conv_net_bwd"),
           "activated_conv": ("activated_conv_fwd", "activated_conv_bwd"),
           "mlp": ("mlp_fwd", "mlp_bwd"), "wide_mlp": ("wide_mlp_fwd", "wide_mlp_bwd"),
           "mlp_flow": ("mlp_flow_fwd", "mlp_flow_bwd"),
           "spline": ("spline_fwd", "spline_bwd"),
           "bernoulli_log_prob": ("bernoulli_log_prob_fwd", "bernoulli_log_prob_bwd")}
by_case = pytest.mark.parametrize("case", CPU_CASES, ids=str)


def test_available_names_every_backend():
    report = backends.available()
    assert set(report) == set(NAMES) and all(type(usable) is bool for usable in report.values())
    assert report["reference"]
    assert set(backends.status()) == set(NAMES)
    for name, usable in report.items():
        assert backends.status()[name].startswith("available" if usable else "not available: ")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine")
def test_cpu_kernels_are_built_where_there_is_a_compiler():
    """Without this, a build that quietly failed would leave every test of the C++ kernels skipped."""
    assert backends.available()["cpu"], backends.status()["cpu"]


@by_case
def test_spy_the_requested_backend_runs_and_no_other(case, backend, device):
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    ran = kernels_run(lambda: evaluate(case, tensors, cotangents=cotangents))
    if backend == "triton":  # launched without the dispatcher in eager mode
        assert not ran
    else:
        assert ran == (set() if backend == "reference" else {f"fastflow_{backend}::{op}" for op in KERNELS[case.op]})


@by_case
def test_spy_no_backward_kernel_without_a_gradient(case, fused, device):
    tensors = case.tensors(torch.float32, device)
    ran = kernels_run(lambda: evaluate(case, tensors, needs=()))
    assert fused == "triton" or ran == {f"fastflow_{fused}::{KERNELS[case.op][0]}"}


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_explain_tells_what_an_unforced_call_uses(case, dtype):
    if case.op in FULL_PRECISION and dtype in (torch.bfloat16, torch.float16):
        return pytest.skip("it takes float32 and float64")
    tensors = case.tensors(dtype)
    promised = backends.explain(case.op, *tensors.values()).split()[0]
    ran = kernels_run(lambda: case.call(tensors))
    assert {name.split("::")[0] for name in ran} == ({f"fastflow_{promised}"} if promised != "reference" else set())
    if backends.available()["cpu"] and not (case.op in FULL_PRECISION and dtype in (torch.bfloat16, torch.float16)):
        assert promised == "cpu", "the C++ kernels are the default without a GPU"


def test_explain_gives_a_reason_and_accepts_pairs():
    x = torch.ones(2, 3)
    for text in (backends.explain("affine_coupling", x, (x, x)), backends.explain("slogdet", torch.eye(3))):
        assert text.split()[0] in NAMES and len(text.split()) > 2
    with backends.use_backend("reference"):
        assert backends.explain("slogdet", torch.eye(3)).split()[0] == "reference"
    for call in (lambda: backends.explain("cube", x), lambda: backends.explain("slogdet"),
                 lambda: backends.explain("slogdet", torch.zeros(()))):
        with pytest.raises(ValueError, match="^(op|tensors)"):
            call()
    for first in (3, None):
        with pytest.raises(TypeError, match="^tensors"):
            backends.explain("slogdet", first)


def test_matrices_beyond_the_table_s_limit_go_to_torch_linalg(monkeypatch):
    """Where the table says that torch.linalg is faster, the reference is promised and used; a request still forces."""
    if not backends.available()["cpu"]:
        pytest.skip(backends.status()["cpu"])
    assert backends.explain("slogdet", torch.empty(1030, 1030)).split()[0] == "cpu"
    monkeypatch.setitem(backends.SLOGDET_LIMIT, "cpu", 16)
    for size, expected in ((16, "cpu"), (17, "reference")):
        w = torch.eye(size)
        assert backends.explain("slogdet", w).split()[0] == expected
        ran = kernels_run(lambda w=w: functional.slogdet(w))
        assert ran == ({"fastflow_cpu::slogdet_fwd"} if expected == "cpu" else set())
    with backends.use_backend("cpu"):
        assert kernels_run(lambda: functional.slogdet(torch.eye(17))) == {"fastflow_cpu::slogdet_fwd"}


def test_meta_tensors_use_the_reference():
    x = torch.ones(2, 3, device="meta")
    assert backends.explain("affine_coupling", x, x).split()[0] == "reference"
    y, logdet = functional.affine_coupling(x, torch.ones(2, 6, device="meta"))
    assert y.shape == (2, 3) and logdet.shape == (2,) and y.is_meta


@pytest.mark.skipif(not pathlib.Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo says what the processor is")
def test_products_are_torchs_on_intels_processors_and_those_without_avx512():
    """But for FASTFLOW_ISA, which asks for the library's own."""
    about = pathlib.Path("/proc/cpuinfo").read_text()
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(about.split())
    torchs = platform.machine() == "x86_64" and ("GenuineIntel" in about or not wide)
    torchs = torchs and "FASTFLOW_ISA" not in os.environ
    assert backends.own_products() == (backends.available()["cpu"] and not torchs)


def test_use_backend_nests_and_is_undone_by_an_exception():
    assert backends.requested() is None
    with backends.use_backend("reference"):
        with pytest.raises(KeyError), backends.use_backend(None):
            assert backends.requested() is None
            raise KeyError
        assert backends.requested() == "reference"
    assert backends.requested() is None


def test_use_backend_is_each_thread_s_own():
    seen = []
    with backends.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()))
        thread.start()
        thread.join()
    assert seen == [None]


NAMESPACES = {f"fastflow_{name}" for name in NAMES}


def in_threads(n, function):
    """What n threads that begin together return."""
    gate, found = threading.Barrier(n), []

    def run():
        gate.wait()
        found.append(function())
    threads = [threading.Thread(target=run) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_threads_whose_first_calls_meet_share_the_kernels():
    """An operator can be defined once; who comes second waits for it, and does not conclude that there is none."""
    calls = []

    def load(name):
        calls.append(name)
        time.sleep(0.05)
        if len(calls) > 1:
            raise RuntimeError("defined twice")
        return object()
    once = extension._once(load)
    assert len({id(one) for one in in_threads(4, lambda: once("cpu"))}) == len(calls) == 1
    namespace = "fastflow_of_four_threads"
    assert in_threads(4, lambda: extension.define(namespace)) == [getattr(torch.ops, namespace)] * 4


def test_a_graph_is_compiled_anew_for_another_request(backend, device):
    """In a thread too that asks for the first time after its first compilation."""
    x, params, graphs = torch.randn(3, 4, device=device), torch.randn(3, 8, device=device), []

    def noted(module, _):
        graphs.append({str(node.target).partition(".")[0] for node in module.graph.nodes} & NAMESPACES)
        return module.forward

    def run():
        call = torch.compile(lambda x, p: functional.affine_coupling(x, p), backend=noted, fullgraph=True)
        usual = call(x, params)
        with backends.use_backend(backend):
            torch.testing.assert_close(call(x, params), usual)
        other = "cuda" if device == "cpu" else "cpu"
        with backends.use_backend(other), pytest.raises(RuntimeError, match=f"backend '{other}' was requested for"):
            call(x, params)
        return True
    torch._dynamo.reset()
    assert in_threads(1, run) == [True]
    assert graphs[-1] == ({f"fastflow_{backend}"} if backend != "reference" else set())


@pytest.mark.parametrize("name", ["cpp", "", "CPU", 3])
def test_use_backend_refuses_unknown_names(name):
    with pytest.raises((ValueError, TypeError), match="^name"), backends.use_backend(name):
        pass


def test_a_request_that_cannot_be_met_raises_and_says_why(fused, device):
    """Never a silent fallback: not for transforms, subclasses or the wrong device."""
    x, p = torch.ones(2, 3, device=device), torch.ones(2, 6, device=device)
    with pytest.raises(RuntimeError, match=f"{fused}.*torch.func"):
        torch.func.grad(lambda x: functional.affine_coupling(x, p)[1].sum())(x)
    with pytest.raises(RuntimeError, match=f"{fused}.*device|{fused}.*tensors"):
        functional.affine_coupling(torch.ones(2, 3, device="meta"), torch.ones(2, 6, device="meta"))


def test_namesakes_have_one_signature():
    import inspect

    public = {name for name, value in vars(functional).items() if inspect.isfunction(value)}
    assert public >= {*backends.OPS}
    for name in public:
        ours, theirs = inspect.signature(getattr(functional, name)), inspect.signature(getattr(reference, name))
        assert ours == theirs, name
