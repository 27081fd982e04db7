"""SIGTERM, SIGUSR1 and SIGINT as a request to stop at the next step; a second one acts at once."""

import signal
import threading
import time

from fastflow.engine.errors import RunError

__all__ = ["Interrupted", "StopSignals"]

NUMBERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
# A scheduler signals every process of a job, and torchrun, which is one of them, passes it on: that is one request.
ECHO_SECONDS = 2.0


class Interrupted(RunError):
    """A run stopped on a signal, after saving. ``exit_status`` is the shell's 128 + signal number."""

    def __init__(self, number, message):
        super().__init__(f"{signal.Signals(number).name}: {message}")
        self.exit_status = 128 + number


class StopSignals:
    """Within it, ``received`` is the number of the signal that came, or None. Inert outside the main thread.

    After the first, SIGINT acts at once, and so does any other after two seconds.
    """

    def __init__(self):
        self.received = None
        self._previous, self._at = {}, 0.0

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in NUMBERS}
        return self

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            if signal.SIGINT in self._previous:
                signal.signal(signal.SIGINT, self._previous.pop(signal.SIGINT))
        elif time.monotonic() - self._at > ECHO_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self):
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def __exit__(self, *_):
        self._restore()
