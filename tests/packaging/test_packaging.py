"""The distribution: what a wheel holds, that an install without a compiler still serves, that the binary keeps the
ABI."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastflow import backends, extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the tracked and new files, so that building leaves the tree alone."""
    copy = tmp_path_factory.mktemp("source") / "with space"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.splitlines()
    for name in names:
        if not name.startswith(("tests/", "benchmarks/results/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def pip(*args, **environment):
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    return subprocess.run([sys.executable, "-m", "pip", *args, *options],
                          env=os.environ | environment, capture_output=True, text=True, check=False)


def test_wheel_holds_every_package_and_nothing_else(source, tmp_path):
    result = pip("wheel", str(source), "-w", str(tmp_path), FASTFLOW_BUILD="0")
    assert result.returncode == 0, result.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("fastflow/functional/__init__.py", "fastflow/kernels/affine_coupling.py",
                 "fastflow/autograd/gaussian.py", "fastflow/flows/__init__.py", "fastflow/vae/__init__.py",
                 "fastflow/recipes/glow-photos.toml"):
        assert name in names
    tops = {name.split("/")[0] for name in names}
    assert tops <= {"fastflow", "fastflow-0.1.0.dist-info"}
    packages = {str(p.parent.relative_to(ROOT)) for p in (ROOT / "fastflow").rglob("__init__.py")}
    assert packages <= {name.rpartition("/")[0] for name in names}, "a package is missing in pyproject.toml"


def test_install_without_compiler_serves_the_reference(source, tmp_path):
    result = pip("install", str(source), "--target", str(tmp_path), CXX="/nonexistent/c++", PATH="/nonexistent",
                 CUDA_HOME="/nonexistent")
    assert result.returncode == 0, result.stderr
    code = ("import torch, fastflow; from fastflow import backends, functional;"
            "assert not backends.available()['cpu'];"
            "assert 'was not built; where torch, ninja and a C++ compiler are' in backends.status()['cpu'];"
            "x = torch.randn(2, 4); y, logdet = functional.affine_coupling(x, torch.zeros(2, 8));"
            "assert torch.equal(x, y) and logdet.tolist() == [0, 0]; print(fastflow.__file__)")
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


def test_paths_with_spaces_reach_the_compilers_whole(source, tmp_path):
    """The sources are in such a folder; the C++ compiler stands in, and fails where its words were torn."""
    shown, cxx, nvcc = tmp_path / "words", tmp_path / "c++", tmp_path / "cuda home" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    for compiler in (cxx, nvcc):
        compiler.write_text(f"#!/bin/sh\nfor word; do echo \"$word\" >> {shown}; last=$word; done\n"
                            "case \"$last\" in -*) exit 0; esac; echo > \"$last\"\n")  # -lpthread ends what links
        compiler.chmod(0o755)
    result = pip("wheel", str(source), "-w", str(tmp_path), CXX=str(cxx), FASTFLOW_BUILD="1",
                 CUDA_HOME=str(nvcc.parents[1]), TORCH_CUDA_ARCH_LIST="")
    words = shown.read_text().splitlines()
    # That nvcc names no architecture, as one that is older than compute_100 would.
    assert {"arch=compute_75,code=[sm_75]", "arch=compute_90,code=[sm_90,compute_90]"} <= set(words)
    assert not any("compute_100" in word for word in words)
    assert f"-I{source.resolve() / 'csrc'}" in words, result.stdout + result.stderr
    assert {f"{source.resolve() / 'csrc/cpu/mlp.cpp'}", f"{source.resolve() / 'csrc/cuda/slogdet.cu'}"} <= set(words)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_source_distribution_holds_what_the_build_compiles(source, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    with tarfile.open(tmp_path / "fastflow-0.1.0.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    compiled = {p.relative_to(source).as_posix() for p in (source / "csrc").rglob("*") if p.is_file()}
    assert len(compiled) > 50 and compiled <= names


def test_a_failed_build_is_an_error_when_it_was_asked_for(source, tmp_path):
    result = pip("install", str(source), "--target", str(tmp_path), CXX="/nonexistent/c++", FASTFLOW_BUILD="1",
                 CUDA_HOME="/nonexistent")
    assert result.returncode != 0 and "_C_cpu.so']' returned non-zero" in result.stdout + result.stderr
    cxx, nvcc = tmp_path / "c++", tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    cxx.write_text("#!/bin/sh\nexit 0\n")
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    for compiler in (cxx, nvcc):
        compiler.chmod(0o755)
    result = pip("install", str(source), "--target", str(tmp_path), CXX=str(cxx), FASTFLOW_BUILD="1",
                 CUDA_HOME=str(tmp_path))
    assert result.returncode != 0 and "_C_cuda.so']' returned non-zero" in result.stdout + result.stderr


@pytest.mark.parametrize(("listed", "known", "wanted"), [
    ("", "compute_90 compute_100 compute_120", ["75,[sm_75]", "80,[sm_80]", "90,[sm_90]", "100,[sm_100,compute_100]"]),
    ("", "compute_75 compute_90", ["75,[sm_75]", "80,[sm_80]", "90,[sm_90,compute_90]"]),
    ("7.5;9.0a 12.0+PTX", "compute_100", ["75,[sm_75]", "90a,[sm_90a]", "120,[sm_120,compute_120]"])])
def test_architectures_of_the_build(source, tmp_path, monkeypatch, listed, known, wanted):
    """As the environment lists them, or what this nvcc knows of the usual ones, the last as PTX for newer GPUs."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho {known}\n")
    nvcc.chmod(0o755)
    runpy.run_path(str(source / "setup.py"))["write_ninja"](tmp_path, "target", "torch", str(nvcc))
    found = re.findall(r"-gencode 'arch=compute_(\w+),code=(\S+)'", (tmp_path / "build.ninja").read_text())
    assert [",".join(pair) for pair in found] == wanted


def test_the_cpu_library_is_linked_by_words_that_every_linker_knows(source, tmp_path, monkeypatch):
    """Apple's knows no --no-as-needed, which has the CUDA library bring along a library that it uses no symbol of."""
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    runpy.run_path(str(source / "setup.py"))["write_ninja"](tmp_path, "target", "torch", "/usr/bin/false")
    text = (tmp_path / "build.ninja").read_text()
    assert re.findall(r"linker = (.*)", text) == ["clang++", "/usr/bin/false -Xlinker --no-as-needed"]
    assert "$linker -shared $in -o $out -Ltorch/lib -ltorch -ltorch_cpu -lc10 -lpthread\n" in text


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_binary_needs_only_the_stable_abi(backend):
    path = extension.library_path(backend)
    if path is None:
        pytest.skip(f"the {backend} library was not built here")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", "--demangle", str(path)], capture_output=True, text=True,
                             check=True).stdout
    assert "aoti_torch_" in symbols
    unstable = [line for line in symbols.splitlines() if any(ns in line for ns in ("at::", "c10::", "torch::", "Py"))]
    assert not unstable


def test_the_script_for_other_torches_holds_every_operation():
    """load_library.py, whose answers are wanted from torch 2.10 and from the newest, under the torch that is here."""
    if extension.library_path("cpu") is None:
        pytest.skip("the CPU library was not built")
    run = subprocess.run([sys.executable, ROOT / "tests/packaging/load_library.py"], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cpu equals the reference") == len(backends.OPS)


def test_kernels_are_imported_by_one_name():
    """``import kernels`` would work from the repository's root and load every kernel twice."""
    sources = [p for folder in ("fastflow", "kernels", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert sources
    for path in sources:
        for line in path.read_text().splitlines():
            assert not line.startswith(("import kernels", "from kernels")), f"{path}: {line}"
