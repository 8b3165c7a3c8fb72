"""The ledger of engines: every state with every event, and stories of several."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_worker.engines.ledger import EngineRecord, Event, Health, Limits, Outlook, after, amiss, can_restart, outlook

LIMITS = Limits(least=1, misses=3, restarts=2, forgiven_after=4)
H, E = Health, Event

# One row a state, in the order of the events: what a first event of that kind makes of it.
TABLE = {
    H.STALE: [H.STALE, H.STALE, H.DEAD, H.STALE, H.STALE, H.HEALTHY],
    H.HEALTHY: [H.HEALTHY, H.SUSPECT, H.DEAD, H.HEALTHY, H.HEALTHY, H.HEALTHY],
    H.SUSPECT: [H.HEALTHY, H.SUSPECT, H.DEAD, H.SUSPECT, H.SUSPECT, H.HEALTHY],
    H.DEAD: [H.DEAD, H.DEAD, H.DEAD, H.RESTARTING, H.DEAD, H.DEAD],
    H.RESTARTING: [H.RESTARTING, H.RESTARTING, H.DEAD, H.RESTARTING, H.STALE, H.RESTARTING],
}
ROWS = [
    (state, event, ends[i])
    for state, ends in TABLE.items()
    for i, event in enumerate((E.ANSWERED, E.MISSED, E.LOST, E.RESTARTED, E.STARTED, E.SYNCED))
]


@pytest.mark.parametrize(("state", "event", "end"), ROWS)
def test_every_state_with_every_event(state: Health, event: Event, end: Health) -> None:
    assert after(EngineRecord(state), event, LIMITS).health is end


def run(*events: Event, engine: EngineRecord | None = None) -> EngineRecord:
    engine = engine or EngineRecord()
    for event in events:
        engine = after(engine, event, LIMITS)
    return engine


def test_three_misses_in_a_row_are_death_and_an_answer_between_them_is_not() -> None:
    assert run(E.SYNCED, E.MISSED, E.MISSED).health is H.SUSPECT
    assert run(E.SYNCED, E.MISSED, E.MISSED, E.MISSED).health is H.DEAD
    assert run(E.SYNCED, E.MISSED, E.MISSED, E.ANSWERED, E.MISSED, E.MISSED).health is H.SUSPECT


def test_an_engine_that_came_back_serves_only_after_a_whole_sync() -> None:
    back = run(E.SYNCED, E.LOST, E.RESTARTED, E.STARTED, E.ANSWERED)
    assert back.health is H.STALE
    assert run(E.SYNCED, engine=back).health is H.HEALTHY


def test_restarts_are_counted_until_syncs_have_gone_well() -> None:
    again = (E.LOST, E.RESTARTED, E.STARTED)
    worn = run(*again, *again, E.LOST)
    assert not can_restart(worn, LIMITS) and run(E.RESTARTED, engine=worn) == worn
    forgiven = run(*again, *again, *[E.SYNCED] * 4, E.LOST)
    assert can_restart(forgiven, LIMITS)


@pytest.mark.parametrize(
    ("engines", "least", "expected"),
    [
        ([EngineRecord(H.HEALTHY), EngineRecord(H.DEAD)], 1, Outlook.GO),
        ([EngineRecord(H.SUSPECT)], 1, Outlook.GO),
        ([EngineRecord(H.HEALTHY), EngineRecord(H.DEAD)], 2, Outlook.WAIT),
        ([EngineRecord(H.STALE)], 1, Outlook.WAIT),
        ([EngineRecord(H.RESTARTING)], 1, Outlook.WAIT),
        ([EngineRecord(H.DEAD, restarts=2)], 1, Outlook.STOP),
        ([EngineRecord(H.HEALTHY), EngineRecord(H.DEAD, restarts=2)], 2, Outlook.STOP),
    ],
)
def test_whether_to_go_on(engines: list[EngineRecord], least: int, expected: Outlook) -> None:
    assert outlook(engines, Limits(least=least, restarts=2)) is expected


def test_what_is_amiss_in_words() -> None:
    assert amiss([EngineRecord(H.HEALTHY), EngineRecord()]) is None
    assert amiss(
        [EngineRecord(H.HEALTHY), EngineRecord(H.DEAD), EngineRecord(H.STALE, restarts=1)]
    ) == "engine 1 is dead, engine 2 is stale"


@given(st.lists(st.sampled_from(list(Event)), max_size=60))
def test_no_story_serves_without_a_sync_or_restarts_past_the_budget(events: list[Event]) -> None:
    engine, synced = EngineRecord(), False
    for event in events:
        before, engine = engine, after(engine, event, LIMITS)
        synced = (
            synced and engine.health not in (H.DEAD, H.RESTARTING)
        ) or (event is E.SYNCED and engine.health is H.HEALTHY)
        assert synced or engine.health not in (H.HEALTHY, H.SUSPECT)
        assert engine.restarts <= LIMITS.restarts
        assert engine.restarts <= before.restarts + (event is E.RESTARTED)
