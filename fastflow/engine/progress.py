"""What the terminal shows during training: a bar where there is a terminal, a line now and then where there is none."""

import math
import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

__all__ = ["TrainProgress"]

REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0
SMOOTHING = 0.9
TEXT_WIDTH = 72  # what stands beside the bar, so that a line fits into 80 columns
DECIMALS = {"bits/dim": 3, "log_prob": 3, "images/s": 0, "rows/s": 0}  # other nats have one


class TrainProgress:
    """Shows step, smoothed figures and the speed; use as a context manager.

    Args:
        console: a rich Console.
        title: what is being trained.
        n_steps, first_step: the last step to reach and the one to begin at.
    """

    def __init__(self, console, title, n_steps, first_step=0):
        self._console, self._title, self._n_steps = console, title, n_steps
        width = max(8, min(24, console.width - TEXT_WIDTH))
        whole = Column(no_wrap=True)  # where a line is too long, the bar gives way
        self._bar = Progress(BarColumn(bar_width=width), MofNCompleteColumn(table_column=whole),
                             TextColumn("{task.fields[figures]}"), TimeRemainingColumn(table_column=whole),
                             console=console, refresh_per_second=1 / REDRAW_SECONDS)
        self._task = self._bar.add_task(title, total=n_steps, completed=first_step, figures="")
        self._smooth = {}
        self._shown = time.perf_counter()

    def __enter__(self):
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, step, figures, per_second, unit="images"):
        """figures: {name: float} of this step; they and the speed, in units a second, are smoothed before they are
        shown."""
        for name, value in {**figures, f"{unit}/s": per_second}.items():
            before = self._smooth.get(name, value)
            before = before if math.isfinite(before) else value  # one that is not finite is seen and forgotten
            self._smooth[name] = SMOOTHING * before + (1 - SMOOTHING) * value
        now, last = time.perf_counter(), step == self._n_steps
        if now - self._shown < (REDRAW_SECONDS if self._console.is_terminal else LINE_SECONDS) and not last:
            return
        self._shown = now
        text = "  ".join(f"{name} {value:.{DECIMALS.get(name, 1)}f}" for name, value in self._smooth.items())
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, figures=text)
        else:
            self.say(f"{self._title}  step {step}/{self._n_steps}  {text}")

    def say(self, line):
        """Prints a line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
