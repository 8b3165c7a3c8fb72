"""``python -m hack.cluster up | down | status``; which cluster is chosen by CLUSTER=embedded | kind | current."""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol

from hack.cluster import current, embedded, kind
from hack.cluster import settings as s
from hack.cluster.steps import ClusterError, fail, say


class Cluster(Protocol):
    def up(self, cfg: s.Settings) -> None: ...
    def down(self, cfg: s.Settings) -> None: ...
    def status(self, cfg: s.Settings) -> bool: ...


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in ("up", "down", "status"):
        print(__doc__, file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        return _run(arguments[0], start)
    except ClusterError as error:
        return fail(error)


def _run(action: str, start: float) -> int:
    cfg, cluster = s.from_environment(), _cluster(os.environ.get("CLUSTER", "embedded"))
    if action == "status":
        return 0 if cluster.status(cfg) else 1
    cluster.up(cfg) if action == "up" else cluster.down(cfg)
    say(f"{action}: {time.monotonic() - start:.1f} s in all")
    return 0


def _cluster(name: str) -> Cluster:
    match name:
        case "embedded":
            return embedded
        case "kind":
            return kind
        case "current":
            return current
    raise ClusterError(f"CLUSTER={name} is not known", "use embedded, kind or current")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
