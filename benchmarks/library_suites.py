"""The test suites of other libraries, from their source distributions, as they are and with every known layer swapped.

    python -m benchmarks.library_suites [--sdists FOLDER] [--filter nflows] [--results FOLDER]

The archives are taken from FOLDER; what is missing there is fetched from PyPI (``pip download``). A suite runs on the
library in its archive, each test with the same seed both times. What the libraries need has to be installed, and
torchtestcase, which nflows' suite needs.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from benchmarks import run

SUITES = {"normflows": "1.7.3", "nflows": "0.14", "zuko": "1.6.0"}
OUTCOMES = ("passed", "failed", "error")
SEED = "import pytest, torch\n\n\n@pytest.fixture(autouse=True)\ndef seeded():\n    torch.manual_seed(0)\n"


def sdist(name, version, folder):
    """The path of a source distribution in ``folder``, fetched if it is not there.

    Raises:
        RuntimeError: pip can't fetch it; the message is pip's.
    """
    def found():
        return next(folder.glob(f"{name}-{version}.tar.gz"), None)

    if found() is None:
        got = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                              "--no-build-isolation", "--dest", str(folder), f"{name}=={version}"],
                             capture_output=True, text=True, check=False)
        if found() is None:
            raise RuntimeError(got.stderr.strip() or f"pip brought no {name}-{version}.tar.gz")
    return found()


def suite(archive, folder):
    """Unpack an archive under ``folder``; returns its root and the paths of its tests."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    root = next(path for path in folder.iterdir() if path.is_dir())
    (root / "conftest.py").write_text(SEED)
    return root, sorted({str(path) for pattern in ("*_test.py", "test_*.py") for path in root.rglob(pattern)})


def outcome(root, files, accelerated):
    """{"passed", "failed", "error"}: numbers, "failures": names, and with the plugin "swapped" and "verified".

    Raises:
        RuntimeError: tests can't be collected; the message says why.
    """
    plugin = ["-p", "fastflow.adapters.pytest_plugin"] if accelerated else []
    done = subprocess.run([sys.executable, "-m", "pytest", *plugin, "-p", "no:cacheprovider", "-p", "no:randomly", "-q",
                           "--import-mode=importlib", "-rfE", "--rootdir", str(root), *files],
                          capture_output=True, text=True, check=False, cwd=root)
    missing = re.search(r"^E +(\w*Error: .*)$", done.stdout, re.MULTILINE)
    if "during collection" in done.stdout:
        raise RuntimeError(missing.group(1) if missing else "its tests can't be collected")
    return parsed(done.stdout)


def parsed(output):
    """What pytest's terminal says, see :func:`outcome`."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    counts = {name: int(n) for n, name in re.findall(r"(\d+) (passed|failed|error)", last)}
    found = {name: counts.get(name, 0) for name in OUTCOMES}
    found["failures"] = sorted(re.findall(r"^(?:FAILED|SUBFAILED\(.*\)|ERROR) \S*?([^/\s]+\.py\S*)", output,
                                         re.MULTILINE))
    layers = re.search(r"^(\d+) layers swapped, (\d+) of them verified", output, re.MULTILINE)
    if layers:
        found["swapped"], found["verified"] = map(int, layers.groups())
    return found


def measure(name, version, folder):
    """A row of the record: both outcomes of a suite.

    Raises:
        RuntimeError: the archive can't be had, or its tests can't be collected.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root, files = suite(sdist(name, version, folder), Path(scratch))
        return {"suite": f"{name} {version}", "without": outcome(root, files, False),
                "with": outcome(root, files, True)}


def show(row):
    """A row of the table in docs/migration.md."""
    def cell(found):
        return ", ".join(f"{found[name]} {name}" for name in OUTCOMES if found[name] or name == "passed")

    with_it = row["with"]
    print(f"| {row['suite']} | {with_it.get('swapped')} | {with_it.get('verified')} | {cell(row['without'])} | "
          f"{cell(with_it)} |", flush=True)
    for name in sorted(set(with_it["failures"]) - set(row["without"]["failures"])):
        print(f"  fails only with the plugin: {name}", flush=True)


def main(argv=None):
    """Run the suites; returns the exit status, 1 where one could not run or a test fails with the plugin alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library_suites", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdists", type=Path, help="folder of the archives; a temporary one without it")
    parser.add_argument("--filter", default="", help="only the libraries whose name holds this")
    parser.add_argument("--results", type=Path, help="folder for the JSON; none is written without it")
    args = parser.parse_args(argv)
    rows, wrong = [], False
    with tempfile.TemporaryDirectory() as scratch:
        for name, version in SUITES.items():
            if args.filter not in name:
                continue
            try:
                rows.append(measure(name, version, args.sdists or Path(scratch)))
            except RuntimeError as error:
                print(f"{name} {version}: {error}", file=sys.stderr)
                wrong = True
                continue
            show(rows[-1])
            wrong |= not set(rows[-1]["with"]["failures"]) <= set(rows[-1]["without"]["failures"])
    if args.results and rows:
        run.save(args.results, "cpu-library-suites", {"machine": run.machine("cpu"), "rows": rows})
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
