"""The same bits at every repeat, at 1 and 2 threads, in a forked child and in torch's deterministic mode."""

import os
import signal
import time

import pytest
import torch
from cases import CASES, CPU_CASES, Case, check_by_ratio, cotangents_of, evaluate, flow_case
from tolerances import assert_bitwise

from fastflow import backends

by_case = pytest.mark.parametrize("case", CPU_CASES, ids=str)
# Large enough that every kernel splits its work between threads, and sums across the split.
LARGE = (
    Case("batch", "affine_coupling", {"x": (64, 12, 16, 16), "params": (64, 24, 16, 16), "logdet": (64,),
                                      "passive": (64, 12, 16, 16)}, {"scale": "sigmoid"}),
    Case("one_sample", "affine_coupling", {"x": (1, 3, 300_000), "params": (1, 6, 300_000)}, {"scale": "tanh"}),
    Case("few_samples", "affine_coupling", {"x": (3, 200_001), "raw": (3, 200_001), "shift": (3, 200_001)},
         {"inverse": True}),
    Case("many_small", "affine_coupling", {"x": (70_000, 3), "params": (70_000, 6)}),
    Case("gaussian", "gaussian_sample_kl", {"params": (600, 512)}, {"seed": 5, "return_logq": True}),
    Case("gaussian_one", "gaussian_sample_kl", {"params": (1, 2, 400_003), "prior_mean": (1, 1, 400_003),
                                                "prior_raw": (1, 1, 400_003)}, {"seed": 5, "reduce": "channel"}),
    Case("shared_prior", "gaussian_sample_kl", {"mean": (2000, 96), "raw": (2000, 96), "prior_mean": (1, 96),
                                                "prior_raw": (1, 96)}, {"seed": 1, "n_samples": 2}),
    Case("slogdet", "slogdet_inverse", {"weight": (97, 24, 24)}),
    Case("spline", "spline", {"x": (700, 48), "params": (700, 48 * 11)}),
    Case("spline_one", "spline", {"x": (1, 2, 40_001), "params": (1, 10, 40_001)}, {"inverse": True}),
    Case("slogdet_big", "slogdet_inverse", {"weight": (5, 64, 64)}),
    Case("plu", "plu_weight", {"lower": (40, 48, 48), "upper": (40, 48, 48), "log_s": (40, 48), "sign_s": (40, 48),
                               "perm": (40, 48)}),
    flow_case("flow", 7, (24, 33), 3, batch=2100, context=3, scale="tanh"),
)


def assert_same(got, want, what):
    for part in (0, 1):
        for name, t in got[part].items():
            assert (t is None) == (want[part][name] is None)
            if t is not None:
                assert_bitwise(t, want[part][name], f"{what} {'gradient of ' * part}{name}")


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_and_two_threads_give_the_same_bits(case, dtype, fused, device, threads):
    tensors = case.tensors(dtype, device)
    cotangents = cotangents_of(case, tensors)
    threads(1)
    alone = check_by_ratio(case, tensors, cotangents=cotangents) if dtype == torch.float32 else evaluate(
        case, tensors, cotangents=cotangents)
    for count in (2, 3):
        threads(count)
        assert_same(evaluate(case, tensors, cotangents=cotangents), alone, f"{count} threads")


@by_case
def test_twenty_repeats_give_the_same_bits(case, fused, device):
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    first = evaluate(case, tensors, cotangents=cotangents)
    for _ in range(20):
        assert_same(evaluate(case, tensors, cotangents=cotangents), first, "repeat")


@pytest.mark.parametrize("case", (LARGE[0], LARGE[4], LARGE[7]), ids=str)
def test_large_repeats_give_the_same_bits(case, fused, device):
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    first = evaluate(case, tensors, cotangents=cotangents)
    for _ in range(5):
        assert_same(evaluate(case, tensors, cotangents=cotangents), first, "repeat")


@by_case
def test_deterministic_mode(case, fused, device):
    """torch.use_deterministic_algorithms, with its NaN-filled fresh memory, changes nothing."""
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    plain = evaluate(case, tensors, cotangents=cotangents)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_same(evaluate(case, tensors, cotangents=cotangents), plain, "deterministic mode")
    finally:
        torch.use_deterministic_algorithms(False)


@by_case
def test_inference_mode(case, fused, device):
    """Inference tensors in and out, the same numbers; ordinary tensors made before are usable inside."""
    tensors = case.tensors(torch.float32, device)
    plain = evaluate(case, tensors)[0]
    with torch.inference_mode():
        inside = {name: t.clone() for name, t in tensors.items()}
        for operands in (inside, tensors):
            for name, t in zip(case.outputs, case.call(operands), strict=True):
                assert_bitwise(t, plain[name], name)
                assert t.is_inference() and not t.requires_grad


def test_forward_and_backward_in_other_threads(backend, device):
    """Autograd's own threads and a user's: the request for a backend of the thread that ran forward is what counts."""
    import threading

    case, results = CASES[0], []
    tensors = case.tensors(torch.float32, device)
    cotangents = cotangents_of(case, tensors)
    expected = evaluate(case, tensors, cotangents=cotangents)

    def work():
        with backends.use_backend(backend):
            results.append(evaluate(case, tensors, cotangents=cotangents))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(results) == 4
    for result in results:
        assert_same(result, expected, "thread")


def in_child(function, seconds=30):
    """Exit status of ``function`` in a forked child: 0 if it returned True in time; a child that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if function() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("case", (LARGE[0], LARGE[4], LARGE[7], LARGE[8], LARGE[11], LARGE[12]), ids=str)
def test_a_forked_child_computes(case, threads):
    """A data loader's worker after a parallel op in the parent: the thread pool did not survive the fork, the op does,
    with the same bits (the kernels alone run in the child: torch's own parallel ops hang there)."""
    if not backends.available()["cpu"]:
        pytest.skip(backends.status()["cpu"])
    with backends.use_backend("cpu"):
        threads(2)
        tensors = case.tensors(torch.float32)
        parent = [t.numpy() for t in case.call(tensors)]

        def work():
            return all((a == b.numpy()).all() for a, b in zip(parent, case.call(tensors), strict=True))

        assert in_child(work) == 0


def test_the_fork_helper_sees_a_hang_and_a_failure():
    if hasattr(os, "fork"):
        assert in_child(lambda: time.sleep(30), seconds=0.2) == "hung"
        assert in_child(lambda: False) == 2
