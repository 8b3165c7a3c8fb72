"""For all tests: no test fails for the time it took, as the machine may be busy; and hypothesis draws the same examples
each time, so that a change is red for what it changed. `--hypothesis-profile=explore` draws new ones. The process ends
with the session's status: as a run's (`rlhf_worker.__main__`), whose native libraries may crash at the very end. A file
that took long says so as soon as it is over: a suite that is cut off has said where its time went. What needs programs
that a fresh machine still builds comes last, and so does the cluster: it costs other tests a seventh of a core.
"""

import atexit
import os
import signal
import sys

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import settings

settings.register_profile("explore", deadline=None)
settings.register_profile("repeat", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeat")

LONG = 20.0  # seconds of a file's tests, with their fixtures
LAST = ("charts", "cluster")


class Durations:
    """The seconds of the file that runs, written when the next one begins."""

    def __init__(self, terminal: TerminalReporter) -> None:
        self.terminal = terminal
        self.file = ""
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        if file != self.file:
            self._write()
            self.file, self.seconds = file, 0.0
        self.seconds += report.duration

    def pytest_sessionfinish(self) -> None:
        self._write()

    def _write(self) -> None:
        if self.seconds >= LONG:
            self.terminal.write_line(f"\n{self.file} took {self.seconds:.0f} s")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LAST.index(name) if (name := item.path.parent.name) in LAST else -1)


@pytest.hookimpl(trylast=True)  # the terminal is there by then
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if isinstance(terminal, TerminalReporter):
        config.pluginmanager.register(Durations(terminal))


def pytest_sessionstart(session: pytest.Session) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's `&` had us ignore, and what tests start
    atexit.register(_leave, session)  # before what tests import: called last


def _leave(session: pytest.Session) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(session.exitstatus)
