"""The veth pair between this machine and the cluster's network namespace. No route, rule or bridge besides it."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import subprocess

from hack.cluster.components import Link
from hack.cluster.settings import LINK_PREFIX, LINK_SLOTS
from hack.cluster.steps import ClusterError, output
from hack.cluster.supervisor import LINK

_REMEDY = "see the message of ip; the kernel needs veth devices"


def free_link(name: str) -> Link:
    """The /30 that the cluster's name hashes to, or the next one that no interface of this machine uses."""
    used = _addresses()
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % LINK_SLOTS
    for slot in range(first, first + LINK_SLOTS):
        link = _slot(slot % LINK_SLOTS)
        if link.host not in used:
            return link
    raise ClusterError("every address for a link to a cluster is in use", "remove clusters: make cluster-down in "
        "their clones")


def _slot(slot: int) -> Link:
    base = ipaddress.IPv4Address(LINK_PREFIX) + 4 * slot
    return Link(host=str(base + 1), node=str(base + 2))


def _addresses() -> set[str]:
    interfaces = json.loads(output(["ip", "-json", "-4", "address"], _REMEDY))
    return {address["local"] for interface in interfaces for address in interface["addr_info"]}


def connect(name: str, link: Link, pid: int) -> None:
    """Make the pair and put its other end into the network namespace of ``pid``."""
    output(["ip", "link", "add", name, "type", "veth", "peer", "name", LINK, "netns", str(pid)], _REMEDY)
    output(["ip", "address", "add", f"{link.host}/30", "dev", name], _REMEDY)
    output(["ip", "link", "set", name, "up"], _REMEDY)


def remove(name: str) -> None:
    """Remove the pair; it goes by itself when the namespace ends, so usually there is nothing to do."""
    subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)
