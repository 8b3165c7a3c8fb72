"""An API server in memory: just what the operator uses of one, a watch that fills its store, and a switch that kills
the caller between two writes."""

import pickle
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rlhf_operator.client import ApiError, KindMissing, Page
from rlhf_operator.clock import stamp
from rlhf_operator.kinds import NAMESPACED, PODS, Kind
from rlhf_operator.observed import owner_uid
from rlhf_operator.presets import NO_PRESETS
from rlhf_operator.shelf import Key
from rlhf_operator.store import LISTED, SELECTORS, Store, version_of

Raw = dict[str, Any]
Id = tuple[str, str, str]
OF_PLURAL = {kind.plural: kind for kind in NAMESPACED}


class Killed(BaseException):
    """The operator's process ends here. Not an Exception: nothing may catch it."""


@dataclass(frozen=True)
class WatchEvent:
    """ADDED, MODIFIED or DELETED, and the object as it was then."""

    type: str
    kind: Kind
    raw: Raw


class MemoryApi:
    """`writes` tells what was changed, in order. `kill_at` n: the caller dies right after its n-th write, counted from
    0.

    `store` is the operator's, filled by a watch. Objects may be changed in place: whoever asks for the store, and
    every call, first finds out what changed and gives it a resourceVersion. While `live`, the store is told of it at
    once; else the events wait in `pending`, which a test may deliver, drop, repeat and reorder. `woken` are the jobs
    that the store has woken. The garbage collector is as quick as anything while it `collects`; else what it is to
    take waits for `collect`."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.objects: dict[Id, Raw] = {}
        self.absent: set[str] = {"localqueues", "workloads"}
        self.refuse: dict[str, ApiError] = {}
        self.refuse_lists: ApiError | None = None
        self.writes: list[str] = []
        self.used: set[tuple[str, Kind]] = set()
        self.calls: list[str] = []
        self.kill_at: int | None = None
        self.dead = False
        self.live = True
        self.collects = True
        self._ownerless: list[str] = []  # uids that went, whose objects have not been collected
        self.pending: list[WatchEvent] = []
        self.woken: list[Key] = []
        self.version = 0
        self.presets = NO_PRESETS  # of the next operator that starts
        self._store = Store(self.woken.append)
        self._told: dict[Id, tuple[str, bytes]] = {}
        self._made: Counter[tuple[str, str]] = Counter()

    @property
    def store(self) -> Store:
        self.commit()
        if self.live:
            self.deliver()
        return self._store

    def commit(self) -> None:
        """Versions and watch events for what changed since the last time."""
        for place, (uid, frozen) in list(self._told.items()):
            if self.objects.get(place, {}).get("metadata", {}).get("uid") != uid:
                del self._told[place]
                gone = pickle.loads(frozen)
                gone["metadata"]["resourceVersion"] = self._next()
                self.pending.append(WatchEvent("DELETED", OF_PLURAL[place[0]], gone))
        for place, raw in self.objects.items():
            before = self._told.get(place)
            if before is None or before[1] != pickle.dumps(raw):
                raw["metadata"]["resourceVersion"] = self._next()
                self._told[place] = (raw["metadata"]["uid"], pickle.dumps(raw))
                self.pending.append(WatchEvent("MODIFIED" if before else "ADDED", OF_PLURAL[place[0]], _copy(raw)))
        self._install()

    def deliver(self, number: int | None = None) -> None:
        """The oldest events to the store; all of them for None."""
        for event in self.pending[:number]:
            self.tell(event)
        del self.pending[:number]

    def tell(self, event: WatchEvent) -> None:
        labels = event.raw["metadata"].get("labels") or {}
        if event.type == "DELETED":
            self._store.drop(event.kind, event.raw["metadata"]["uid"], version_of(event.raw["metadata"]))
        elif SELECTORS.get(event.kind, "") in ("", *labels):
            self._store.put(event.kind, _copy(event.raw))

    def relist(self) -> None:
        """As the operator does now and then: what a watch lost is found."""
        self.commit()
        for kind in LISTED:
            if kind.plural not in self.absent:
                found = [raw for (plural, _, _), raw in self.objects.items() if plural == kind.plural]
                for raw in found:
                    self.tell(WatchEvent("MODIFIED", kind, raw))
                self._store.listed(kind, {raw["metadata"]["uid"] for raw in found}, self.version)

    def restart(self) -> None:
        """The operator starts anew: it knows nothing but what it lists."""
        self._store = Store(self.woken.append, presets=self.presets)
        self.pending.clear()
        self.relist()

    def _install(self) -> None:
        for kind in LISTED:
            if kind.plural in self.absent:
                if self._store.installed(kind) or not self._store.listed_once(kind):
                    self._store.missing(kind)
            elif not self._store.installed(kind):
                self._store.listed(kind, set(), 0)

    def _next(self) -> str:
        self.version += 1
        return str(self.version)

    def of(self, kind: Kind, namespace: str = "default") -> list[Raw]:
        return [raw for (plural, ns, _), raw in self.objects.items() if plural == kind.plural and ns == namespace]

    def put(self, kind: Kind, raw: Raw) -> Raw:
        """As somebody else than the operator would create it."""
        meta = raw["metadata"]
        self._made[(kind.plural, meta["name"])] += 1
        meta.setdefault("uid", f"{meta['name']}-{kind.plural}-{self._made[(kind.plural, meta['name'])]}")
        meta.setdefault("namespace", "default")
        meta.setdefault("creationTimestamp", stamp(self.now))
        self.objects[(kind.plural, meta["namespace"], meta["name"])] = raw
        return raw

    def remove(self, kind: Kind, name: str, namespace: str = "default") -> None:
        self.objects.pop((kind.plural, namespace, name))

    async def get(self, kind: Kind, namespace: str, name: str) -> Raw | None:
        self._check("get", kind)
        found: Raw | None = _copy(self.objects.get((kind.plural, namespace, name)))
        return found

    async def list(self, kind: Kind, namespace: str | None, *, labels: str = "", more: str = "") -> Page:
        self._check("list", kind)
        if self.refuse_lists:
            raise self.refuse_lists
        everywhere = [(ns, raw) for (plural, ns, _), raw in self.objects.items() if plural == kind.plural]
        served = [raw for ns, raw in everywhere if namespace in (None, ns)]
        found = [raw for raw in served if labels in ("", *(raw["metadata"].get("labels") or {}))]
        return Page([_copy(raw) for raw in found], self.version)

    async def create(self, kind: Kind, namespace: str, body: Raw) -> Raw:
        self._before("create", kind)
        meta = body["metadata"]
        if (kind.plural, namespace, meta["name"]) in self.objects:
            raise ApiError(409, "AlreadyExists", f"{kind.plural} {meta['name']!r} already exists")
        created = self.put(kind, _copy(body))
        self._after(f"create {kind.kind} {meta['name']}")
        answer: Raw = _copy(created)
        return answer

    async def apply(self, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        self._before("patch status" if status else "patch", kind)
        there = self.objects.get((kind.plural, namespace, body["metadata"]["name"]))
        if there is None:
            raise ApiError(404, "NotFound", f"{kind.plural} {body['metadata']['name']!r} not found")
        _precondition(there, body)
        before = _copy(there)
        if status:
            theirs = {key: value for key, value in (there.get("status") or {}).items() if key == "progress"}
            there["status"] = {**_copy(body["status"]), **theirs}
        else:
            there.update({key: _copy(value) for key, value in body.items() if key != "metadata"})
        if there != before:
            self._after(f"apply {kind.kind} {body['metadata']['name']}")
        answer: Raw = _copy(there)
        return answer

    async def merge(self, kind: Kind, namespace: str, name: str, body: Raw) -> Raw:
        self._before("patch", kind)
        there = self.objects.get((kind.plural, namespace, name))
        if there is None:
            raise ApiError(404, "NotFound", f"{kind.plural} {name!r} not found")
        _precondition(there, body)
        there["metadata"]["finalizers"] = list(body["metadata"]["finalizers"])
        if "deletionTimestamp" in there["metadata"] and not there["metadata"]["finalizers"]:
            self.vanish(kind, there)
        self._after(f"patch {kind.kind} {name}")
        answer: Raw = _copy(there)
        return answer

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None
    ) -> Raw | None:
        self._before("delete", kind)
        there = self.objects.get((kind.plural, namespace, name))
        if there is None or there["metadata"]["uid"] != uid:
            return None
        if grace_seconds == 0:
            self.remove(kind, name, namespace)
        else:
            self.vanish(kind, there)
        self._after(f"{'kill' if grace_seconds == 0 else 'delete'} {kind.kind} {name}")
        answer: Raw | None = _copy(self.objects.get((kind.plural, namespace, name)))
        return answer

    def vanish(self, kind: Kind, raw: Raw) -> None:
        """As somebody else deletes it. Pods go when their grace period ends, what has finalizers when they are off;
        everything else goes at once, and what it owns after it."""
        if kind is PODS or raw["metadata"].get("finalizers"):
            raw["metadata"].setdefault("deletionTimestamp", stamp(self.now))
            return
        self.remove(kind, raw["metadata"]["name"], raw["metadata"]["namespace"])
        self._ownerless.append(raw["metadata"]["uid"])
        if self.collects:
            self.collect()

    def collect(self) -> None:
        while self._ownerless:
            uid = self._ownerless.pop()
            for (plural, _, _), one in list(self.objects.items()):
                if owner_uid(one) == uid:
                    self.vanish(OF_PLURAL[plural], one)

    def orphan(self, kind: Kind, raw: Raw) -> None:
        """kubectl delete --cascade=orphan. It goes once nothing names it as its owner any more."""
        for one in self.objects.values():
            if owner_uid(one) == raw["metadata"]["uid"]:
                del one["metadata"]["ownerReferences"]
        self.vanish(kind, raw)

    def _check(self, verb: str, kind: Kind) -> None:
        self.used.add((verb, kind))
        self.calls.append(f"{verb} {kind.kind}")
        if self.dead:
            raise Killed
        self.commit()
        if kind.plural in self.absent:
            raise KindMissing(404, "KindMissing", f"no {kind.kind}")

    def _before(self, verb: str, kind: Kind) -> None:
        self._check(verb, kind)
        if error := self.refuse.get(kind.kind):
            raise error

    def _after(self, text: str) -> None:
        self.commit()
        self.writes.append(text)
        if self.kill_at == len(self.writes) - 1:
            self.dead = True
            raise Killed


def _copy(raw: Any) -> Any:
    """A deep copy, quicker than copy.deepcopy."""
    return pickle.loads(pickle.dumps(raw))


def _precondition(there: Raw, body: Raw) -> None:
    """A write that names a version is about that version."""
    for field in ("uid", "resourceVersion"):
        if body["metadata"].get(field, there["metadata"].get(field)) != there["metadata"].get(field):
            raise ApiError(409, "Conflict", "the object has been modified: apply your changes to the latest version")
