"""Warning Events, as far as they tell what no status tells. A part of `store.py`, which has the lock."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rlhf_operator.observed import Complaint

Raw = dict[str, Any]
STRANGERS_MAX, STRANGER_SECONDS = 500, 120.0
COMPLAINT_SECONDS = 3600.0
COMPLAINT_WORDS = 2048
TELLING = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")


@dataclass(frozen=True, slots=True)
class _Warning:
    complaint: Complaint
    told: str
    seen: float


class Complaints:
    """The newest telling Warning Event about an object, by its uid; about strangers, which may become ours, for a
    short time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ours: dict[str, _Warning] = {}
        self._strangers: OrderedDict[str, _Warning] = OrderedDict()

    def put(self, raw: Raw, ours: Collection[str]) -> str | None:
        """The uid of ours about which it says something new."""
        uid, told = raw.get("involvedObject", {}).get("uid", ""), _told_at(raw)
        self._forget_strangers()
        before = self._ours.get(uid) or self._strangers.get(uid)
        if not uid or not _telling(raw) or (before is not None and before.told > told):
            return None
        complaint = Complaint(uid, raw["reason"], raw.get("message", "")[:COMPLAINT_WORDS])
        mine = uid in ours
        (self._ours if mine else self._strangers)[uid] = _Warning(complaint, told, self._clock())
        return uid if mine and (before is None or before.complaint != complaint) else None

    def adopt(self, uid: str) -> None:
        """A stranger turned out to be ours."""
        if (held := self._strangers.pop(uid, None)) is not None:
            self._ours[uid] = held

    def of(self, uid: str) -> Complaint | None:
        held = self._ours.get(uid)
        return held.complaint if held is not None and self._clock() - held.seen < COMPLAINT_SECONDS else None

    def drop(self, uid: str) -> None:
        self._ours.pop(uid, None)

    def _forget_strangers(self) -> None:
        """One put at a time, so that the oldest is never more than one too many."""
        oldest = next(iter(self._strangers.values()), None)
        while oldest and (len(self._strangers) > STRANGERS_MAX or self._clock() - oldest.seen > STRANGER_SECONDS):
            self._strangers.popitem(last=False)
            oldest = next(iter(self._strangers.values()), None)

    def __len__(self) -> int:
        return len(self._ours) + len(self._strangers)


def _telling(event: Raw) -> bool:
    """A refusal, or a volume that does not come. KubeRay's mere warnings begin with `RayCluster spec warning`."""
    reason, warns = event.get("reason", ""), event.get("type") == "Warning"
    return warns and (reason in TELLING or reason.startswith("InvalidRayCluster")) and not _mere(event)


def _mere(event: Raw) -> bool:
    return str(event.get("message", "")).startswith("RayCluster spec warning")


def _told_at(event: Raw) -> str:
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")
