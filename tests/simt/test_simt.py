"""The CUDA kernels on the CPU: built against simt.h, run under AddressSanitizer and UndefinedBehaviorSanitizer.

A sanitizer must be in the process from its start, so the checks run in subprocesses: the cases in cases/, those files
of tests/unit that hold the operators' mathematics, and the deliberately wrong kernels of teeth.cu.
"""

import shutil
import subprocess
import sys

import pytest
from simt import build

UNIT = build.ROOT / "tests" / "unit"
pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which(build.CXX) is None,
                                reason="needs Linux and a C++ compiler with AddressSanitizer")


def run(*arguments, library=None):
    environment = build.environment()
    paths = [str(build.HERE), str(build.ROOT / "tests")]
    environment["PYTHONPATH"] = ":".join([*paths, environment.get("PYTHONPATH", "")]).rstrip(":")
    if library is not None:
        environment["FASTFLOW_SIMT_LIBRARY"] = str(library)
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment,
                          cwd=build.ROOT, timeout=1200)


@pytest.fixture(scope="session")
def operators():
    return build.operators()


@pytest.fixture(scope="session")
def teeth():
    return build.teeth()


# What tests/unit calls the cpu backend is here the emulated GPU (plugin.py). Its tests of slogdet take minutes to
# emulate; check_kernels.py has smaller ones, and cases of every operator and size class. The quick run is one process:
# torch alone takes one of them ten seconds to load.
SUITES = {
    "quick": [build.HERE / "cases" / "check_kernels.py", UNIT / "test_affine_coupling.py", UNIT / "test_dialects.py",
              UNIT / "test_nonfinite.py", "-k", "not large_results or in_caches and tanh"],
    "layouts": [UNIT / "test_layouts.py"],
    "mlp_flow": [build.HERE / "cases" / "check_mlp_flow.py", UNIT / "test_mlp_flow.py", "--deselect",
                 UNIT / "test_mlp_flow.py::test_on_older_processors"],
    "spline": [UNIT / "test_spline.py", "-k", "not sharp_splines or 10.0"],
    "gaussian": [UNIT / "test_gaussian_sample_kl.py", UNIT / "test_gaussian_noise.py"],
}


@pytest.mark.parametrize("suite", [pytest.param(name, marks=() if name == "quick" else pytest.mark.slow)
                                   for name in SUITES])
def test_kernels_under_sanitizers(suite, operators):
    result = run("-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "-rf", "--tb=short",
                 "-o", "python_files=test_*.py check_*.py", *SUITES[suite], library=operators)
    report = f"{result.stdout[-6000:]}\n{result.stderr[-3000:]}"
    assert result.returncode == 0 and "[100%]" in result.stdout, report


def test_a_library_linked_to_another_torch_is_not_taken(monkeypatch):
    here = build._key([build.HERE / "teeth.cu"])
    monkeypatch.setattr(build.torch, "__file__", "/elsewhere/torch/__init__.py")
    assert build._key([build.HERE / "teeth.cu"]) != here


RIGHT = [("tooth_reverse", 1), ("tooth_skip", 0), ("tooth_global", 0), ("tooth_dynamic", 0), ("tooth_static", 0),
         ("tooth_misaligned", 0), ("tooth_copied", 0), ("tooth_collective", 0, 64)]
WRONG = [
    (("tooth_reverse", 0), "wrong"),  # the missing barrier shows as NaN read from shared memory
    (("tooth_unwritten",), "wrong"),
    (("tooth_skip", 1), "__syncthreads"),
    (("tooth_global", 1), "heap-buffer-overflow"),
    (("tooth_global", -1), "heap-buffer-overflow"),
    (("tooth_dynamic", 1), "heap-buffer-overflow"),
    (("tooth_dynamic", -1), "heap-buffer-overflow"),
    (("tooth_static", 1), "runtime error: index 64 out of bounds"),
    (("tooth_misaligned", 1), "misaligned address"),
    (("tooth_copied", 1), "wrong"),
    (("tooth_copied", 2), "a copy of 16 bytes"),
    (("tooth_copied", 3), "heap-buffer-overflow"),
    (("tooth_collective", 1, 64), "a lane that is not there"),
    (("tooth_collective", 2, 64), "outside its mask"),
    (("tooth_collective", 0, 48), "a lane that is not there"),
    (("tooth_block", 1056), "a block of 1056"),
    (("tooth_shared", 228 * 1024), "too much shared memory"),
]


@pytest.mark.parametrize("call", RIGHT, ids=str)
def test_right_kernels_pass(call, teeth):
    result = run(build.HERE / "tooth.py", teeth, *call)
    assert result.stdout.strip() == "right" and result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.parametrize(("call", "sign"), WRONG, ids=str)
def test_wrong_kernels_are_caught(call, sign, teeth):
    result = run(build.HERE / "tooth.py", teeth, *call)
    assert sign in result.stdout + result.stderr, result.stdout + result.stderr[-2000:]
    assert result.stdout.strip() != "right"
