"""The connection between trainer rank 0 and the other ranks of a sync, over real sockets in threads."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from rlhf_worker.errors import DeadlineExceeded, LinkBroken
from rlhf_worker.weights.control import Hub, Meeting, Member

DEADLINE = 10.0


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub("127.0.0.1")
    yield made
    made.close()


def joined(hub: Hub, count: int) -> list[Member]:
    """Members 1 .. count, all admitted."""
    with ThreadPoolExecutor(count) as pool:
        coming = [pool.submit(Member, hub.meeting, number, DEADLINE) for number in range(1, count + 1)]
        hub.accept(count, DEADLINE, lambda: False)
        return [future.result() for future in coming]


def serving(member: Member, act: Callable[[Any], BaseException | None]) -> Future[None]:
    """Takes one order in a thread and answers what act returns."""
    pool = ThreadPoolExecutor(1)
    return pool.submit(lambda: member.answer(act(member.next())))


def test_every_member_gets_the_order_and_the_sync_ends_with_the_last_answer(hub: Hub) -> None:
    heard: list[Any] = []
    served = [serving(member, heard.append) for member in joined(hub, 3)]
    hub.order({"proof": True}, range(1, 4))
    hub.finish(DEADLINE)
    assert heard == [{"proof": True}] * 3 and not any(future.exception() for future in served)


def test_only_those_that_are_asked_must_answer(hub: Hub) -> None:
    """Trainer ranks listen only for the end."""
    members = joined(hub, 2)
    served = serving(members[1], lambda _: None)
    hub.order("order", range(2, 3))
    hub.finish(DEADLINE)
    assert served.exception() is None and not members[0].hung_up()


def local_error() -> Exception:
    class Local(Exception):
        """Cannot be pickled: it lives in a function."""

    return Local("deep inside")


@pytest.mark.parametrize(
    ("failure", "kind", "words"),
    [
        (ValueError("layer 3 is missing"), ValueError, "layer 3 is missing"),
        (local_error(), RuntimeError, "Local: deep inside")
    ]
)
def test_what_a_member_raises_is_raised_here_or_its_words_where_it_cannot_travel(
    hub: Hub, failure: Exception, kind: type[Exception], words: str,
) -> None:
    served = serving(joined(hub, 1)[0], lambda _: failure)
    hub.order("order", range(1, 2))
    with pytest.raises(kind, match=words):
        hub.finish(DEADLINE)
    assert served.exception() is None


def test_a_member_that_goes_is_noticed_at_once(hub: Hub) -> None:
    members = joined(hub, 2)
    hub.order("order", range(1, 3))
    members[1].close()
    with pytest.raises(LinkBroken, match="rank 2 of the group is gone"):
        hub.finish(DEADLINE)
    assert hub.failed()


def test_a_silent_member_is_named_at_the_deadline(hub: Hub) -> None:
    members = joined(hub, 2)
    hub.order("order", range(1, len(members) + 1))
    with pytest.raises(DeadlineExceeded, match=r"ranks \[1, 2\] did not answer within 0.2 s"):
        hub.finish(0.2)


def test_members_notice_that_the_hub_closes(hub: Hub) -> None:
    member = joined(hub, 1)[0]
    waiting = ThreadPoolExecutor(1).submit(member.next)
    hub.close()
    assert waiting.result(DEADLINE) is None and member.hung_up()


def test_a_member_closes_itself_while_it_waits(hub: Hub) -> None:
    member = joined(hub, 1)[0]
    waiting = ThreadPoolExecutor(1).submit(member.next)
    member.close()
    assert waiting.result(DEADLINE) is None


def test_a_stranger_is_turned_away(hub: Hub) -> None:
    """Neither a wrong token nor a connection that says nothing counts, or keeps the others out."""
    silent = socket.create_connection((hub.meeting.host, hub.meeting.port))
    stranger = threading.Thread(
        target=Member, args=(Meeting(hub.meeting.host, hub.meeting.port, b"x" * 32), 1, DEADLINE),
    )
    stranger.start()
    joined(hub, 1)
    stranger.join()
    silent.close()


def test_who_does_not_come_ends_the_wait(hub: Hub) -> None:
    with pytest.raises(DeadlineExceeded, match=r"0 of 1 ranks joined within 0\.3 s"):
        hub.accept(1, 0.3, lambda: False)
    hub.accept(1, DEADLINE, lambda: True)  # somebody failed on the way, which the caller finds out
    with pytest.raises(DeadlineExceeded, match="rank 1 cannot reach the trainer"):
        Member(Meeting("127.0.0.1", 1, b""), 1, DEADLINE)
