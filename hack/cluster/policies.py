"""NetworkPolicies of the embedded cluster, as nftables rules on what is routed between its pods.

Run as ``python -m hack.cluster.policies <kubeconfig>``. It enforces ingress: pod, namespace and address peers, and
numbered ports. What it does not: egress, named ports and SCTP (a rule with such a port admits nothing), and pods on the
node's own network. What comes from the node itself (the kubelet's probes, the API server) is admitted, as everywhere.
A pod without an address yet is a stranger: a new pod's first connection waits until the kubelet has told its address.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hack.cluster.kube import Api, Object
from hack.cluster.mirror import Changes, Mirror

TABLE = "inet rlhf-policies"
_RESYNC = 300.0
_PROTOCOLS = {"TCP": "tcp", "UDP": "udp"}


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """A LabelSelector; an empty one selects everything."""
    named = all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())
    return named and all(_holds(term, labels) for term in selector.get("matchExpressions") or [])


def _holds(term: Object, labels: dict[str, str]) -> bool:
    value, values = labels.get(term["key"]), term.get("values") or []
    match term["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None


def ruleset(policies: list[Object], pods: list[Object], namespaces: list[Object]) -> str:
    """The whole table, in nft's language; loading it replaces the one before in one step."""
    placed = [pod for pod in pods if _address(pod)]
    rules: dict[str, list[str]] = {}
    for policy in policies:
        if "Ingress" in (policy["spec"].get("policyTypes") or ["Ingress"]):
            for pod in placed:
                if _selected(policy, pod):
                    rules.setdefault(_address(pod), []).extend(_admissions(policy, _address(pod), placed, namespaces))
    lines = [line for address, admitted in sorted(rules.items()) for line in (*admitted, f"ip daddr {address} drop")]
    body = "\n".join(f"    {line}" for line in ["ct state established,related accept", *lines])
    chain = f"  chain forward {{\n    type filter hook forward priority 0; policy accept;\n{body}\n  }}"
    return f"table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n{chain}\n}}\n"


def _address(pod: Object) -> str:
    """Empty for a pod that has none of its own, or no more."""
    status = pod.get("status", {})
    gone = status.get("phase") in ("Succeeded", "Failed") or pod["spec"].get("hostNetwork")
    return "" if gone else str(status.get("podIP") or "")


def _labels(item: Object) -> dict[str, str]:
    return item["metadata"].get("labels") or {}


def _selected(policy: Object, pod: Object) -> bool:
    same = policy["metadata"]["namespace"] == pod["metadata"]["namespace"]
    return same and matches(policy["spec"].get("podSelector") or {}, _labels(pod))


def _admissions(policy: Object, address: str, pods: list[Object], namespaces: list[Object]) -> Iterator[str]:
    for rule in policy["spec"].get("ingress") or []:
        sources = _sources(policy, rule, pods, namespaces)
        for source in sources:
            for port in _ports(rule):
                yield " ".join(part for part in (f"ip daddr {address}", source, port, "accept") if part)


def _sources(policy: Object, rule: Object, pods: list[Object], namespaces: list[Object]) -> list[str]:
    """Matches of where a rule's packets may come from: [""] is anywhere, [] is nowhere."""
    if not rule.get("from"):
        return [""]
    known = {namespace["metadata"]["name"]: _labels(namespace) for namespace in namespaces}
    found = [_block(peer["ipBlock"]) for peer in rule["from"] if "ipBlock" in peer]
    selectors = [peer for peer in rule["from"] if "ipBlock" not in peer]
    addresses = {_address(pod) for pod in pods if any(_is_peer(policy, peer, pod, known) for peer in selectors)}
    return found + ([f"ip saddr {{ {', '.join(sorted(addresses))} }}"] if addresses else [])


def _is_peer(policy: Object, peer: Object, pod: Object, namespaces: dict[str, dict[str, str]]) -> bool:
    namespace = pod["metadata"]["namespace"]
    if peer.get("namespaceSelector") is not None:
        inside = matches(peer["namespaceSelector"], namespaces.get(namespace, {}))
    else:
        inside = namespace == policy["metadata"]["namespace"]
    return inside and matches(peer.get("podSelector") or {}, _labels(pod))


def _block(block: Object) -> str:
    excepted = block.get("except") or []
    return f"ip saddr {block['cidr']}" + (f" ip saddr != {{ {', '.join(excepted)} }}" if excepted else "")


def _ports(rule: Object) -> list[str]:
    """[""] is every port."""
    return [_port(port) for port in rule["ports"] if _can(port)] if rule.get("ports") else [""]


def _can(port: dict[str, Any]) -> bool:
    return port.get("protocol", "TCP") in _PROTOCOLS and not isinstance(port.get("port"), str)


def _port(port: dict[str, Any]) -> str:
    protocol, first = _PROTOCOLS[port.get("protocol", "TCP")], port.get("port")
    if first is None:
        return f"meta l4proto {protocol}"
    return f"{protocol} dport {first}" + (f"-{port['endPort']}" if port.get("endPort") else "")


def load(text: str) -> bool:
    """Returns whether nft took it; its words go to the log."""
    done = subprocess.run(["nft", "-f", "-"], input=text, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        print(f"nft refused: {done.stderr.strip()}\n{text}", flush=True)
    return done.returncode == 0


def main() -> None:
    api, changes = Api.from_kubeconfig(Path(sys.argv[1])), Changes()
    paths = ("/apis/networking.k8s.io/v1/networkpolicies", "/api/v1/pods", "/api/v1/namespaces")
    mirrors = [Mirror(api, path, changes) for path in paths]
    loaded = ""
    while True:
        changes.wait(_RESYNC)
        if all(mirror.complete for mirror in mirrors):
            text = ruleset(*(mirror.all() for mirror in mirrors))
            loaded = text if text == loaded or load(text) else ""


if __name__ == "__main__":
    main()
