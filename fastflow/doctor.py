"""What is installed on this machine and what works: ``fastflow doctor``, and what commands look up before they load."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# The libraries that runs need: {module: the extra that installs it}.
EXTRAS = {"rich": "train", "safetensors": "train", "pydantic": "train", "matplotlib": "train",
          "PIL": "data", "sklearn": "data", "skimage": "data"}
if sys.version_info < (3, 11):
    EXTRAS["tomli"] = "train"
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image"}


def version(package):
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_extras():
    """The libraries that runs need and that are not installed, as {distribution: extra}."""
    return {DISTRIBUTIONS.get(module, module): extra for module, extra in EXTRAS.items()
            if importlib.util.find_spec(module) is None}


def _compiler(path, otherwise):
    """Path and version of a compiler; ``otherwise`` where ``path`` is None."""
    if path is None:
        return otherwise
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    lines = [line for line in shown.splitlines() if line.strip()]
    number = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{path} ({number.strip()})"


def _print(rows):
    for name, value in rows.items():
        print(f"{name:14}{value}")


def show():
    """Prints versions, which backends are available and why, and which optional libraries are installed. Where torch
    can't be imported, versions alone, and exits with status 1."""
    _print({"fastflow": f"{version('fastflow') or 'not installed as a package'} in {Path(__file__).parent}",
            "Python": f"{platform.python_version()} in {sys.prefix}",
            "platform": f"{platform.platform()}, {os.cpu_count()} CPUs"})
    try:
        import torch
    except (ImportError, OSError) as error:  # it is not there, or a library that it loads is not
        _print({"torch": f"can't be imported, and nothing works without it: {error}"})
        raise SystemExit(1) from None

    from fastflow import backends, gpus

    cxx = os.environ.get("CXX") or "c++"  # as in setup.py
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    _print({
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}",
        "GPU": ", ".join(map(gpus.described, devices)) or "none",
        "Triton": version("triton") or "not installed",
        "C++ compiler": _compiler(shutil.which(shlex.split(cxx)[0]), f"{cxx} not found"),
        "ninja": version("ninja") or shutil.which("ninja") or "not found",
        "nvcc": _compiler(backends.find_nvcc(), "not found"),
    })
    print("\nbackends")
    for name, reason in backends.status().items():
        print(f"  {name:12}{reason}")
        if name in ("triton", "cuda") and reason.startswith("available"):
            for refusal in filter(None, (gpus.refusal(name, device) for device in devices)):
                print(f"  {'':12}{refusal}")
    print("\noptional libraries")
    for module, extra in EXTRAS.items():
        package, extra = DISTRIBUTIONS.get(module, module), f"fastflow[{extra}]"
        found = version(package)
        print(f"  {package:14}{found or f'not installed: pip install {extra!r}'}")
