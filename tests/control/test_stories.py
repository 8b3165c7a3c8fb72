"""Whole lives of a job as readable logs."""

import pytest

from tests.control.golden import check
from tests.control.stories import STORIES
from tests.control.world import World


def told(world: World, story: str) -> str:
    lines = []
    writes = events = 0
    for what in STORIES[story](world):
        world.settle()
        status = world.status
        lines.append(f"{what}\n    {status['phase']} {status.get('reason')}: {status.get('message')}")
        lines += [
            f"    ~ {c['reason']}: {c['message']}"
            for c in status["conditions"]
            if c["type"] == "Degraded" and c["status"] == "True"
        ]
        lines += [
            f"    > {write}"
            for write in world.api.writes[writes:]
            if "Event" not in write and "apply RLHFJob" not in write
        ]
        lines += [f"    ! {event}" for event in world.events()[events:]]
        writes, events = len(world.api.writes), len(world.events())
    restarts = {name: n for name, n in world.status["restarts"].items() if n}
    lines.append(
        f"restarts: {restarts}, since progress: {world.record['restartsSinceProgress']}, active seconds: "
            f"{world.record['activeSeconds']}"
    )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("story", STORIES)
def test_a_story_is_told_as_before(story: str) -> None:
    check(f"stories/{story}.log", told(World(), story))
