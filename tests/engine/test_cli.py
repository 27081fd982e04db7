import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from fastflow import cli
from fastflow.data import DataFileError
from fastflow.engine.run import default_directory


def run(*arguments, cwd=None):
    return subprocess.run([sys.executable, "-m", "fastflow.cli", *map(str, arguments)], capture_output=True, text=True,
                          cwd=cwd, timeout=120, check=False)


def refused(capsys, *arguments):
    """The one line on stderr with which these arguments are refused."""
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and err.startswith("fastflow: ") and err.count("\n") == 1 and not out
    return err


@pytest.mark.parametrize("arguments, named", [
    ([], "train, sample, evaluate, report, export, bench or doctor"),
    (["paint"], "paint"),
    (["train"], "glow-photos"),
    (["train", "glow-digits", "--out", ""], "--out: expected a path, got an empty one"),
    (["sample", ""], "DIR: expected a path, got an empty one"),
    (["train", "glow-cats"], "glow-cats"),
    (["train", "glow-digits", "--set", "train.stepz=3"], "train.stepz: unknown setting"),
    (["train", "glow-digits", "--set", "train.steps=many"], "train.steps: "),
    (["train", "glow-digits", "--resume", "yes"], "--resume"),
    (["train", "glow-digits", "--colour"], "--colour"),
    (["sample"], "DIR"),
    (["sample", "no/such/dir"], "no/such/dir: holds no checkpoints"),
    (["sample", ".", "--seed", "-1"], "--seed"),
    (["sample", ".", "--seed", str(2**63)], "an integer from 0 to 2**63 - 1"),
    (["sample", ".", "-n", "0"], "-n/--count"),
    (["sample", ".", "-n", "many"], "expected an integer from 1 to 4096, got many"),
    (["evaluate", "no/such/dir"], "no/such/dir: holds no checkpoints"),
    (["doctor", "now"], "now"),
])
def test_what_is_refused_is_named_on_one_line(capsys, arguments, named):
    assert named in refused(capsys, *arguments)


def test_a_refused_run_leaves_no_directory(capsys, tmp_path):
    many, out = "train.batch_size=999999", tmp_path / "runs" / "one"
    assert "train.batch_size" in refused(capsys, "train", "glow-digits", "--set", many, "--out", out)
    assert not (tmp_path / "runs").exists()


def test_the_runs_inside_a_directory_are_named(capsys, tmp_path):
    for name in ("beta-2", "beta-1"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    message = refused(capsys, "sample", tmp_path)
    assert f"holds no checkpoints; there are runs inside: {tmp_path}/beta-1, {tmp_path}/beta-2\n" in message


def test_runs_begun_at_the_same_time_get_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with default_directory("x", False) as first, default_directory("x", False) as second:
        assert [first, second] == [Path("runs/x"), Path("runs/x-2")]
        with default_directory("x", True) as last:  # of two runs there the lock lets one in
            assert last == second
    assert not (tmp_path / "runs").exists()  # nothing is left of what wrote nothing
    monkeypatch.setenv("WORLD_SIZE", "2")  # under torchrun all processes must find the same
    with default_directory("x", False) as first, default_directory("x", False) as second:
        assert first == second == Path("runs/x")


def test_an_output_that_is_a_file_or_a_run_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is not a directory" in refused(capsys, "train", "glow-digits", "--out", tmp_path / "file")
    (tmp_path / "run" / "checkpoints" / "step-000005").mkdir(parents=True)
    assert "already holds a run" in refused(capsys, "train", "glow-digits", "--out", tmp_path / "run")
    message = refused_after_warning(capsys, "train", "glow-digits", "--out", tmp_path / "run", "--resume", "auto")
    assert "none of its 1 checkpoints can be read" in message


@pytest.mark.parametrize("recipe, setting, said", [
    ("glow-digits", "train.capture=true", "train.capture: expected a model on a CUDA device, this one is on cpu"),
    ("maf-breast-cancer", "train.precision=bfloat16", "train.conditioner_dtype: expected None for "),
])
def test_nothing_is_left_of_a_run_that_is_refused(capsys, tmp_path, recipe, setting, said):
    assert said in refused(capsys, "train", recipe, "--set", setting, "--set", "train.device=cpu", "--out",
                           tmp_path / "run")
    assert not list(tmp_path.iterdir())


def refused_after_warning(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    warning, line = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and warning.startswith("fastflow: WARNING: passing over a bad checkpoint")
    return line


def test_version():
    assert run("--version").stdout == f"fastflow {importlib.metadata.version('fastflow')}\n"


def test_doctor():
    report = run("doctor")
    assert report.returncode == 0, report.stderr
    for word in ("fastflow", "Python", "torch", "Triton", "C++ compiler", "ninja", "nvcc", "reference", "cpu", "triton",
                 "cuda"):
        assert any(line.strip().startswith(word) for line in report.stdout.splitlines()), word
    assert "available" in report.stdout


def test_doctor_looks_for_compilers_where_a_build_does(tmp_path, monkeypatch, capsys):
    (tmp_path / "bin").mkdir()
    for name in ("c++", "bin/nvcc"):
        (tmp_path / name).write_text("#!/bin/sh\necho release 99\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("CXX", f"{tmp_path}/c++ -stdlib=libc++")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert f"{tmp_path}/c++ (release 99)" in out and f"{tmp_path}/bin/nvcc (release 99)" in out
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert "C++ compiler  /nonexistent/c++ not found" in lines and "nvcc          not found" in lines


def test_doctor_without_torch_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert leaving.value.code == 1 and lines[0].startswith("fastflow")
    assert lines[-1].startswith("torch         can't be imported, and nothing works without it: ")


def test_importing_the_command_line_loads_nothing_heavy():
    heavy = {"torch", "rich", "pydantic", "safetensors", "matplotlib", "PIL", "sklearn", "skimage"}
    code = f"import sys, fastflow.cli, fastflow.engine; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("missing, said", [
    (["rich"], "needs rich, not installed: pip install 'fastflow[train]'"),
    (["matplotlib"], "needs matplotlib, not installed: pip install 'fastflow[train]'"),
    (["pydantic", "PIL"], "needs pydantic, pillow, not installed: pip install 'fastflow[data,train]'"),
])
@pytest.mark.parametrize("command", [["train", "glow-digits"], ["sample", "."], ["evaluate", "."]])
def test_a_missing_extra_is_one_line_that_says_what_to_install(capsys, monkeypatch, missing, said, command):
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    assert said in refused(capsys, *command)


@pytest.mark.parametrize("name, module, said", [
    ("photos", "skimage", "data.name: the photos are inside scikit-image, which is not installed: pip install 'fastf"),
    ("digits", "sklearn.datasets", "data.name: digits needs sklearn, which is not installed: pip install 'fastflow[da"),
])
def test_libraries_with_data_are_needed_by_who_asks_for_those(capsys, monkeypatch, tmp_path, name, module, said):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert said in refused(capsys, "train", f"glow-{name}", "--out", tmp_path / "run")
    cli.check_extras()  # who does not goes without


def test_a_missing_library_of_a_file_is_one_line(capsys, monkeypatch, tmp_path):
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "data.path: reading Parquet needs pyarrow, which is not installed: pip install 'fastflow[tables]'" in \
        refused(capsys, "train", "maf-power", "--set", f"data.path={tmp_path / 't.parquet'}", "--out", tmp_path / "run")


def test_the_package_is_a_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastflow", "--version"])
    with pytest.raises(SystemExit) as leaving:
        runpy.run_module("fastflow", run_name="__main__")
    assert leaving.value.code == 0 and capsys.readouterr().out.startswith("fastflow ")


def test_bench_runs_the_benchmarks_of_the_directory_it_is_called_in(tmp_path):
    away = run("bench", "ops", cwd=tmp_path)
    assert away.returncode == 1 and "benchmarks" in away.stderr and away.stderr.count("\n") == 1
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # else a package of that name elsewhere on the path goes first
    (tmp_path / "benchmarks" / "run.py").write_text("def main(arguments):\n    print(arguments)\n    return 3\n")
    for arguments in (["ops", "--threads", "1"], ["--help"], []):
        here = run("bench", *arguments, cwd=tmp_path)
        assert here.returncode == 3 and here.stdout == f"{arguments}\n", here.stderr


def test_a_damaged_data_file_is_one_line(monkeypatch, capsys):
    def damaged(arguments):
        raise DataFileError("train.npy", "is truncated")

    monkeypatch.setattr(cli, "run_doctor", damaged)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["doctor"])
    assert leaving.value.code == 1 and capsys.readouterr().err == "fastflow: train.npy: is truncated\n"
