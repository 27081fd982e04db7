"""GPUs for which a backend has no code go to the next one, with a reason; here with GPUs that are only said to be
there."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastflow import backends, doctor, extension, gpus

MISSING = "no kernel image is available for execution on the device"


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends GPUs: {index: (compute capability, what CUDA says of the library there)}."""
    def pretend(devices):
        monkeypatch.setattr(gpus, "_capabilities", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: devices[device.index][0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        monkeypatch.setattr(extension, "cuda_refusal", lambda device: devices[device.index][1])
        monkeypatch.setattr(backends._state, "status", dict.fromkeys(backends.NAMES, "available: pretended"))
        monkeypatch.setattr(backends._state, "within_reach", {})

    return pretend


def tensors(index=0, *shape):
    with FakeTensorMode():
        return torch.empty(shape or (2, 12, 12), device=torch.device("cuda", index))


@pytest.mark.parametrize(("capability", "refusal", "chosen"), [
    ((9, 0), None, "cuda"), ((7, 5), None, "cuda"), ((7, 5), MISSING, "triton"), ((12, 0), MISSING, "triton"),
    ((7, 0), None, "cuda"), ((7, 0), MISSING, "reference"), ((6, 1), MISSING, "reference")])
def test_a_backend_without_code_for_a_gpu_is_passed_over(gpu, capability, refusal, chosen):
    gpu({0: (capability, refusal)})
    assert backends.choose("slogdet", tensors()) == chosen
    reason = backends.explain("slogdet", tensors())
    assert reason.startswith(chosen)
    if chosen == "reference":
        assert f"GPU 0, of compute capability {capability[0]}.{capability[1]}" in reason and "7.5 or more" in reason


def test_a_request_says_what_cuda_says_and_what_to_do(gpu):
    gpu({0: ((7, 0), MISSING)})
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match=f"{MISSING} .TORCH_CUDA_ARCH_LIST"):
        backends.choose("slogdet", tensors())
    with backends.use_backend("triton"), pytest.raises(RuntimeError, match="takes a compute capability of 7.5 or more"):
        backends.choose("slogdet", tensors())


def test_each_gpu_of_a_machine_has_its_own_choice(gpu):
    gpu({0: ((9, 0), None), 1: ((7, 5), MISSING)})
    assert [backends.choose("slogdet", tensors(i)) for i in (0, 1, 0)] == ["cuda", "triton", "cuda"]


def test_convolutions_want_tensor_cores(gpu, monkeypatch):
    monkeypatch.setattr(extension, "convolutions_in_tf32", lambda: True)
    gpu({0: ((8, 6), None), 1: ((7, 5), None)})
    for index, chosen in (0, "triton"), (1, "reference"):
        x, w1, w2, w3 = (tensors(index, *s) for s in ((2, 6, 8, 8), (128, 6, 3, 3), (128, 128, 1, 1), (12, 128, 3, 3)))
        b1, b2, b3 = (tensors(index, n) for n in (128, 128, 12))
        assert backends.choose("conv_net", x, w1, b1, w2, b2, w3, b3) == chosen


def test_doctor_says_what_each_gpu_runs(gpu, monkeypatch, capsys):
    gpu({0: ((9, 0), None), 1: ((7, 5), MISSING)})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backends, "status", lambda: dict.fromkeys(backends.NAMES, "available: pretended"))
    doctor.show()
    shown = capsys.readouterr().out
    assert "GPU 0, of compute capability 9.0, GPU 1, of compute capability 7.5" in shown
    assert shown.count("does not run on") == 1
    assert f"the cuda backend does not run on GPU 1, of compute capability 7.5: {MISSING}" in shown


def test_a_block_has_less_shared_memory_before_ampere(gpu):
    gpu({0: ((7, 5), None), 1: ((8, 6), None), 2: ((12, 0), None)})
    assert [gpus.shared_bytes(torch.device("cuda", i)) for i in range(3)] == [64 * 1024, 99 * 1024, 99 * 1024]


def test_rocm_has_numbers_of_its_own(gpu, monkeypatch):
    gpu({0: ((7, 0), MISSING)})
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gpus.refusal("triton", torch.device("cuda", 0)) is None


@pytest.mark.gpu
def test_the_cuda_library_runs_here():
    for index in range(torch.cuda.device_count()):
        assert extension.cuda_refusal(torch.device("cuda", index)) is None
