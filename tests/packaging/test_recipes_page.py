"""The commands of docs/recipes.md: each parses, its recipe and settings exist, and those on data that ship run."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
COMMANDS = [shlex.split(line, comments=True)[1:] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S)
            for line in block.splitlines() if line.startswith("fastflow ")]
NEEDED = ("rich", "pydantic", "safetensors", "sklearn", "skimage", "PIL")
pytestmark = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDED),
                                reason="the extras of fastflow train are not installed")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_is_known(words):
    from fastflow import cli
    from fastflow.engine import load_settings

    arguments, rest = cli.parser().parse_known_args(words)
    assert not rest and arguments.command is not None
    if words[0] == "train" and arguments.recipe:
        load_settings(arguments.recipe, arguments.overrides)


def test_the_formats_and_tables_of_the_page_are_those_that_there_are():
    from fastflow.data import DATASETS, FORMATS, TABLES

    first = [row.split(" | ")[0].strip("| ") for row in PAGE.splitlines() if row.startswith("| `")]
    assert sorted(", ".join(first[1:]).replace("`", "").split(", ")) == sorted(FORMATS)
    for name in (*DATASETS, *FORMATS, *TABLES):
        assert f"`{name}`" in PAGE


def test_the_preparation_of_the_page_is_read(tmp_path, monkeypatch):
    """What it writes, from a file that stands for the HDF5 one, is a table with three parts."""
    import contextlib
    import types

    import numpy as np

    from fastflow import data

    (block,) = re.findall(r"```\n(import h5py.*?)```", PAGE, re.S)
    arrays = {name: np.random.default_rng(i).normal(size=(20 + i, 63))
              for i, name in enumerate(("train", "validation", "test"))}
    monkeypatch.setitem(__import__("sys").modules, "h5py", types.SimpleNamespace(
        File=lambda path: contextlib.nullcontext(arrays)))
    (tmp_path / "data/bsds300").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/recipes.md", "exec"), {})
    found = data.load("data/bsds300", format="table")
    assert (len(found.train), len(found.validation), len(found.test)) == (20, 21, 22)
