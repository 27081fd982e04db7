"""What a terminal shows during training."""

import io
import re
import time

from rich.console import Console

from fastflow.engine import progress


def test_the_bar_shows_step_bits_speed_and_time_left(monkeypatch):
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.01)
    out = io.StringIO()
    with progress.TrainProgress(Console(file=out, force_terminal=True, width=110), "glow-digits", 40, 10) as shown:
        for step in range(11, 31):
            shown.update(step, {"bits/dim": 2.5}, 1234.0)
            time.sleep(0.012)
        shown.say("step 30: saved")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if "bits/dim" in line][-1]
    assert re.search(r"\b30/40 +bits/dim 2\.500  images/s 1234 +\d:\d\d:\d\d", last), last
    assert "step 30: saved" in text and all(len(line) <= 110 for line in text.splitlines())


def test_in_80_columns_the_bar_gives_way_to_count_figures_and_time(monkeypatch):
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.01)
    out = io.StringIO()
    with progress.TrainProgress(Console(file=out, force_terminal=True, width=80), "vae-photos", 4500, 1100) as shown:
        for step in range(1101, 1106):
            time.sleep(0.012)
            shown.update(step, {"bits/dim": 4.769, "rate": 192.9, "distortion": 9962.7}, 12345.0)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = [line for line in re.split(r"[\r\n]+", text) if "bits/dim" in line][-1]
    assert "1105/4500 bits/dim 4.769  rate 192.9  distortion 9962.7  images/s 12345 " in last and len(last) <= 80, last


def test_without_a_terminal_it_is_a_line(monkeypatch):
    out = io.StringIO()
    with progress.TrainProgress(Console(file=out, width=80), "maf-power", 3) as shown:
        shown.update(2, {"log_prob": -1.0}, 50.0, "rows")  # too early for a line
        shown.update(3, {"log_prob": -2.0}, 50.0, "rows")
    assert out.getvalue() == "maf-power  step 3/3  log_prob -1.100  rows/s 50\n"
