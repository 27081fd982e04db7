"""Where the extras of `fastflow train` are missing, only the tests that need none of them are collected."""

import importlib.util

EXTRAS = ("rich", "pydantic", "safetensors", "matplotlib", "sklearn", "skimage", "PIL")
collect_ignore = []
if any(importlib.util.find_spec(name) is None for name in EXTRAS):
    collect_ignore = ["test_checkpoint.py", "test_checkpoint_faults.py", "test_cli.py", "test_commands.py",
                      "test_diagnosis.py", "test_export.py", "test_full_cycle.py", "test_labels.py", "test_pictures.py",
                      "test_processes.py", "test_processes_cli.py", "test_recipes.py", "test_report.py",
                      "test_resume.py", "test_settings.py", "test_tables.py", "test_trainer.py",
                      "test_trainer_overhead.py", "test_watch.py"]
