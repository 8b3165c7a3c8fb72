"""An API server in memory: just what the operator uses of one, and a switch that kills the caller between two writes."""

import pickle
from collections import Counter
from datetime import datetime
from typing import Any

from rlhf_operator.client import ApiError, KindMissing
from rlhf_operator.clock import stamp
from rlhf_operator.kinds import NAMESPACED, PODS, Kind
from rlhf_operator.observed import owner_uid

Raw = dict[str, Any]
Id = tuple[str, str, str]
OF_PLURAL = {kind.plural: kind for kind in NAMESPACED}


class Killed(BaseException):
    """The operator's process ends here. Not an Exception: nothing may catch it."""


class MemoryApi:
    """`writes` tells what was changed, in order. `kill_at` n: the caller dies right after its n-th write, counted from 0."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.objects: dict[Id, Raw] = {}
        self.absent: set[str] = {"localqueues", "workloads"}
        self.refuse: dict[str, ApiError] = {}
        self.writes: list[str] = []
        self.used: set[tuple[str, Kind]] = set()
        self.kill_at: int | None = None
        self.dead = False
        self._made: Counter[tuple[str, str]] = Counter()

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

    async def list(self, kind: Kind, namespace: str | None, *, labels: str = "", fields: str = "") -> list[Raw]:
        self._check("list", kind)
        found = [raw for (plural, ns, _), raw in self.objects.items() if plural == kind.plural and namespace in (None, ns)]
        return [_copy(raw) for raw in found if _labelled(raw, labels) and _about(raw, fields)]

    async def create(self, kind: Kind, namespace: str, body: Raw) -> Raw:
        self._before("create", kind)
        meta = body["metadata"]
        if (kind.plural, namespace, meta["name"]) in self.objects:
            raise ApiError(409, "AlreadyExists", f"{kind.plural} {meta['name']!r} already exists")
        created = self.put(kind, _copy(body))
        self._after(f"create {kind.kind} {meta['name']}")
        return created

    async def apply(self, kind: Kind, namespace: str, body: Raw, *, status: bool = False) -> Raw:
        self._before("patch status" if status else "patch", kind)
        there = self.objects.get((kind.plural, namespace, body["metadata"]["name"]))
        if there is None:
            raise ApiError(404, "NotFound", f"{kind.plural} {body['metadata']['name']!r} not found")
        before = _copy(there)
        if status:
            theirs = {key: value for key, value in (there.get("status") or {}).items() if key == "progress"}
            there["status"] = {**_copy(body["status"]), **theirs}
        else:
            there.update({key: _copy(value) for key, value in body.items() if key != "metadata"})
        if there != before:
            self._after(f"apply {kind.kind} {body['metadata']['name']}")
        return there

    async def merge(self, kind: Kind, namespace: str, name: str, body: Raw) -> Raw:
        self._before("patch", kind)
        there = self.objects[(kind.plural, namespace, name)]
        there["metadata"] |= _copy(body["metadata"])
        if "deletionTimestamp" in there["metadata"] and not there["metadata"]["finalizers"]:
            self.vanish(kind, there)
        self._after(f"patch {kind.kind} {name}")
        return there

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str, grace_seconds: int | None = None) -> None:
        self._before("delete", kind)
        there = self.objects.get((kind.plural, namespace, name))
        if there is None or there["metadata"]["uid"] != uid:
            return
        if grace_seconds == 0:
            self.remove(kind, name, namespace)
        else:
            self.vanish(kind, there)
        self._after(f"{'kill' if grace_seconds == 0 else 'delete'} {kind.kind} {name}")

    def vanish(self, kind: Kind, raw: Raw) -> None:
        """As somebody else deletes it. Pods go when their grace period ends; everything else goes at once, and what it owns after it."""
        if kind is PODS or raw["metadata"].get("finalizers"):
            raw["metadata"].setdefault("deletionTimestamp", stamp(self.now))
            return
        self.remove(kind, raw["metadata"]["name"], raw["metadata"]["namespace"])
        for (plural, _, _), one in list(self.objects.items()):
            if owner_uid(one) == raw["metadata"]["uid"]:
                self.vanish(OF_PLURAL[plural], one)

    def _check(self, verb: str, kind: Kind) -> None:
        self.used.add((verb, kind))
        if self.dead:
            raise Killed
        if kind.plural in self.absent:
            raise KindMissing(404, "KindMissing", f"no {kind.kind}")

    def _before(self, verb: str, kind: Kind) -> None:
        self._check(verb, kind)
        if error := self.refuse.get(kind.kind):
            raise error

    def _after(self, text: str) -> None:
        self.writes.append(text)
        if self.kill_at == len(self.writes) - 1:
            self.dead = True
            raise Killed


def _copy(raw: Any) -> Any:
    """A deep copy, quicker than copy.deepcopy."""
    return pickle.loads(pickle.dumps(raw))


def _labelled(raw: Raw, selector: str) -> bool:
    key, _, value = selector.partition("=")
    return not selector or raw["metadata"].get("labels", {}).get(key) == value


def _about(raw: Raw, selector: str) -> bool:
    return not selector or raw.get("involvedObject", {}).get("uid") == selector.partition("=")[2]
