"""Objects of one kind, looked up by uid, by name and by group. A part of `store.py`, which has the lock."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Generic, TypeVar

Key = tuple[str, str]
T = TypeVar("T")


class Rank(IntEnum):
    """What there is of a job, and so whom it lets pass. What happens to one that has pods is not to wait until a
    thousand new ones have theirs; and many new ones get their RayClusters before their statuses tell of them."""

    TOLD = 0  # its status tells of a RayCluster
    UNTOLD = 1  # it has one, of which its status does not know
    NEW = 2


@dataclass(frozen=True, slots=True)
class Held(Generic[T]):
    """One object. `group` is what it is looked up by, for most kinds the job's key."""

    uid: str
    version: int
    name: Key
    group: Key
    owner: str
    facts: T


class Shelf(Generic[T]):
    """The objects of one kind by uid, by name and by group."""

    def __init__(self) -> None:
        self.by_uid: dict[str, Held[T]] = {}
        self._by_name: dict[Key, str] = {}
        self._by_group: dict[Key, dict[str, Held[T]]] = {}

    def put(self, held: Held[T]) -> Held[T] | None:
        """The namesake that has to have gone before, if its end was never told."""
        there = self.by_uid.get(self._by_name.get(held.name, ""))
        before = self.drop(there.uid) if there is not None and there.uid != held.uid else None
        if (mine := self.by_uid.get(held.uid)) is not None and mine.group != held.group:
            self.drop(held.uid)
        self.by_uid[held.uid] = held
        self._by_name[held.name] = held.uid
        self._by_group.setdefault(held.group, {})[held.uid] = held
        return before

    def drop(self, uid: str) -> Held[T] | None:
        held = self.by_uid.pop(uid, None)
        if held is None:
            return None
        if self._by_name.get(held.name) == uid:
            del self._by_name[held.name]
        group = self._by_group[held.group]
        del group[uid]
        if not group:
            del self._by_group[held.group]
        return held

    def named(self, name: Key) -> Held[T] | None:
        return self.by_uid.get(self._by_name.get(name, ""))

    def newer(self, uid: str, name: Key, version: int) -> bool:
        """Whether something at least as new is held of that object, or something newer of that name."""
        mine, namesake = self.by_uid.get(uid), self.named(name)
        return (mine is not None and mine.version >= version) or (
            namesake is not None and namesake.uid != uid and namesake.version > version
        )

    def of(self, group: Key) -> list[Held[T]]:
        return sorted(self._by_group.get(group, {}).values(), key=lambda held: held.name)

    def clear(self) -> None:
        for shelf in (self.by_uid, self._by_name, self._by_group):
            shelf.clear()

    def __len__(self) -> int:
        return len(self.by_uid)
