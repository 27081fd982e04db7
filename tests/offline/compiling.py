"""Compile the kernels of a launcher's call for a GPU that is not there, and read what the compiler made of them."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from fastflow.kernels import layout
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

# {compute capability times ten: KB of shared memory that a block may have}, 80 as its younger kin 8.6 and 8.9.
CAPABILITIES = {75: 64, 80: 99, 90: 227, 100: 227, 120: 99}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Hardware approximations that no kernel may use. (rcp and sqrt inside div.rn and sqrt.rn are corrected by ptxas.)
APPROXIMATE = re.compile(r"\b\w+\.approx\S*|\bdiv\.full\S*|\b(?:ex2|lg2|rsqrt|sin|cos|tanh)\.\S+")
VECTOR = re.compile(r"(?:ld|st)\.global(?:\.\w+)*?\.v(\d)\.b(\d+)")


@dataclass
class Compiled:
    """One kernel for one target: its IRs, its bytes of shared memory, and its resources from the machine code."""

    name: str
    ttir: str
    ptx: str
    cubin: bytes
    shared: int

    def resources(self):
        """{"REG": registers per thread, "STACK": bytes, "LOCAL": bytes, "SHARED": bytes}."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            text = subprocess.run([str(CUOBJDUMP), "--dump-resource-usage", file.name], check=True, capture_output=True,
                                  text=True).stdout
        return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}

    def global_accesses(self):
        """Width in bytes of every global load and store in the PTX, as (loads, stores)."""
        found = {"ld": [], "st": []}
        for line in self.ptx.splitlines():
            access = re.search(r"\b(ld|st)\.global(\S*)", line)
            if access:
                vector = re.search(r"\.v(\d)", access[2])
                bits = re.search(r"\.[bfsu](\d+)", access[2])
                found[access[1]].append((int(vector[1]) if vector else 1) * int(bits[1]) // 8)
        return found["ld"], found["st"]


def launches_of(call):
    """The (kernel, args, meta) of every launch that ``call()`` makes; nothing runs."""
    recorded = []
    real = layout.launch
    layout.launch = lambda kernel, programs, like, *args, **meta: recorded.append(
        (kernel, args, {**meta, **layout.OPTIONS}))
    try:
        call()
    finally:
        layout.launch = real
    return recorded


def compiled(launch, capability):
    """The :class:`Compiled` kernel of one recorded launch, specialised as the launch itself would specialise it."""
    kernel, args, meta = launch
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **meta)
    options, signature, constants, attributes = kernel._pack_args(backend, meta, bound, specialization, options)
    result = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target,
                            options=options.__dict__)
    return Compiled(kernel.fn.__name__, result.asm["ttir"], result.asm["ptx"], result.asm["cubin"],
                    result.metadata.shared)


def variant(launch, capability=90):
    """What a launch is specialised for, as Triton's cache sees it."""
    kernel, args, meta = launch
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*args, **meta)
    return kernel.fn.__name__, str(specialization), str(options)
