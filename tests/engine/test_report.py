"""The report of a run and its curves; the whole page is tested with a run's full cycle."""

import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from fastflow import cli
from fastflow.engine import build_model, load_settings
from fastflow.engine.charts import curves
from fastflow.engine.files import read_log, to_json, write_text
from fastflow.engine.gallery import draw_curves
from fastflow.engine.pictures import save_picture


def test_a_directory_without_a_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", str(tmp_path)])
    assert "holds no checkpoints" in capsys.readouterr().err


def test_curves_leave_out_what_is_not_finite_and_lines_that_a_kill_cut_short(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "elbo": 2.0}\n{"step": 2, "elbo": NaN}\n{"step": 3, "elbo": 1.0}\n{"step": 4, "elbo": Infinity}\n'
        '{"step": 4, "test_elbo": 1.5}\n[]\n{"step": 5, "el')
    log = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 4]
    training, held_out = curves(log).axes[0].lines
    assert training.get_xydata().tolist() == [[1.0, 2.0], [3.0, 1.0]] and held_out.get_xydata().tolist() == [[4.0, 1.5]]
    assert curves(log[:1]) is None and draw_curves(tmp_path / "nowhere") is None


def test_a_log_with_bytes_that_are_no_text_keeps_its_other_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\x00\n{"step": 2}\n')
    assert read_log(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_json_knows_no_number_that_is_not_finite():
    assert to_json({"a": [np.inf, (1.5, -np.inf)], "b": {"c": np.nan}}) == \
        '{"a": [null, [1.5, null]], "b": {"c": null}}'


def test_texts_are_in_utf_8_whatever_the_locale(tmp_path):
    code = (f"from pathlib import Path; from fastflow.engine.files import write_text;"
            f"write_text(Path({str(tmp_path)!r}, 'x'), '\\xe9')")
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | ascii_locale, check=True)
    assert (tmp_path / "x").read_bytes() == b"\xc3\xa9"


def test_a_file_that_can_not_be_written_is_named_and_nothing_is_left_of_it(tmp_path):
    (tmp_path / "page").mkdir()  # in the way
    for write in (lambda path: write_text(path, "text"), lambda path: save_picture(path, np.zeros((2, 2), np.uint8))):
        with pytest.raises(OSError) as caught:
            write(tmp_path / "page")
        assert caught.value.filename == str(tmp_path / "page")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError) as caught:
            write_text(tmp_path / "long", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / "long") and caught.value.strerror == "File too large"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]


def test_a_long_curve_is_averaged_down():
    line, = curves([{"step": step, "elbo": float(step % 2)} for step in range(1, 2001)]).axes[0].lines
    points = line.get_xydata()
    assert len(points) == 400 and points[-1, 0] == 2000 and abs(points[:, 1].mean() - 0.5) < 1e-12


def test_a_dry_run_says_what_a_step_takes_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["train", "vae-digits", "--dry-run"])
    found = dict(line.split() for line in capsys.readouterr().out.splitlines())
    expected = sum(p.numel() for p in build_model(load_settings("vae-digits")).parameters())
    assert int(found["parameters"].replace(",", "")) == expected and int(found["activation_bytes"].replace(",", "")) > 0
    assert not list(tmp_path.iterdir())
