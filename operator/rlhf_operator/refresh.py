"""Lists into the store. Every kind once before the first pass, one that a watch may have lost something of soon
after, each of them now and then, and a kind that is not installed until it is."""

import asyncio
import logging
import random
import time
from collections.abc import Callable

from rlhf_operator.client import Api, ApiError, KindMissing
from rlhf_operator.kinds import RAYCLUSTERS, Kind
from rlhf_operator.store import LISTED, SELECTORS, Store

log = logging.getLogger(__name__)
REFRESH_SECONDS = 600.0
ABSENT_SECONDS = 15.0
# kopf's own list comes object by object; ours waits until it is over.
SUSPECT_SECONDS = 3.0
RETRY_SECONDS = 2.0
TICK_SECONDS = 1.0


async def refresh(api: Api, store: Store, kind: Kind, namespace: str | None) -> None:
    """One list, page by page. Raises ApiError; one that fails half-way has put what it read and removed nothing."""
    uids: set[str] = set()
    version, more = 0, ""
    while True:
        page = await api.list(kind, namespace, labels=SELECTORS.get(kind, ""), more=more)
        version, more = version or page.version, page.more
        uids.update(raw["metadata"]["uid"] for raw in page.items)
        for raw in page.items:
            store.put(kind, raw)
        if not more:
            break
    store.listed(kind, uids, version)


class Refresher:
    """`came` is told of a kind that was installed meanwhile. `listed` is set once every kind was listed."""

    def __init__(
        self,
        api: Api,
        store: Store,
        namespace: str | None,
        came: Callable[[Kind], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.api, self.store, self.namespace, self.came, self.clock = api, store, namespace, came, clock
        self.listed = asyncio.Event()
        self._missed: set[Kind] = set()
        self._due = dict.fromkeys(LISTED, 0.0)

    def suspect(self, kind: Kind) -> None:
        """Called from kopf's thread, object by object."""
        if kind in self._due:
            self._due[kind] = min(self._due[kind], self.clock() + SUSPECT_SECONDS)

    def suspect_all(self) -> None:
        for kind in LISTED:
            self.suspect(kind)

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.round()
            await asyncio.sleep(TICK_SECONDS)

    async def round(self) -> None:
        """Lists what is due."""
        for kind in LISTED:
            if self.clock() >= self._due[kind]:
                await self._one(kind)

    async def _one(self, kind: Kind) -> None:
        known, before = self.store.listed_once(kind), self.store.installed(kind)
        self._due[kind] = float("inf")
        try:
            if self._asked_for(kind, known):
                await refresh(self.api, self.store, kind, self.namespace)
                self._missed.discard(kind)
            pause = random.uniform(0.8, 1.2) * (REFRESH_SECONDS if self.store.installed(kind) else ABSENT_SECONDS)
        except KindMissing:
            pause = self._missing(kind)
        except ApiError as error:
            log.warning("the list of %s failed: %s", kind.plural, error)
            least = ABSENT_SECONDS if error.status == 403 else RETRY_SECONDS  # a right is given by hand
            pause = max(least, error.retry_after or 0.0)
        self._due[kind] = min(self._due[kind], self.clock() + pause)
        if self.store.ready:
            self.listed.set()
        if known and not before and self.store.installed(kind):
            log.info("%s %s is installed now", kind.api_version, kind.kind)
            self.came(kind)

    def _missing(self, kind: Kind) -> float:
        """Seconds until the next look. Of a kind that was there one such answer may come of an API server that only
        starts: what it holds is thrown away after the second."""
        if self.store.installed(kind) and kind not in self._missed:
            self._missed.add(kind)
            return RETRY_SECONDS
        self._missed.discard(kind)
        self.store.missing(kind)
        return ABSENT_SECONDS

    def _asked_for(self, kind: Kind, known: bool) -> bool:
        """Where Kueue is not installed and no job names a queue, nobody needs to know when it comes."""
        return not known or self.store.installed(kind) or kind is RAYCLUSTERS or self.store.wants_queue()
