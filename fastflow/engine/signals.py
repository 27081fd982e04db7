"""SIGTERM and SIGINT as a request to stop at the next step; a second one acts at once."""

import signal
import threading

from fastflow.engine.errors import RunError

__all__ = ["Interrupted", "StopSignals"]


class Interrupted(RunError):
    """A run stopped on a signal, after saving. ``exit_status`` is the shell's 128 + signal number."""

    def __init__(self, number, message):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_status = 128 + number


class StopSignals:
    """Within it, ``received`` is the number of the signal that came, or None. Inert outside the main thread."""

    def __init__(self):
        self.received = None
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _handle(self, number, frame):
        self.received = number
        self._restore()

    def _restore(self):
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._restore()
