"""What a GPU can run, by its compute capability: NVIDIA's 7.5 is Turing, 8.x Ampere and Ada, 9.0 Hopper, 10.x and 12.x
Blackwell."""

import torch

from fastflow import extension

TRITON_SINCE = 7, 5  # the first for which the kernels are known to compile
TENSOR_CORES = 8, 0  # the first whose tensor cores take TF32 and bfloat16
SHARED_BYTES = 64 * 1024, 99 * 1024  # of shared memory that a block may have: before 8.0, and from there on everywhere
_capabilities = {}


@extension.constant_under_compile
def capability(device):
    """(major, minor) of a CUDA device."""
    found = _capabilities.get(device)
    if found is None:
        found = _capabilities[device] = torch.cuda.get_device_capability(device)
    return found


def shared_bytes(device):
    """Bytes of shared memory that a block of threads may have, at least."""
    return SHARED_BYTES[capability(device) >= TENSOR_CORES]


def has_tensor_cores(device):
    """Whether the device multiplies TF32 and bfloat16 in hardware."""
    return capability(device) >= TENSOR_CORES


def refusal(backend, device):
    """Why "triton" or "cuda", where it is available, runs nothing on this GPU, or None."""
    reason = None
    if backend == "cuda":
        reason = extension.cuda_refusal(device)
    elif not torch.version.hip and capability(device) < TRITON_SINCE:
        reason = f"it takes a compute capability of {_version(TRITON_SINCE)} or more"
    if reason is None:
        return None
    advice = " (TORCH_CUDA_ARCH_LIST says what the library is built for)" if backend == "cuda" else ""
    return f"the {backend} backend does not run on {described(device)}: {reason}{advice}"


def described(device):
    """A GPU's name and compute capability."""
    return f"{torch.cuda.get_device_name(device)}, of compute capability {_version(capability(device))}"


def _version(of):
    return ".".join(map(str, of))
