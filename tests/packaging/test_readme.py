"""The words of README and docs are run: Python blocks as they stand, its shell commands as far as they parse."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastflow import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# docs/migration.md has a test of its own.
PYTHON = {f"{page.name} {i}": block
          for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.name != "migration.md"
          for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))}
SHELL = [line.partition("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
         for line in block.splitlines() if line.strip()]


@pytest.mark.parametrize("name", PYTHON)
def test_python_block_runs(name):
    exec(compile(PYTHON[name], name, "exec"), {})


def test_make_targets_exist():
    targets = [shlex.split(line)[1] for line in SHELL if line.startswith("make ")]
    assert "train" in targets and "test" in targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", [line for line in SHELL if "bin/fastflow" in line])
def test_fastflow_command_is_known(line):
    words = shlex.split(line)[1:]
    result = subprocess.run([sys.executable, "-m", "fastflow.cli", words[0], "--help"], capture_output=True, text=True,
                            check=True)
    for word in words[1:]:
        if word.startswith("--"):
            assert word in result.stdout


@pytest.mark.parametrize("words", [["doctor"], ["train", "--list"]], ids=" ".join)
def test_doctor_and_list_run(words, capsys):
    """In this process; tests/engine/test_cli.py runs them in processes of their own."""
    cli.main(words)
    out, err = capsys.readouterr()
    assert out.strip() and not err


def test_named_recipes_exist():
    for recipe in re.findall(r"fastflow train ([a-z][a-z-]+)", README):
        assert (ROOT / "fastflow" / "recipes" / f"{recipe}.toml").exists()


def test_figures_are_those_of_the_results_file():
    """Every row of the tables of ratios stands in the file that the README names, and none of its cases is left out."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.table import FASTEST, markdown

    (name,) = set(re.findall(r"benchmarks/results/[\w.-]+\.json", README))
    results = json.loads((ROOT / name).read_text())
    rows = [line for line in README.splitlines()
            if re.match(r"\| (\w+_\w+|spline|slogdet|Glow|RealNVP) ", line)]
    measured = [line for groups, baselines in (
        (("affine_coupling", "gaussian_sample_kl", "bernoulli_log_prob", "wide_mlp", "conv_net",
          "activated_conv"),
         ("eager", "compile")),
        (("mlp_flow",), ("eager",)), (("spline",), ("eager", "compile", "nflows", "zuko")),
        (("slogdet",), ("torch batched", "torch loop")),
        (("glow", "realnvp", "realnvp wider"), ("eager", FASTEST))) for line in markdown(results, groups, baselines)]
    assert rows == [line for line in measured if line in rows] and rows
    assert len(rows) == len({row["case"] for row in results["rows"]})


@pytest.mark.parametrize(("words", "case"), [
    ("Splines", "spline"), ("Affine couplings", "affine_coupling"), ("Gaussian samples", "gaussian_sample_kl"),
    ("Log-determinants", "slogdet"), ("A RealNVP of two features", "RealNVP training step, 2-D"),
    ("A Glow of", "Glow training step"), ("Networks of an MLP VAE", "wide_mlp")])
def test_summary_spans_the_tables(words, case):
    """The least and the greatest ratio over eager PyTorch at one thread, of training's direction."""
    ratios = sorted((line.split("|")[2].split()[0] for line in README.splitlines()
                     if line.startswith(f"| {case}") and (" step, " in line or "forward+backward" in line)), key=float)
    (cell,) = re.findall(rf"^\| {words}.*\| (.+) \|$", README, re.M)
    assert cell.split(" to ") == ([ratios[0], ratios[-1]] if len(ratios) > 1 else ratios)
