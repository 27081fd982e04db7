"""The CUDA sources compile and link with nvcc for every supported GPU, GPU or not, without a register spill."""

import ctypes
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("75", "80", "90", "100", "120")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


def compile_with_nvcc(source, target):
    include = Path(torch.__file__).parent / "include"
    arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return subprocess.run([NVCC, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
                           "-Xcompiler", "-fPIC", "-Xptxas", "-v", *arch, f"-I{ROOT / 'csrc'}", f"-I{include}",
                           f"-I{include}/torch/csrc/api/include", "-c", str(source), "-o", str(target)],
                          capture_output=True, text=True)


def ptx_of(source, target):
    include = Path(torch.__file__).parent / "include"
    subprocess.run([NVCC, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
                    "-arch=compute_90", f"-I{ROOT / 'csrc'}", f"-I{include}", f"-I{include}/torch/csrc/api/include",
                    "-ptx", str(source), "-o", str(target)], check=True)
    return target.read_text()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{source: (object, the compiler's result)}"""
    folder = tmp_path_factory.mktemp("objects")
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(compile_with_nvcc, SOURCES, objects))
    return dict(zip(SOURCES, zip(objects, results, strict=True), strict=True))


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiles_without_spills_or_warnings(source, compiled):
    _, result = compiled[source]
    assert result.returncode == 0, result.stderr[-4000:]
    assert "warning" not in result.stderr, result.stderr[-4000:]
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, "
                         r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr, re.DOTALL)
    assert {arch for _, arch, *_ in kernels} == set(ARCHITECTURES)
    spilled = [k for k in kernels if k[2:] != ("0", "0", "0")]
    assert not spilled, spilled


def test_the_library_says_why_it_does_not_run(compiled, tmp_path):
    """Here for want of a GPU; where there is one, tests/unit/test_gpus.py asks."""
    library = tmp_path / "device.so"
    objects = [target for source, (target, _) in compiled.items() if source.stem == "device"]
    subprocess.run([NVCC, "-shared", *map(str, objects), "-o", str(library)], check=True)
    refusal = ctypes.CDLL(str(library)).fastflow_cuda_refusal
    refusal.restype = ctypes.c_char_p
    found = refusal()
    assert found is None if torch.cuda.is_available() else b"CUDA" in found


@pytest.mark.parametrize(("stem", "operands", "results"), [
    ("affine_coupling", 4, 2), ("affine_coupling_bwd", 4, 3), ("gaussian", 5, 3), ("gaussian_bwd", 5, 4)])
def test_aligned_operands_move_in_16_bytes(stem, operands, results, tmp_path):
    """In PTX: every operand and result of the float32 vector kernels, for dense operands (D = 0) and for any (-1), and
    nowhere a fast approximation."""
    ptx = ptx_of(ROOT / "csrc" / "cuda" / f"{stem}.cu", tmp_path / "kernels.ptx")
    entries = re.split(r"\.entry ", ptx)[1:]
    vectors = [e for e in entries if re.match(r"\S*(?:forward|backward)IfLi4ELi(?:0|n1)E", e)]
    assert len(vectors) == 2
    for vector in vectors:
        assert len(re.findall(r"ld\.global(?:\.nc)?\.v4", vector)) >= operands
        assert len(re.findall(r"st\.(?:global|wb)\S*\.v4|st\.global\.v4", vector)) >= results
    assert not re.search(r"\.approx|\.ftz", ptx)


@pytest.mark.parametrize("stem", ["spline", "spline_bwd", "mlp_flow", "mlp_flow_bwd"])
def test_no_fast_approximation(stem, tmp_path):
    assert not re.search(r"\.approx|\.ftz", ptx_of(ROOT / "csrc" / "cuda" / f"{stem}.cu", tmp_path / "kernels.ptx"))


def test_links_against_the_stable_abi_alone(compiled, tmp_path):
    lib = Path(NVCC).resolve().parent.parent / "lib64"
    if not (lib / "libcudart_static.a").exists():
        lib = Path("/usr/local/cuda/lib64")
    library = tmp_path / "library.so"
    subprocess.run(["c++", "-shared", *(str(target) for target, _ in compiled.values()), "-o", str(library), f"-L{lib}",
                    "-lcudart_static", "-ldl", "-lrt", "-lpthread"], check=True)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    undefined = re.findall(r" U (\S+)", symbols.stdout)
    assert any(name.startswith("aoti_torch_") for name in undefined)
    assert not [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
