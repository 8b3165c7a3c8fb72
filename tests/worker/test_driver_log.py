"""The driver's output on the checkpoint path: whole, in order, bounded, and never in the run's way."""

from pathlib import Path

import pytest

from rlhf_worker.feed import logs
from rlhf_worker.feed.feed import Feed
from rlhf_worker.feed.logs import DriverLog
from rlhf_worker.storage import Store
from tests.worker.buckets import Bucket
from tests.worker.configs import run_config


@pytest.fixture(params=["directory", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    Bucket.empty()
    return {"directory": str(tmp_path / "run"), "bucket": "bucket://models/run"}[request.param]


def kept(root: str, attempt: int) -> str:
    store, folder = Store(root), f"logs/attempt-{attempt}"
    return b"".join(store.read(f"{folder}/{name}") for name in store.names(folder)).decode()


def test_chunks_become_one_log_also_over_a_restart_of_the_driver(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 20)
    for life in range(2):
        feed = Feed(run_config(checkpoint={"path": root}))
        for number in range(10):
            feed.keep_log(3, f"life {life} line {number}\n")
    assert kept(root, 3) == "".join(f"life {life} line {number}\n" for life in range(2) for number in range(10))


def test_the_first_part_and_the_newest_stay(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 1)
    monkeypatch.setattr(logs, "PARTS", 4)
    log = DriverLog(root, 1)
    for letter in "abcdefgh":
        log.add(letter)
    assert kept(root, 1) == "afgh"


def test_the_newest_attempts_stay(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ATTEMPTS", 2)
    for attempt in (8, 9, 10, 11):
        DriverLog(root, attempt).add("x")
    assert Store(root).names("logs") == ["attempt-10", "attempt-11", "attempt-9"]


def test_a_storage_that_fails_costs_one_warning_and_what_waits_is_written_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    Bucket.empty()
    monkeypatch.setattr(Bucket, "broken", True)
    log = DriverLog("bucket://models/run", 1)
    for letter in "abc":
        log.add(letter)
    assert capsys.readouterr().err.count("the driver's log is not kept in bucket://models/run/logs/attempt-1: "
        "OSError: connection reset") == 1
    monkeypatch.setattr(Bucket, "broken", False)
    log.add("d")
    assert kept("bucket://models/run", 1) == "abcd"


def test_what_waits_for_storage_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    Bucket.empty()
    monkeypatch.setattr(logs, "ROOM_BYTES", 6)
    log = DriverLog("bucket://models/run", 1)
    monkeypatch.setattr(Bucket, "broken", True)
    for letter in "abcdefg":
        log.add(letter)
    monkeypatch.setattr(Bucket, "broken", False)
    log.add("h")
    assert kept("bucket://models/run", 1) == "cdefgh"
