"""What the plan makes, through whole passes: policies that are edited, claims that outlive a job, resources of every
kind.
"""

from typing import Any

import pytest

from rlhf_operator.client import ApiError
from rlhf_operator.kinds import CLAIMS, JOBS, NETWORK_POLICIES, PODS
from tests.api.specs import a_job
from tests.control.world import World, running

Raw = dict[str, Any]
PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def policy(world: World) -> Raw:
    (found,) = world.api.of(NETWORK_POLICIES)
    spec: Raw = found["spec"]
    return spec


def selects(world: World, pod: Raw) -> bool:
    wanted: dict[str, str] = policy(world)["podSelector"]["matchLabels"]
    return bool(wanted.items() <= pod["metadata"]["labels"].items())


def test_a_policy_is_turned_off_and_on_again_under_pods_that_run() -> None:
    world = running()
    assert all(selects(world, pod) for pod in world.pods())
    world.edit(networkPolicy={"enabled": False})
    world.settle()
    assert not any(selects(world, pod) for pod in world.pods())
    world.edit(networkPolicy={"enabled": True, "allowFrom": [PROMETHEUS]})
    world.settle()
    assert all(selects(world, pod) for pod in world.pods())
    assert PROMETHEUS in policy(world)["ingress"][0]["from"]
    assert world.errors == []


@pytest.mark.parametrize("status", [500, 403])
def test_an_edit_that_could_not_be_acted_on_is_not_forgotten(status: int) -> None:
    """The run goes on; whom its policy lets in must not depend on one request's luck."""
    world = running()
    world.api.refuse["NetworkPolicy"] = ApiError(status, "Told", "not now")
    world.edit(networkPolicy={"allowFrom": [PROMETHEUS]})
    world.settle()
    assert world.status["observedGeneration"] == 1, "nothing was done about it"
    world.settle()
    assert (world.condition("Degraded")[0] == "True") is (status == 500)
    assert (world.condition("Accepted") == ("False", "Refused")) is (status == 403), "and stays so"
    del world.api.refuse["NetworkPolicy"]
    world.settle()
    assert PROMETHEUS in policy(world)["ingress"][0]["from"]
    assert world.status["observedGeneration"] == 2
    assert world.condition("Accepted") == ("True", "Accepted")


def test_who_is_named_no_longer_is_let_in_no_longer() -> None:
    """Whatever is taken away: a peer, or a part of what a peer must be."""
    both = {**PROMETHEUS, "podSelector": {"matchLabels": {"app": "prometheus"}}}
    for before, after in (([both], [PROMETHEUS]), ([PROMETHEUS], [both]), ([PROMETHEUS, both], [both]), ([both], [])):
        world = running(networkPolicy={"allowFrom": before})
        world.edit(networkPolicy={"allowFrom": after})
        world.settle()
        assert policy(world)["ingress"][0]["from"][2:] == after


def test_a_policy_waits_for_a_spec_without_problems() -> None:
    world = running()
    world.edit(networkPolicy={"allowFrom": [{}]})
    world.settle()
    assert world.condition("Accepted") == ("False", "InvalidSpec")
    assert len(policy(world)["ingress"][0]["from"]) == 2
    assert world.status["phase"] == "Running"


@pytest.mark.parametrize(("on_delete", "left"), [("Delete", []), ("Keep", ["sample-checkpoints"])])
def test_a_kept_claim_outlives_its_job_and_serves_the_next(on_delete: str, left: list[str]) -> None:
    world = running(checkpoint={"path": "/checkpoints", "claim": {"size": "10Gi", "onDelete": on_delete}})
    world.api.vanish(JOBS, world.job_raw)
    assert [claim["metadata"]["name"] for claim in world.api.of(CLAIMS)] == left
    world.job_raw = world.api.put(JOBS, a_job(checkpoint__claim={"size": "5Gi", "onDelete": on_delete}))
    world.job_raw["metadata"]["generation"] = 1
    for pod in world.pods():
        world.api.remove(PODS, pod["metadata"]["name"])
    world.settle()
    assert world.condition("Accepted")[0] == "True"
    assert world.clusters() == ["sample-1"]
    (claim,) = world.api.of(CLAIMS)
    assert claim["spec"]["resources"]["requests"]["storage"] == (
        "10Gi" if left else "5Gi"
    ), "what holds data is left as it is"


@pytest.mark.parametrize(
    ("resources", "clusters"),
    [
        ({"requests": {"cpu": "2k"}}, ["sample-1"]),
        ({"limits": {"cpu": "16Gi"}}, []),
        ({"limits": {"cpu": "four"}}, []),
        ({"limits": {"cpu": ["4"]}}, []),
        ({"limits": "lots"}, []),
    ],
)
def test_resources_are_planned_or_refused_by_their_path(resources: Raw, clusters: list[str]) -> None:
    world = World(pods={kind: {"resources": resources} for kind in ("head", "driver", "trainer")})
    world.settle()
    assert (world.clusters(), world.errors) == (clusters, [])
    assert world.condition("Accepted")[0] == str(bool(clusters))
    told = next(c["message"] for c in world.status["conditions"] if c["type"] == "Accepted")
    assert clusters or all(f"spec.pods.{kind}.resources.limits" in told for kind in ("head", "driver", "trainer"))
