"""Builds csrc/cuda/*.cu as plain C++ against simt.h, under AddressSanitizer and UndefinedBehaviorSanitizer.

The library registers the operators under ``fastflow_simt`` for CPU tensors. It is kept in a cache directory named by a
hash of the sources. A process that loads it must have libasan preloaded: see :func:`environment`.
"""

import hashlib
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CXX = os.environ.get("CXX", "g++")
# AddressSanitizer sees what is read or written through a wrong pointer; checks of each pointer take long to compile.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr,null,pointer-overflow",
              "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-DFASTFLOW_SIMT",
         "-DTORCH_TARGET_VERSION=0x020a000000000000"]
if re.search(r"\bfma\b", Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""):
    FLAGS.append("-mfma")  # as a GPU computes
CHECKED = ["-O0", *SANITIZERS]  # optimised, the checks take longer to compile than to run
RUNTIME = HERE / "runtime.cpp"
RUNTIME_FLAGS = ["-O2", "-fno-builtin-memcpy"]  # its memcpy must be a call, which AddressSanitizer checks
JOBS = 2


def cache_dir():
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "fastflow" / "simt"


def _key(sources):
    # where torch lies, too: the library's run path names it, and another environment may be gone by now
    torch_built_with = [torch.__version__, str(Path(torch.__file__).resolve())]
    digest = hashlib.sha256(" ".join([CXX, *FLAGS, *CHECKED, *RUNTIME_FLAGS, *torch_built_with]).encode())
    headers = [p for d in ("csrc", "csrc/common", "csrc/cuda") for p in (ROOT / d).glob("*.*h")]
    for path in sorted([*sources, *headers, HERE / "simt.h", RUNTIME]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source, target):
    include = Path(torch.__file__).parent / "include"
    flags = RUNTIME_FLAGS if source == RUNTIME else CHECKED
    subprocess.run([CXX, *FLAGS, *flags, f"-I{ROOT / 'csrc'}", f"-I{include}", f"-I{include}/torch/csrc/api/include",
                    "-include", str(HERE / "simt.h"), "-x", "c++", "-c", str(source), "-o", str(target)], check=True)


def build(name, sources):
    """Path of the library ``name`` made of ``sources`` and the runtime, built if no cached one matches; of several
    processes that want it, one builds and the others wait.

    Raises:
        subprocess.CalledProcessError: a compiler or linker error, printed on stderr.
    """
    folder = cache_dir() / _key(sources)
    library = folder / f"{name}.so"
    if library.exists():
        return library
    import fcntl  # where there is no fork, there are no sanitizers either

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(library, sources)
    return library


def _build(library, sources):
    folder = library.parent
    inputs = [*sources, RUNTIME]
    objects = [folder / f"{source.name}.{os.getpid()}.o" for source in inputs]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(_compile, inputs, objects))
    libraries = Path(torch.__file__).parent / "lib"
    partial = folder / f"{library.stem}.{os.getpid()}.so"
    subprocess.run([CXX, "-shared", *SANITIZERS, *map(str, objects), "-o", str(partial), f"-L{libraries}",
                    f"-Wl,-rpath,{libraries}", "-Wl,--as-needed", "-ltorch_cpu", "-lc10"], check=True)
    os.replace(partial, library)
    for path in objects:
        path.unlink()


def operators():
    return build("fastflow_simt", [ROOT / "csrc" / "registration.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))])


def teeth():
    return build("teeth", [HERE / "teeth.cu"])


def environment():
    """Variables of a process that loads a library built here. Fresh memory is filled with NaN."""
    def runtime(name):
        command = [CXX, f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    # libstdc++ comes along, since AddressSanitizer looks for the real __cxa_throw when it starts.
    return {**os.environ, "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}", "OMP_NUM_THREADS": "1",
            "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=2:max_malloc_fill_size=1000000000:malloc_fill_byte=255"}
