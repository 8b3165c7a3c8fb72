"""A driver knows when the head that it was connected to is another one."""

import queue
import threading
from pathlib import Path

import pytest

from rlhf_worker.pod import head


def begin(folder: Path, name: str) -> Path:
    """As `ray start --head` does: a directory, and the link to the newest."""
    session = folder / name
    session.mkdir()
    latest = folder / head.LATEST
    latest.unlink(missing_ok=True)
    latest.symlink_to(session)
    return session


def test_a_head_that_stays_or_is_just_starting_is_no_news(tmp_path: Path) -> None:
    session = begin(tmp_path, "session_1")
    assert head.gone(session) is None
    (tmp_path / head.LATEST).unlink()
    assert head.gone(session) is None, "the link is away for a moment while a head starts"


def test_another_head_is_told_once_with_both_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.01)
    told: queue.Queue[str] = queue.Queue()
    head.watch(begin(tmp_path, "session_1"), told.put)
    begin(tmp_path, "session_2")
    assert "session_2 took the place of session_1" in told.get(timeout=10)
    for thread in threading.enumerate():
        if thread.name == "head":
            thread.join(10)
    assert told.empty()


def test_a_watch_that_was_ended_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.01)
    told: list[str] = []
    head.watch(begin(tmp_path, "session_1"), told.append).set()
    begin(tmp_path, "session_2")
    assert head.gone(tmp_path / "session_1") is not None
    for thread in threading.enumerate():
        if thread.name == "head":
            thread.join(10)
    assert told == []
