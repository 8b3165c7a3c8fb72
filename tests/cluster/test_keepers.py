"""The embedded cluster's own controllers: volumes for claims, NetworkPolicies as nftables rules (pure, no cluster)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hack.cluster import claims, policies
from hack.cluster.kube import ApiError, Object


def claim(name: str = "c", uid: str = "u1", deleted: bool = False, **spec: Any) -> Object:
    asked = {
        "storageClassName": "standard",
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
    }
    meta = {"namespace": "team", "name": name, "uid": uid} | ({"deletionTimestamp": "now"} if deleted else {})
    return {"metadata": meta, "spec": asked | spec}


def volume(claimed: Object, phase: str = "Bound", **spec: Any) -> Object:
    made = claims.volume_for(claimed)
    return made | {"spec": made["spec"] | spec, "status": {"phase": phase}}


@pytest.mark.parametrize(
    ("given", "wants"),
    [
        (claim(), True),
        (claim(storageClassName="fast"), False),
        (claim(volumeName="by-hand"), False),
        (claim(deleted=True), False),
    ],
)
def test_a_claim_of_our_class_without_a_volume_wants_one(given: Object, wants: bool) -> None:
    assert bool(claims.wanting([given], [])) is wants


def test_a_claim_is_served_once_and_a_later_one_of_its_name_again() -> None:
    made = volume(claim(uid="u1"))
    assert claims.wanting([claim(uid="u1")], [made]) == []
    assert claims.wanting([claim(uid="u2")], [made]) != []


@pytest.mark.parametrize(
    ("phase", "changes", "goes"),
    [("Released", {}, True), ("Bound", {}, False), ("Released", {"persistentVolumeReclaimPolicy": "Retain"}, False)],
)
def test_what_is_released_goes_by_its_policy(phase: str, changes: dict[str, Any], goes: bool) -> None:
    assert bool(claims.released([volume(claim(), phase, **changes)])) is goes


def test_a_volume_that_another_made_is_never_removed() -> None:
    foreign = volume(claim(), "Released")
    foreign["metadata"]["annotations"] = {}
    assert claims.released([foreign]) == []


class Volumes:
    """An API server that knows volumes; `there` is refused as it exists already."""

    def __init__(self, there: bool = False) -> None:
        self.there = there
        self.made: list[str] = []
        self.deleted: list[str] = []

    def create(self, path: str, body: Object) -> Object:
        if self.there:
            raise ApiError(409, "exists")
        self.made.append(body["spec"]["hostPath"]["path"])
        return body

    def delete(self, path: str) -> None:
        self.deleted.append(path)


def test_directories_come_and_go_with_their_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "DIRECTORY", tmp_path / "claims")
    api, directory = Volumes(), tmp_path / "claims" / "team-c"
    claims.keep(api, [claim()], [])  # type: ignore[arg-type]
    assert api.made == [str(directory)]
    assert directory.stat().st_mode & 0o777 == 0o777, (
        "a pod of any user writes there: fsGroup does nothing for a host path"
    )
    (directory / "step-1").write_text("saved")
    claims.keep(Volumes(there=True), [claim()], [])  # type: ignore[arg-type]
    assert (directory / "step-1").exists(), "what lies there already is taken up"
    claims.keep(api, [], [volume(claim(), "Released")])  # type: ignore[arg-type]
    assert not directory.exists()
    assert api.deleted == ["/api/v1/persistentvolumes/pvc-u1"]


# --- policies ---------------------------------------------------------------------------------------------------

JOB = {"rlhf.dev/job": "tiny"}


def pod(address: str, namespace: str = "team", labels: dict[str, str] | None = None, **changes: Any) -> Object:
    status = {"podIP": address, "phase": changes.pop("phase", "Running")}
    return {"metadata": {"namespace": namespace, "labels": labels or {}}, "spec": changes, "status": status}


def policy(*rules: Object, namespace: str = "team", **spec: Any) -> Object:
    return {
        "metadata": {"namespace": namespace},
        "spec": {"podSelector": {"matchLabels": JOB}, "ingress": list(rules), **spec},
    }


NAMESPACES = [
    {"metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}} for name in ("team", "rlhf-system")
]
OPERATOR = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "rlhf-system"}},
    "podSelector": {"matchLabels": {"app": "operator"}},
}
PODS = [
    pod("198.18.0.1", labels=JOB),
    pod("198.18.0.2", labels=JOB),
    pod("198.18.0.3"),
    pod("198.18.0.4", "rlhf-system", {"app": "operator"}),
    pod("198.18.0.5", "rlhf-system", {"app": "other"}),
    pod("198.18.0.6", "team", JOB, phase="Succeeded"),
]


def rules(*found: Object, pods: list[Object] = PODS) -> list[str]:
    lines = [line.strip() for line in policies.ruleset(list(found), pods, NAMESPACES).splitlines()]
    return [line for line in lines if line.startswith("ip ")]


def test_only_selected_pods_are_closed() -> None:
    assert rules(policy()) == ["ip daddr 198.18.0.1 drop", "ip daddr 198.18.0.2 drop"]
    assert rules() == []
    assert rules(policy(policyTypes=["Egress"])) == [], "egress is not enforced"


def test_peers_of_the_own_and_of_another_namespace() -> None:
    found = rules(policy({"from": [{"podSelector": {"matchLabels": JOB}}, OPERATOR]}))
    assert found[:2] == [
        "ip daddr 198.18.0.1 ip saddr { 198.18.0.1, 198.18.0.2, 198.18.0.4 } accept",
        "ip daddr 198.18.0.1 drop",
    ]


@pytest.mark.parametrize(
    ("rule", "admits"),
    [
        ({}, ["accept"]),
        ({"ports": [{"port": 8266}]}, ["tcp dport 8266 accept"]),
        ({"ports": [{"port": 1, "endPort": 9, "protocol": "UDP"}]}, ["udp dport 1-9 accept"]),
        ({"ports": [{"protocol": "TCP"}]}, ["meta l4proto tcp accept"]),
        ({"ports": [{"port": "named"}]}, []),
        ({"from": [{"podSelector": {"matchLabels": {"no": "pod"}}}]}, []),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}, ["ip saddr 10.0.0.0/8 accept"]),
        (
            {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]},
            ["ip saddr 10.0.0.0/8 ip saddr != { 10.1.0.0/16 } accept"],
        ),
    ],
)
def test_a_rule_admits(rule: Object, admits: list[str]) -> None:
    start = "ip daddr 198.18.0.1 "
    assert rules(policy(rule), pods=PODS[:1]) == [start + admitted for admitted in admits] + [start + "drop"]


@pytest.mark.parametrize(
    ("term", "labels", "holds"),
    [
        ({"key": "a", "operator": "In", "values": ["x"]}, {"a": "x"}, True),
        ({"key": "a", "operator": "In", "values": ["x"]}, {}, False),
        ({"key": "a", "operator": "NotIn", "values": ["x"]}, {}, True),
        ({"key": "a", "operator": "Exists"}, {"a": ""}, True),
        ({"key": "a", "operator": "DoesNotExist"}, {"a": ""}, False),
    ],
)
def test_expressions(term: Object, labels: dict[str, str], holds: bool) -> None:
    assert policies.matches({"matchExpressions": [term]}, labels) is holds
