"""Builds fastflow/_C_cpu.so and, where nvcc is, fastflow/_C_cuda.so, both on LibTorch's stable ABI.

Without torch's headers or a compiler the install still succeeds, and the reference serves. FASTFLOW_BUILD=0 skips the
build, FASTFLOW_BUILD=1 makes its failure an error, TORCH_CUDA_ARCH_LIST chooses the GPU architectures.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": "-mavx2 -mfma -mf16c",
                  "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"}
RULES = """
rule cxx
  command = {cxx} -MMD -MF $out.d {flags} -O3 -fopenmp-simd -fno-math-errno -fno-trapping-math $isa -c $in -o $out
  depfile = $out.d
rule nvcc
  command = {nvcc} -MD -MF $out.d {cuda_flags} -O3 -DUSE_CUDA -Xcompiler -fPIC,-fvisibility=hidden {arch} -c $in -o $out
  depfile = $out.d
rule link
  command = $linker -shared $in -o $out -Xlinker --no-as-needed -L{torch}/lib -ltorch -ltorch_cpu -lc10 -lpthread
"""


def write_ninja(build, target, torch_dir, nvcc):
    """build.ninja for both libraries, its objects under ``build``, its results in ``target``."""
    common = f"-std=c++20 -I{ROOT}/csrc -I{torch_dir}/include -DTORCH_TARGET_VERSION=0x020a000000000000"
    arch = ""
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(";", " ").split():
        number = entry.removesuffix("+PTX").replace(".", "")
        arch += f" -gencode arch=compute_{number},code=sm_{number}"
        arch += f" -gencode arch=compute_{number},code=compute_{number}" if entry.endswith("+PTX") else ""
    cxx = os.environ.get("CXX", "c++")
    lines = [RULES.format(cxx=cxx, nvcc=nvcc, torch=torch_dir, arch=arch,
                          flags=f"-fPIC -fvisibility=hidden -Wall {common}", cuda_flags=common)]
    objects = {"cpu": [], "cuda": []}

    def compile_one(library, rule, source, stem, isa=""):
        objects[library].append(f"{build}/{library}_{stem}.o")
        lines.append(f"build {objects[library][-1]}: {rule} {source}\n  isa = {isa}")

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
    linkers = {"cpu": cxx, "cuda": nvcc}  # nvcc knows where its own runtime is
    for library, inputs in objects.items():
        if inputs:
            lines.append(f"build {target}/_C_{library}.so: link {' '.join(inputs)}\n  linker = {linkers[library]}")
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
            print(f"fastflow: native libraries not built ({error}); the reference will serve.", file=sys.stderr)

    def build_native(self):
        spec = importlib.util.find_spec("torch")
        if spec is None:
            raise RuntimeError("torch is not visible to the build; install it first and pass --no-build-isolation")
        in_place = self.inplace or self.editable_mode
        build = ROOT / "build/native" if in_place else Path(self.build_temp).resolve()
        target = ROOT / "fastflow" if in_place else Path(self.build_lib).resolve() / "fastflow"
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        nvcc = shutil.which("nvcc") or shutil.which(f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc")
        write_ninja(build, target, Path(spec.origin).parent, nvcc or "")
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        subprocess.run([*ninja, "-C", build, "-k", "0"], check=True)

    def get_outputs(self):
        return []


setup(ext_modules=[Extension("fastflow._C", [])], cmdclass={"build_ext": BuildNative})
