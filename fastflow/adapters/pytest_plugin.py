"""``pytest -p fastflow.adapters.pytest_plugin`` runs any test suite on fused layers.

Every layer of a known library that a test builds is swapped as accelerate() does it, as soon as it is made, and held
against its original at its first call. The summary at the end of the run says what was swapped, what was put back and
what was left alone. Layers that a module builds while it is imported are reached if the library was imported before.
"""

import functools

import pytest

from fastflow.adapters import core
from fastflow.adapters import swap as swaps
from fastflow.adapters.report import Report

__all__ = ["Plugin"]

_KEY = pytest.StashKey()


class Plugin:
    """The constructors of known layers while pytest runs.

    Attributes:
        report: Report of all layers that were built, under numbers.
    """

    def __init__(self):
        self.report = Report()
        self._wrapped = {}  # {host class: its own __init__, None where it inherits one}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collectstart(self):
        self.install()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self):
        self.install()

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("fastflow")
        terminalreporter.write_line(str(self.report))

    def pytest_unconfigure(self):
        self.uninstall()

    def install(self):
        """Wrap the constructors of the layers of every library that was imported since the last call."""
        core._adapters()
        for host in swaps.SWAPS.keys() - self._wrapped.keys():
            self._wrapped[host] = host.__dict__.get("__init__")
            host.__init__ = self._swapping(host, host.__init__)

    def uninstall(self):
        """Put the constructors back; layers stay as they are."""
        for host, own in self._wrapped.items():
            if own is None:
                del host.__init__
            else:
                host.__init__ = own
        self._wrapped.clear()

    def _swapping(self, host, constructor):
        @functools.wraps(constructor)
        def init(module, *args, **kwargs):
            constructor(module, *args, **kwargs)
            if type(module) is host:  # not a subclass on the way up
                self._built(module, host)
        return init

    def _built(self, module, host):
        known, name = swaps.SWAPS[host], len(self.report.swapped) + len(self.report.skipped)
        constants = swaps.fitted(module, known, False)
        if isinstance(constants, str):
            self.report.skipped[name] = f"{swaps.title(host)}: {constants}"
            return
        swaps.put(module, known, constants, self.report, name)
        self.report.swapped[name] = swaps.title(host)


def pytest_configure(config):
    config.stash[_KEY] = Plugin()
    config.pluginmanager.register(config.stash[_KEY], "fastflow")
