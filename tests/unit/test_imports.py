"""The architecture: imports point one way, importing fastflow loads no kernels, files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fastflow"
# What each part may import directly. Parts reach what those import in turn; everything may import backends and checks.
LAYERS = {
    "__main__": {"cli"},
    "cli": {"engine", "recipes", "doctor"},
    "engine": {"vae", "diagnostics", "data", "launches", "measured"},
    "diagnostics": {"vae", "flows"},
    "vae": {"flows", "estimators"},
    "flows": {"nn", "draws", "one_number"},
    "nn": {"functional"},
    "functional": {"autograd", "reference", "checks", "extension", "measured"},
    "autograd": {"kernels", "extension", "reference"},
    "adapters": {"flows", "nn", "functional"},
    "extension": {"kernels", "fakes"},
    "backends": {"extension", "gpus"},
    "gpus": {"extension"},
    "launches": {"extension"},
    "flops": {"extension"},
    "measured": {"autograd"},
    "doctor": set(),
    "draws": set(),
    "fakes": set(),
    "one_number": set(),
    "kernels": set(),
    "reference": set(),
    "checks": set(),
    "data": set(),
    "estimators": {"draws", "one_number"},
    "recipes": set(),
}
EVERYONE = {"backends", "checks", "gpus"}
# These import no backends.
LEAVES = {"kernels", "reference", "checks", "draws", "one_number", "extension", "fakes", "gpus", "backends"}
THIRD_PARTY = {"reference": {"torch"}, "kernels": {"torch", "triton"}, "checks": {"torch"}, "backends": {"torch"},
               "extension": {"torch"}, "fakes": {"torch"}, "functional": {"torch"}, "autograd": {"torch"},
               "nn": {"torch"}, "flows": {"torch", "numpy", "torchdiffeq"}, "vae": {"torch", "numpy"},
               "draws": {"torch"}, "one_number": {"torch"}, "estimators": {"torch"}, "gpus": {"torch"}}


def sources():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 10
    return sorted(set(files))


def part_of(path):
    if path.is_relative_to(ROOT / "kernels"):
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path):
    base = ("fastflow", "kernels") if part_of(path) == "kernels" else ("fastflow",)
    root = ROOT / "kernels" if part_of(path) == "kernels" else PACKAGE
    return [*base, *path.relative_to(root).with_suffix("").parts]


def imports(path, text=None):
    """Absolute dotted names that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                module = module_of(path)
                package = module[: len(module) - node.level]
                base = ".".join([*package, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def own_parts(path, text=None):
    """The parts of fastflow that a file imports."""
    names = [name.split(".") for name in imports(path, text)]
    return {name[1] for name in names if name[0] == "fastflow" and len(name) > 1}


def reachable(part):
    """Every part that ``part`` may import: the closure of the layers below it."""
    seen, todo = set(), [part]
    while todo:
        for below in LAYERS[todo.pop()]:
            if below not in seen:
                seen.add(below)
                todo.append(below)
    return seen | {part}


def test_layers_have_no_cycle():
    for part in LAYERS:
        assert all(part not in reachable(below) for below in LAYERS[part]), part


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in LAYERS, f"{part} has no place in the layers: give it one here and in the design"
    allowed = reachable(part) | (set() if part in LEAVES else EVERYONE)
    wrong = own_parts(path) - allowed
    # `from fastflow import x` of a public name that is no part of its own is a name of the package itself.
    assert not wrong & set(LAYERS), f"{part} must not import {sorted(wrong & set(LAYERS))}"
    assert not wrong, f"{part} imports {sorted(wrong)} through fastflow/__init__: import the module that defines it"


@pytest.mark.parametrize("path", [p for p in sources() if part_of(p) in THIRD_PARTY],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_layers_need_only_torch(path):
    allowed = THIRD_PARTY[part_of(path)] | set(sys.stdlib_module_names) | {"fastflow"}
    outside = {name.split(".")[0] for name in imports(path)} - allowed
    assert not outside, f"imports {sorted(outside)}"


def test_the_rule_sees_a_wrong_import():
    path = PACKAGE / "nn" / "example.py"
    assert own_parts(path, "from fastflow.flows import Glow") == {"flows"} and "flows" not in reachable("nn")
    assert own_parts(path, "def f():\n    import fastflow.vae.elbo") == {"vae"}
    assert own_parts(path, "from ..flows import Glow") == {"flows"}
    assert own_parts(path, "from . import actnorm") == {"nn"}
    assert own_parts(path, "from fastflow import functional") == {"functional"}


def test_nothing_imports_the_kernels_by_their_folder():
    """`import kernels` works from the repository's root, and would load and register every kernel twice."""
    for path in [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text()
        assert "kernels" not in text or not any(name.split(".")[0] == "kernels" for name in imports(path, text)), path


def test_csrc_knows_no_python_and_no_aten():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh", ".inl")]
    assert files
    for path in files:
        included = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        for bad in ("Python.h", "pybind11", "ATen/", "c10/"):
            assert not any(bad in line for line in included), (path, bad)


LEAN = """
import sys, torch
before = set(sys.modules)
import fastflow
new = set(sys.modules) - before
loaded = sorted(m for m in new if m.split(".")[0] not in {"fastflow", *sys.stdlib_module_names})
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "triton" not in new and "fastflow.kernels" not in new, sorted(new)
assert "_C_cpu" not in maps and "_C_cuda" not in maps
assert not [m for m in loaded if m.split(".")[0] not in ("torch", "numpy")], loaded
assert set(dir(fastflow)) >= {"functional", "backends"}
fastflow.functional.ScaleMap
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
assert "fastflow.kernels" not in sys.modules and "_C_cpu" not in maps, "importing functional loads kernels"
print("lean")
"""


def test_importing_fastflow_loads_neither_triton_nor_the_extension():
    run = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, timeout=120)
    assert run.stdout == "lean\n", run.stdout + run.stderr


@pytest.mark.parametrize("folder", ["fastflow", "kernels", "csrc", "tests", "benchmarks"])
def test_no_file_grows_past_its_topic(folder):
    suffixes = (".py", ".cpp", ".cu", ".h", ".cuh")
    files = [p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    assert files
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) >= 450}
    assert not long, long


def test_setup_stays_small():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 100
