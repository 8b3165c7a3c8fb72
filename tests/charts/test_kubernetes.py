"""What is installed, and what the operator makes of the samples, by the schemas of the oldest Kubernetes that the chart
lets in and of the newest: without a field that the one has not yet, or the other no longer. tests/cluster asks an API
server of one version.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from hack import generate
from hack.release import APART
from tests.charts.test_chart import VALUES, rendered
from tests.control.golden import FOLDER
from tests.control.test_plan import made_pods

Object = dict[str, Any]
OF_OTHERS = {"monitoring.coreos.com/v1", "ray.io/v1"}  # whose schemas come with their CRDs


class Schemas:
    """Of every Kubernetes, by kubernetes-validate."""

    def __init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(APART)
            self.library = importlib.import_module("kubernetes_validate.utils")
        least = yaml.safe_load((generate.CHART / "Chart.yaml").read_text())["kubeVersion"]
        self.versions = {"oldest": f"1.{minor(least)}", "newest": f"1.{max(map(minor, self.library.all_versions()))}"}

    def wrong(self, objects: list[Object], which: str) -> list[str]:
        """Each object that they refuse, with what is wrong with it."""
        found = []
        for one in objects:
            try:
                self.library.validate(one, self.versions[which], strict=True)
            except self.library.ValidationError as error:
                found.append(f"{one['kind']} {one['metadata'].get('name')}: {error.message}")
        return found


def minor(version: str) -> int:
    return int(version.split(".")[1])


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    return Schemas()


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


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_every_object_is_valid_to_the_letter(
    schemas: Schemas, installed: list[Object], made: list[Object], which: str,
) -> None:
    different = {yaml.safe_dump(one): one for one in (*installed, *made)}
    theirs = [one for one in different.values() if one["apiVersion"] not in OF_OTHERS]
    kinds = {one["kind"] for one in theirs}
    assert {"CustomResourceDefinition", "Deployment", "PodDisruptionBudget", "NetworkPolicy", "Pod"} <= kinds
    assert schemas.wrong(theirs, which) == []


def test_a_field_that_an_older_one_lacks_is_found(schemas: Schemas, made: list[Object]) -> None:
    pod = next(one for one in made if one["kind"] == "Pod")
    newer = {**pod, "spec": {**pod["spec"], "hostnameOverride": "one"}}
    assert schemas.wrong([newer], "newest") == []
    assert len(schemas.wrong([newer], "oldest")) == 1
