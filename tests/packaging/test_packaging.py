"""The distribution: what a wheel holds, that an install without a compiler still serves, that the binary keeps the
ABI."""

import os
import shutil
import subprocess
import sys
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
            "assert 'was not built' in backends.status()['cpu'];"
            "x = torch.randn(2, 4); y, logdet = functional.affine_coupling(x, torch.zeros(2, 8));"
            "assert torch.equal(x, y) and logdet.tolist() == [0, 0]; print(fastflow.__file__)")
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout


def test_a_failed_build_is_an_error_when_it_was_asked_for(source, tmp_path):
    result = pip("install", str(source), "--target", str(tmp_path), CXX="/nonexistent/c++", FASTFLOW_BUILD="1",
                 CUDA_HOME="/nonexistent")
    assert result.returncode != 0


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
