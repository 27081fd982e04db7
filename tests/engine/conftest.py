"""Where the extras of `fastflow train` are missing, only the tests that need none of them are collected; charts are
drawn for the tests that look at them."""

import importlib.util

import pytest

EXTRAS = ("rich", "pydantic", "safetensors", "matplotlib", "sklearn", "skimage", "PIL")
collect_ignore = []
if any(importlib.util.find_spec(name) is None for name in EXTRAS):
    collect_ignore = ["test_checkpoint.py", "test_checkpoint_faults.py", "test_cli.py", "test_commands.py",
                      "test_diagnosis.py", "test_export.py", "test_export_vae.py", "test_full_cycle.py",
                      "test_labels.py", "test_launches_page.py", "test_pictures.py", "test_processes.py",
                      "test_processes_cli.py", "test_recipes.py", "test_report.py", "test_resume.py",
                      "test_settings.py", "test_tables.py", "test_trainer.py", "test_trainer_overhead.py",
                      "test_vae_settings.py", "test_watch.py"]

LOOKING = ("test_diagnosis", "test_full_cycle", "test_report", "test_watch", "sweep")  # parts of their names


@pytest.fixture(autouse=True)
def blank_charts(request, monkeypatch):
    """Elsewhere a chart is an empty picture: to lay it out takes most of the time of a run of a few steps."""
    if any(name in request.node.nodeid for name in LOOKING):
        return
    import numpy as np

    from fastflow.engine import charts
    from fastflow.engine.pictures import save_picture

    def save(path, drawn):
        save_picture(path, np.zeros((1, 1, 3), np.uint8))
        return path
    monkeypatch.setattr(charts, "save", save)
