"""For all tests: no test fails for the time it took, as the machine may be busy; and hypothesis draws the same examples
each time, so that a change is red for what it changed. `--hypothesis-profile=explore` draws new ones. The process ends
with the session's status: as a run's (`rlhf_worker.__main__`), whose native libraries may crash at the very end.
"""

import atexit
import os
import sys

import pytest
from hypothesis import settings

settings.register_profile("explore", deadline=None)
settings.register_profile("repeat", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeat")


def pytest_sessionstart(session: pytest.Session) -> None:
    atexit.register(_leave, session)  # before what tests import: called last


def _leave(session: pytest.Session) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(session.exitstatus)
