"""The CUDA sources compile and link with nvcc for every supported GPU, GPU or not, without a register spill."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc")]


def compile_with_nvcc(source, target):
    include = Path(torch.__file__).parent / "include"
    arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return subprocess.run([NVCC, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
                           "-Xcompiler", "-fPIC", "-Xptxas", "-v", *arch, f"-I{ROOT / 'csrc'}", f"-I{include}",
                           f"-I{include}/torch/csrc/api/include", "-c", str(source), "-o", str(target)],
                          capture_output=True, text=True)


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)
def test_compiles_without_spills_or_warnings(source, tmp_path):
    result = compile_with_nvcc(source, tmp_path / "object.o")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "warning" not in result.stderr, result.stderr[-4000:]
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", result.stderr)
    assert {arch for _, arch in kernels} == set(ARCHITECTURES)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(stacks) >= len(kernels)
    spilled = [k for k, s in zip(kernels, stacks, strict=False) if s != ("0", "0", "0")]
    assert not spilled, spilled


def test_links(tmp_path):
    objects = []
    for source in SOURCES:
        objects.append(tmp_path / f"{source.stem}.o")
        assert compile_with_nvcc(source, objects[-1]).returncode == 0
    lib = Path(NVCC).resolve().parent.parent / "lib64"
    library = tmp_path / "library.so"
    subprocess.run(["c++", "-shared", *map(str, objects), "-o", str(library), f"-L{lib}", "-lcudart_static", "-ldl",
                    "-lrt", "-lpthread"], check=True)
    symbols = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    unknown = [s for s in re.findall(r" U (\S+)", symbols.stdout) if "at::" in s or "N2at" in s or s.startswith("_ZN3c10")]
    assert not unknown, unknown  # the stable ABI alone
