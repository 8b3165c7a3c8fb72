"""The CRD that the models print: structural, small, every field described, the same defaults as python's."""

import re
from typing import Any

import yaml

from rlhf_api.crd import COLUMNS, crd, crd_yaml, job_schema
from rlhf_api.job import RLHFJobSpec
from tests.api.schema import fill_defaults, walk
from tests.api.specs import minimal_spec

# What apiextensions/v1 knows of JSON Schema, as far as this CRD uses it. Anything else is refused or silently pruned.
KNOWN = {
    "type", "description", "enum", "default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength",
    "maxLength",
    "minItems", "maxItems", "maxProperties", "pattern", "format", "required", "properties", "items",
    "additionalProperties",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string", "x-kubernetes-validations",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
}  # fmt: skip


# Fields of Kubernetes' own types, which it describes itself.
FOREIGN = re.compile(
    r"spec\.(pods\.\w+\.(resources|containerSecurityContext)\.|pods\.\w+\.(env|envFrom|volumes|volumeMounts)\[\]\.|networkPolicy\.allowFrom\[\]\.)"
)


def without_empty(value: Any) -> Any:
    if isinstance(value, list):
        return [without_empty(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: kept for name, item in value.items() if (kept := without_empty(item)) not in ({}, [])}


def test_every_node_is_structural() -> None:
    for path, node in walk(job_schema()):
        assert set(node) <= KNOWN, path
        assert node.get("x-kubernetes-int-or-string") or node.get("type") in {
            "object", "array", "string", "integer", "number", "boolean",
        }, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert node.get("type") != "array" or "items" in node, path


def test_every_field_of_spec_and_status_is_described() -> None:
    fields = [
        (path, node) for path, node in walk(job_schema())
        if path.startswith(("spec.", "status.")) and not path.endswith(("[]", ".*")) and not FOREIGN.match(path)
    ]  # fmt: skip
    assert len(fields) > 100
    assert [path for path, node in fields if not node.get("description")] == []


def test_strings_and_lists_of_the_spec_are_bounded() -> None:
    """The API server's cost estimate of a CEL rule needs a bound on what the rule walks."""
    for path, node in walk(job_schema()["properties"]["spec"]):
        assert node.get("type") != "string" or "enum" in node or "maxLength" in node, path
        assert node.get("type") != "array" or "maxItems" in node, path


def test_numbers_of_the_spec_are_bounded_on_both_sides() -> None:
    """What is planned from a spec takes memory of the operator, which all jobs share."""
    numbers = [
        (path, node)
        for path, node in walk(job_schema()["properties"]["spec"]) if node.get("type") in ("integer", "number")
    ]
    assert len(numbers) > 50
    assert [path for path, node in numbers if not {"minimum", "maximum"} <= set(node)] == []


def test_it_is_small_and_plain_yaml() -> None:
    """kubectl apply keeps a copy of it in an annotation, of which an object has at most 262,144 bytes."""
    text = crd_yaml()
    assert len(text) < 200_000
    assert "&id" not in text
    assert yaml.safe_load(text) == crd()


def test_the_api_server_fills_in_the_defaults_that_python_has() -> None:
    sparse = minimal_spec()
    filled = fill_defaults(job_schema()["properties"]["spec"], sparse)
    assert without_empty(filled) == without_empty(RLHFJobSpec.model_validate(sparse).to_dict())
    assert RLHFJobSpec.model_validate(filled) == RLHFJobSpec.model_validate(sparse)


def test_a_status_has_no_defaults() -> None:
    assert [path for path, node in walk(job_schema()["properties"]["status"]) if "default" in node] == []


def test_columns_read_fields_that_exist() -> None:
    paths = {path for path, _ in walk(job_schema())} | {"metadata.creationTimestamp"}
    assert [column for column in COLUMNS if column[2].removeprefix(".") not in paths] == []


def test_pods_take_any_field_of_a_pod_spec() -> None:
    pods = job_schema()["properties"]["spec"]["properties"]["pods"]["properties"]
    assert {
        name for name, pod in pods.items() if pod.get("x-kubernetes-preserve-unknown-fields")
    } == {"head", "trainer", "rollout"}
