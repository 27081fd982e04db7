"""The benchmarks run: a case of the registry under pytest-benchmark, and the runner past a baseline that raises."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALLEST = "affine_coupling exp (64, 512) forward+backward"


@pytest.fixture
def benchmarks(monkeypatch):
    """benchmarks.run, importable from the repository's root, with short rounds."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import run, timing

    monkeypatch.setattr(timing, "ROUND_SECONDS", 1e-5)
    return run


# A plugin that names what was collected and leaves the smallest case.
LISTING = f"""
def pytest_collection_modifyitems(items):
    print(*(item.name for item in items), sep="\\n")
    items[:] = [item for item in items if item.name in ("test_op[{SMALLEST}-fastflow]", "test_op[{SMALLEST}-eager]")]
"""


def test_the_registry_is_collected_and_its_smallest_case_runs(benchmarks, tmp_path):
    (tmp_path / "listing.py").write_text(LISTING)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tmp_path), environment.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "listing", "-s", "benchmarks",
         "--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0", "--benchmark-min-time=0"],
        cwd=ROOT, text=True, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for case in benchmarks.cases.OP_CASES:
        for variant in case.variants:
            assert f"test_op[{case.name}-{variant}]\n" in result.stdout
    assert f"benchmark '{SMALLEST}': 2 tests" in result.stdout


def test_one_call_that_was_held_up_does_not_set_the_repeats_of_a_row(benchmarks, monkeypatch):
    """They would be so few that most of them meet the caches as another variant left them."""
    from benchmarks import timing

    seconds, seen = iter([3e-3, 1e-4, 1e-4]), []

    def measure(call, repeats):
        seen.append(repeats)
        return next(seconds, 1e-4)
    monkeypatch.setitem(timing._MEASURES, "wall", measure)
    samples, failed = timing.interleave({"op": lambda: None}, "wall", rounds=4, round_seconds=0.01)
    assert not failed and len(samples["op"]) == 4
    assert seen[-4:] == [100] * 4


def test_the_record_says_that_glibc_keeps_what_is_freed(benchmarks):
    """mallopt's own answer: False where it took neither bound."""
    glibc = platform.libc_ver()[0] == "glibc"
    assert benchmarks.machine("cpu")["malloc"] == ("keeps what is freed" if glibc else "as it is")


def fail():
    raise RuntimeError("no such size\nand many details")


@pytest.mark.parametrize(("variants", "failed", "status"), [
    ({"fastflow": int, "eager": fail, "compile": int}, {"eager": "no such size"}, 0),
    ({"fastflow": fail, "eager": int}, {"fastflow": "no such size"}, 1),
    (None, {"fastflow": "no such size"}, 1),
])
def test_what_raises_is_reported_and_the_others_measured(benchmarks, monkeypatch, tmp_path, capsys, threads, variants,
                                                        failed, status):
    threads(1)
    build = (lambda device: fail()) if variants is None else (lambda device: variants)
    broken = benchmarks.cases.Case("broken case", "slogdet", build)
    sound = benchmarks.cases.Case("sound case", "slogdet", lambda device: {"fastflow": int, "eager": int})
    monkeypatch.setattr(benchmarks.cases, "OP_CASES", (broken, sound))
    assert benchmarks.main(["ops", "--rounds", "3", "--results", str(tmp_path)]) == status
    printed = capsys.readouterr()
    for name, message in failed.items():
        assert printed.out.count(f"{name} failed: {message}\n") == 2  # one thread, all threads
    assert ("broken case" in printed.err) == bool(status)
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert [row["case"] for row in rows] == ["broken case"] * 2 + ["sound case"] * 2
    measured = set(variants or ()) - set(failed)
    for row in rows[:2]:
        assert row["failed"] == failed
        assert set(row["median_us"]) == set(row["quartiles_us"]) == measured
        assert set(row["speedup_over"]) == (measured - {"fastflow"} if "fastflow" in measured else set())
    for row in rows[2:]:
        assert row["failed"] == {} and set(row["speedup_over"]) == {"eager"}
    for row in rows:
        for name, (low, high) in row["quartiles_us"].items():
            assert low <= row["median_us"][name] <= high


def test_memory_modes_are_measured(benchmarks, capsys, threads):
    from benchmarks import memory

    threads(1)
    rows = list(memory.modes_rows("cpu", 1, n=1, hidden=32, depths=(2,)))
    assert [row["mode"] for row in rows] == list(memory.MODES)
    none, save_z, invert, _ = (row["saved_bytes_per_image"] for row in rows)
    assert none > save_z > invert == 4 * 3072
    for row in rows:
        assert row["failed"] is None and row["time_over_none"] > 0
        assert row["peak_bytes_per_image"] >= row["saved_bytes_per_image"]
        memory.show(row)
    assert capsys.readouterr().out.count("MB/image") == 8
    assert memory.main(["--child", "cpu", "16", "1", "8", "1", "save_z"]) is None
    assert int(capsys.readouterr().out) >= 0
