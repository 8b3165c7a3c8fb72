"""What a process costs, from /proc, and which calls an operator made, from the API server's audit log."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from hack.cluster.components import Identity

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU since the process began, and resident memory now and at most."""

    cpu_seconds: float
    rss_mib: float
    peak_mib: float


def usage(pid: int) -> Usage:
    """Raises FileNotFoundError for a process that is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    status = {name: value.split() for name, _, value in lines}
    cpu = (int(fields[11]) + int(fields[12])) / TICKS
    return Usage(cpu, int(status["VmRSS"][0]) / 1024, int(status["VmHWM"][0]) / 1024)


@dataclass
class Calls:
    """Reads the audit log from where the last reading ended."""

    log: Path
    offset: int = 0

    def since_last(self, who: Identity) -> Counter[str]:
        """Requests by `verb resource`, those about the lease left out."""
        if not self.log.exists():
            return Counter()
        with self.log.open("rb") as file:
            file.seek(self.offset)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self.offset += len(whole)
        events = map(json.loads, whole.splitlines())
        named = (_named(event) for event in events if event["user"]["username"] == who.user)
        return Counter(name for name in named if not name.endswith(" leases"))


def _named(event: dict[str, dict[str, str]]) -> str:
    about = event.get("objectRef") or {}
    resource = about.get("resource") or "discovery"
    return f"{event['verb']} {resource}{'/' + about['subresource'] if about.get('subresource') else ''}"


def news(calls: Counter[str]) -> int:
    """Calls that are no renewal of a watch."""
    return sum(count for name, count in calls.items() if not name.startswith("watch "))


def machine() -> str:
    """What a table says of where it was measured. Load: others work there, too."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"{platform.machine()}, {os.cpu_count()} cores (load {load}), Python {platform.python_version()}"
