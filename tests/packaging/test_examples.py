"""The examples in docs/examples run, and reach the closed forms that they name."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    if path.stem == "as_distribution":
        pytest.importorskip("pyro")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    assert capsys.readouterr().out


def test_there_is_one_for_each_use():
    assert {path.stem for path in EXAMPLES} == {"amortised_inference", "as_distribution", "boltzmann_generator",
                                                "reverse_kl"}
