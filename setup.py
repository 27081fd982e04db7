"""Builds fastflow/_C_cpu.so and, where nvcc is, fastflow/_C_cuda.so, both on LibTorch's stable ABI.

Without torch's headers or a compiler the install still succeeds, and the reference serves. FASTFLOW_BUILD=0 skips the
build, 1 makes its failure an error. CXX and CUDA_HOME choose the compilers, TORCH_CUDA_ARCH_LIST the architectures."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from shlex import quote

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": "-mavx2 -mfma -mf16c",
                  "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"}
ESCAPED = str.maketrans({" ": "$ "})  # in ninja's build statements
RULES = """
rule cxx
  command = {cxx} -MMD -MF $out.d {flags} -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math $isa -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {nvcc} -MD -MF $out.d {cuda_flags} -O3 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden {arch} -c $in -o $out
  depfile = $out.d
rule link
  command = $linker -shared $in -o $out -L{torch}/lib -ltorch -ltorch_cpu -lc10 -lpthread
"""


def write_ninja(build, target, torch, nvcc):
    """build.ninja for both libraries, its objects under ``build``, its results in ``target``, spaces escaped there."""
    common = f"-std=c++20 -I{quote(str(ROOT))}/csrc -I{quote(torch)}/include -DTORCH_TARGET_VERSION=0x020a000000000000"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, check=False).stdout if nvcc else b""
    usual = "7.5 8.0 9.0 10.0+PTX" if b"compute_100" in known else "7.5 8.0 9.0+PTX"  # nvcc before 12.8
    entries = (os.environ.get("TORCH_CUDA_ARCH_LIST") or usual).replace(";", " ").replace(".", "").split()
    arch = " ".join(f"-gencode 'arch=compute_{number},code=[sm_{number}{ptx and f',compute_{number}'}]'"
                    for number, ptx, _ in (entry.partition("+PTX") for entry in entries))
    cxx = os.environ.get("CXX") or "c++"
    lines = [RULES.format(cxx=cxx, nvcc=quote(nvcc), torch=quote(torch), arch=arch,
                          flags=f"-fPIC -fvisibility=hidden -Wall {common}", cuda_flags=common)]
    objects = {"cpu": [], "cuda": []}

    def compile_one(library, rule, source, stem, isa=""):
        objects[library].append(f"{build}/{library}_{stem}.o".translate(ESCAPED))
        lines.append(f"build {objects[library][-1]}: {rule} {str(source).translate(ESCAPED)}\n  isa = {isa}")

    compile_one("cpu", "cxx", ROOT / "csrc/registration.cpp", "registration")
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        if source.stem.endswith("_kernel"):
            for name, flags in ISA_FLAGS.items():
                compile_one("cpu", "cxx", source, f"{source.stem}_{name}", f"-DFASTFLOW_ISA={name} {flags}")
        else:
            compile_one("cpu", "cxx", source, source.stem)
    if nvcc:
        compile_one("cuda", "cxx", ROOT / "csrc/registration.cpp", "registration", "-DFASTFLOW_CUDA")
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            compile_one("cuda", "nvcc", source, source.stem)
    for library, linker in ("cpu", cxx), ("cuda", f"{quote(nvcc)} -Xlinker --no-as-needed"):  # for libtorch_cuda.so
        lines.append(f"build {target}/_C_{library}.so: link {' '.join(objects[library])}\n  linker = {linker}")
    (build / "build.ninja").write_text("\n".join([*lines, ""]))


class BuildNative(build_ext):
    def run(self):
        wanted = os.environ.get("FASTFLOW_BUILD", "")
        try:
            if wanted != "0":
                self.build_native()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            print(f"fastflow: native libraries not all built ({error}); the reference will serve.", file=sys.stderr)

    def build_native(self):
        spec = importlib.util.find_spec("torch")
        if spec is None:
            raise RuntimeError("torch is not visible to the build; install it first and pass --no-build-isolation")
        in_place = self.inplace or self.editable_mode
        build = ROOT / "build/native" if in_place else Path(self.build_temp).resolve()
        target = ROOT / "fastflow" if in_place else Path(self.build_lib).resolve() / "fastflow"
        build.mkdir(parents=True, exist_ok=True)
        homes = os.environ.get("CUDA_HOME") or f"{os.environ.get('PATH')}:/usr/local/cuda"
        nvcc = shutil.which("nvcc", path=f"{homes}/bin")  # as backends.find_nvcc
        write_ninja(build, str(target).translate(ESCAPED), str(Path(spec.origin).parent), nvcc or "")
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        for library in ["cpu", "cuda"] if nvcc else ["cpu"]:
            subprocess.run([*ninja, "-C", str(build), f"{target}/_C_{library}.so"], check=True)

    def get_outputs(self):
        return []


setup(ext_modules=[Extension("fastflow._C", [])], cmdclass={"build_ext": BuildNative})
