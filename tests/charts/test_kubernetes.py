"""What is installed, and what the operator makes of the samples, by the schemas of the oldest Kubernetes that the chart
lets in and of the newest: without a field that the one has not yet, or the other no longer. tests/cluster asks an API
server of one version.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack import generate
from tests.charts.test_chart import VALUES, rendered
from tests.control.golden import FOLDER
from tests.control.test_plan import made_pods

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(sys.prefix) / "schemas")  # hack/setup.sh says why there
    from kubernetes_validate.utils import ValidationError, all_versions, validate

Object = dict[str, Any]
OF_OTHERS = {"monitoring.coreos.com/v1", "ray.io/v1"}  # whose schemas come with their CRDs


def minor(version: str) -> int:
    return int(version.split(".")[1])


LEAST = yaml.safe_load((generate.CHART / "Chart.yaml").read_text())["kubeVersion"].removeprefix(">=")
OLDEST, NEWEST = f"1.{minor(LEAST)}", f"1.{max(map(minor, all_versions()))}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """All objects of all renders."""
    folder = tmp_path_factory.mktemp("values")
    return [one for values in ({}, *VALUES.values()) for one in rendered(values, folder)]


@pytest.fixture(scope="module")
def made() -> list[Object]:
    """For the samples: what the operator makes, and the pods that KubeRay makes of that."""
    plans = [one for file in (FOLDER / "plans").glob("*.yaml") for one in yaml.safe_load_all(file.read_text())]
    return [*plans, *(pod for one in plans if one["kind"] == "RayCluster" for pod in made_pods(one))]


def wrong(objects: list[Object], version: str) -> list[str]:
    """Each object that the schemas refuse, with what is wrong with it."""
    found = []
    for one in objects:
        try:
            validate(one, version, strict=True)
        except ValidationError as error:
            found.append(f"{one['kind']} {one['metadata'].get('name')}: {error.message}")
    return found


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid_to_the_letter(installed: list[Object], made: list[Object], version: str) -> None:
    different = {yaml.safe_dump(one): one for one in (*installed, *made)}
    theirs = [one for one in different.values() if one["apiVersion"] not in OF_OTHERS]
    kinds = {one["kind"] for one in theirs}
    assert {"CustomResourceDefinition", "Deployment", "PodDisruptionBudget", "NetworkPolicy", "Pod"} <= kinds
    assert wrong(theirs, version) == []


def test_a_field_that_an_older_one_lacks_is_found(made: list[Object]) -> None:
    pod = next(one for one in made if one["kind"] == "Pod")
    newer = {**pod, "spec": {**pod["spec"], "hostnameOverride": "one"}}
    assert wrong([newer], NEWEST) == []
    assert len(wrong([newer], OLDEST)) == 1
