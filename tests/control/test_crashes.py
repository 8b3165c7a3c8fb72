"""The operator is killed after every single write of every story (which is also right before the next one): the end is
the same.
"""

from typing import Any

import pytest

from tests.control.stories import STORIES
from tests.control.world import World


def lived(story: str, kill_at: int | None = None) -> World:
    world = World()
    world.api.kill_at = kill_at
    for _ in STORIES[story](world):
        world.settle()
    return world


def common_writes(story: str) -> int:
    """Writes of the beginning that the story shares with `success`, whose crashes are tried there."""
    ours, theirs = World(), World()
    for mine, other in zip(STORIES[story](ours), STORIES["success"](theirs), strict=False):
        if mine != other or story == "success":
            break
        ours.settle()
    return len(ours.api.writes)


def essence(world: World) -> dict[str, Any]:
    """What must be the same. Events may be lost with a crash: they tell of the state and are none. A condition's time
    may differ: a state that lasted for no time need not have been told.
    """
    told = [{**c, "lastTransitionTime": ""} for c in world.status["conditions"]]
    return {
        "status": {**world.status, "conditions": told}, "clusters": world.clusters(),
        "pods": [p["metadata"]["name"] for p in world.pods()]
    }


def changes(world: World) -> list[str]:
    return [write for write in world.api.writes if not write.startswith(("apply RLHFJob", "create Event"))]


@pytest.mark.parametrize("story", STORIES)
def test_a_crash_at_any_write_changes_nothing(story: str) -> None:
    whole = lived(story)
    for n in range(common_writes(story), len(whole.api.writes)):
        if (write := whole.api.writes[n]).startswith("create Event"):
            continue
        world = lived(story, n)
        assert essence(world) == essence(whole), f"killed after {write!r}, the {n}th write"
        assert sorted(changes(world)) == sorted(changes(whole)), "something was made or deleted twice, or not at all"
