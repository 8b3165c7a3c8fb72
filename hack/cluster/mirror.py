"""A collection of the API server's objects, kept up to date by a watch, for the cluster's own small controllers."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from hack.cluster.kube import Api, ApiError, Object

Key = tuple[str, str]  # namespace ("" for what has none) and name
_RETRY = 1.0  # seconds
_SETTLE = 0.2  # seconds that further changes are waited for, so that a burst is one change


@dataclass
class Changes:
    """Set when a mirror changes; one for all mirrors of a process."""

    _event: threading.Event = field(default_factory=threading.Event)

    def note(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> None:
        """Until something changed, or `seconds` are over."""
        if self._event.wait(seconds):
            time.sleep(_SETTLE)
        self._event.clear()


class Mirror:
    """The objects at `path`, newest first hand. Empty until the first list; `complete` says that it was made."""

    def __init__(self, api: Api, path: str, changes: Changes) -> None:
        self.complete = False
        self._api, self._path, self._changes = api, path, changes
        self._objects: dict[Key, Object] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._follow, name=path, daemon=True).start()

    def all(self) -> list[Object]:
        with self._lock:
            return list(self._objects.values())

    def _follow(self) -> None:
        while True:
            try:
                version = self._list()
                while True:
                    for event in self._api.watch(self._path, version):
                        version = event["object"]["metadata"]["resourceVersion"]
                        self._heed(event)
            except ApiError as error:
                print(f"{self._path}: listing again: {error}", flush=True)
                time.sleep(_RETRY)

    def _list(self) -> str:
        listed = self._api.get(self._path)
        with self._lock:
            self._objects = {_key(item): item for item in listed["items"]}
        self.complete = True
        self._changes.note()
        return str(listed["metadata"]["resourceVersion"])

    def _heed(self, event: Object) -> None:
        if event["type"] == "BOOKMARK":
            return
        with self._lock:
            if event["type"] == "DELETED":
                self._objects.pop(_key(event["object"]), None)
            else:
                self._objects[_key(event["object"])] = event["object"]
        self._changes.note()


def _key(item: Object) -> Key:
    return item["metadata"].get("namespace", ""), item["metadata"]["name"]
