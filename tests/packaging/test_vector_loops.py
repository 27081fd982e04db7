"""Loops over elements that are written to be vectorised are, with the wider instruction sets: a compiler that finds one
of them too hard makes a correct, slow one of scalars, and says nothing."""

import collections
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
PRAGMA = re.compile(r"\s*#pragma (omp simd|GCC ivdep)")
VERDICT = re.compile(r"(\S+):(\d+):\d+: (optimized: loop vectorized|missed: couldn't vectorize loop)")
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not (BUILD / "build.ninja").exists(), reason="the kernels were not built in place")]


def loops_of(text):
    """{line number: first line of the loop that it belongs to}, of loops behind a pragma."""
    lines, found = text.split("\n"), {}
    for first, pragma in enumerate(lines, 1):  # the pragma's own number is one less than the loop's
        if not PRAGMA.match(pragma):
            continue
        depth = len(lines[first]) - len(lines[first].lstrip())
        found[first + 1] = first + 1
        for number in range(first + 2, len(lines) + 1):
            line = lines[number - 1]
            if line.strip() and len(line) - len(line.lstrip()) <= depth:
                break
            found[number] = first + 1
    return found


def kernel_commands():
    """{(source, instruction set): the build's command} of the wider two."""
    database = subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD), "-t", "compdb", "cxx"],
                              capture_output=True, text=True, check=True).stdout
    database = database[database.index("["):]  # ninja says first which folder it enters
    found = ((re.search(r"-DFASTFLOW_ISA=(avx\w+)", entry["command"]), entry) for entry in json.loads(database))
    return {(Path(entry["file"]), isa[1]): entry["command"] for isa, entry in found if isa}


def test_loops_of_vectors(tmp_path):
    commands = kernel_commands()
    if not commands:
        pytest.skip("no kernels for AVX2 or AVX-512 on this processor")
    if b"Free Software Foundation" not in subprocess.run([os.environ.get("CXX") or "c++", "--version"],
                                                         capture_output=True).stdout:
        pytest.skip("the compiler is not gcc, whose reports are read")

    def verdicts(item):
        (source, isa), command = item
        object_file = tmp_path / f"{source.stem}_{isa}.o"
        command = re.sub(r" -MMD -MF \S+", "", command)
        command = re.sub(r" -o \S+$", f" -o {object_file} -fopt-info-vec-optimized -fopt-info-vec-missed", command)
        said = subprocess.run(command, shell=True, cwd=BUILD, capture_output=True, text=True, check=True).stderr
        object_file.unlink()
        return [(isa, (BUILD / path).resolve(), int(line), verdict.startswith("optimized"))
                for path, line, verdict in VERDICT.findall(said)]

    lines = {path: loops_of(path.read_text()) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp")}
    loops = collections.defaultdict(set)  # of an instruction set and a loop: what became of its instances
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(verdicts, commands.items()):
            for isa, path, line, vectorised in found:
                first = lines.get(path, {}).get(line)
                if first is not None:
                    loops[isa, path.name, first].add(vectorised)
    assert len(loops) > 30
    assert not [loop for loop, became in sorted(loops.items()) if True not in became]
