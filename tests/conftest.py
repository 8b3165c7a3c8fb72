"""For all tests: no test fails for the time it took, as the machine may be busy; and hypothesis draws the same examples
each time, so that a change is red for what it changed. `--hypothesis-profile=explore` draws new ones.
"""

from hypothesis import settings

settings.register_profile("explore", deadline=None)
settings.register_profile("repeat", parent=settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeat")
