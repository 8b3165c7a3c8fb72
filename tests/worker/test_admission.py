"""Admission: the bound on staleness, refills, and prompts over a resume."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_worker.experience import Prompt
from rlhf_worker.rollout.admission import Admission, Group
from tests.worker.samples import a_prompt


def prompts(first: int, count: int) -> list[Prompt]:
    return [a_prompt(row) for row in range(first, first + count)]


def finished(admission: Admission, groups: list[Group]) -> None:
    for group in groups:
        admission.finish(group, informative=True)


def test_synchronous_has_room_for_one_step_and_none_while_it_is_trained() -> None:
    admission = Admission(batch=4, staleness=0, steps=9)
    assert admission.room == 4
    groups = admission.admit(prompts(0, 4))
    assert admission.room == 0 and not admission.complete
    finished(admission, groups)
    assert admission.take() == groups
    assert admission.room == 0
    admission.advance(1)
    assert admission.room == 4


def test_one_step_ahead_has_room_for_two() -> None:
    admission = Admission(batch=4, staleness=1, steps=9)
    groups = admission.admit(prompts(0, 8))
    finished(admission, groups[2:])
    assert admission.take() == groups[2:6]  # no group is too old yet, so the finished go first
    admission.advance(1)
    assert admission.room == 4
    finished(admission, admission.admit(prompts(8, 4)))
    assert not admission.complete  # the first two were born at 0 and may not wait for step 3
    finished(admission, groups[:2])
    assert admission.take() == [*groups[:2], *groups[6:]]


def test_nothing_begins_that_no_step_is_left_for() -> None:
    assert Admission(batch=4, staleness=3, steps=2).room == 8
    assert Admission(batch=4, staleness=3, steps=2, step=2).room == 0


def test_more_groups_than_room_are_refused() -> None:
    with pytest.raises(ValueError, match="5 groups do not fit into a room of 4"):
        Admission(batch=4, staleness=0, steps=9).admit(prompts(0, 5))


def test_an_uninformative_group_is_refilled_and_after_the_last_round_kept() -> None:
    admission = Admission(batch=2, staleness=0, steps=9, rounds=2)
    for row in range(2):
        for group in admission.admit(prompts(2 * row, 2)):
            admission.finish(group, informative=False)
    assert admission.dropped == 2
    assert admission.complete and [group.prompt.row for group in admission.take()] == [2, 3]


def test_without_dynamic_sampling_no_group_is_dropped() -> None:
    admission = Admission(batch=1, staleness=0, steps=9)
    admission.finish(admission.admit(prompts(0, 1))[0], informative=False)
    assert admission.dropped == 0 and admission.complete


@given(seed=st.integers(0, 10**6), batch=st.integers(1, 5), staleness=st.integers(0, 3), rounds=st.integers(1, 3))
def test_no_prompt_is_lost_or_repeated_or_trained_too_late(seed: int, batch: int, staleness: int, rounds: int) -> None:
    """Groups finish in any order, some teach nothing, and the driver dies at any point and resumes from any saved step.
    """
    chance = random.Random(seed)
    admission, drawn, trained, dropped = Admission(batch, staleness, 8, rounds=rounds), 0, [], []
    saved = (0, 0, list[str](), list[str](), list[str]())
    while admission.version < 8:
        in_flight = [group for group in admission._under_way if group not in admission._ready]
        action = chance.random()
        if action < 0.04:  # killed: what happened since the checkpoint is forgotten, what it holds is not
            step, drawn, pending, trained, dropped = saved[0], saved[1], saved[2], list(saved[3]), list(saved[4])
            admission = Admission(batch, staleness, 8, rounds=rounds, step=step)
            admission.admit([a_prompt(int(uid.split(":")[1])) for uid in pending])
        elif action < 0.3 and admission.room > 0:
            count = chance.randint(1, admission.room)
            admission.admit(prompts(drawn, count))
            drawn += count
        elif action < 0.8 and in_flight:
            group = chance.choice(in_flight)
            before = admission.dropped
            admission.finish(group, informative=chance.random() < 0.6)
            dropped += [group.prompt.uid] * (admission.dropped - before)
        elif admission.complete:
            taken = admission.take()
            assert len(taken) == batch
            assert all(admission.version - group.born <= staleness for group in taken)
            trained += [group.prompt.uid for group in taken]
            admission.advance(admission.version + 1)
            saved = (admission.version, drawn, admission.pending(), list(trained), list(dropped))
        assert len(admission._under_way) <= (admission.version + staleness + 1) * batch - admission.consumed
        everyone = Counter([*trained, *dropped, *admission.pending()])
        assert everyone == Counter(f"0:{row}" for row in range(drawn))


@given(
    left=st.integers(0, 40), batch=st.integers(1, 9), staleness=st.integers(0, 3), step=st.integers(0, 6),
    steps=st.integers(1, 9),
)
def test_a_run_resumed_with_other_numbers_first_trains_what_was_left(
    left: int, batch: int, staleness: int, step: int, steps: int,
) -> None:
    """Groups that were under way with another batch and staleness, more or fewer than a step takes now; also with fewer
    steps than are done.
    """
    pending, trained, drawn = list(range(left)), list[int](), left
    admission = Admission(batch, staleness, steps, step=step)
    for number in range(step + 1, steps + 1):
        while (room := admission.room) > 0:
            first, pending = pending[:room], pending[room:]
            fresh = prompts(drawn, room - len(first))
            drawn += len(fresh)
            finished(admission, admission.admit([*(a_prompt(row) for row in first), *fresh]))
        assert admission.complete
        trained += [group.prompt.row for group in admission.take()]
        admission.advance(number)
    assert trained == list(range(max(0, steps - step) * batch))
    assert admission.room <= 0
