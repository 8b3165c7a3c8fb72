"""The CRD that the models print: structural, small, every field described, the same defaults as python's."""

from collections.abc import Iterator
from typing import Any

import yaml

from rlhf_api.crd import COLUMNS, crd, crd_yaml, job_schema
from rlhf_api.job import RLHFJobSpec
from rlhf_api.rules import MUTABLE
from tests.api.specs import minimal_spec

Schema = dict[str, Any]
# What apiextensions/v1 knows of JSON Schema, as far as this CRD uses it. Anything else is refused or silently pruned.
KNOWN = {
    "type", "description", "enum", "default", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength",
    "minItems", "maxItems", "pattern", "format", "required", "properties", "items", "additionalProperties",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
}  # fmt: skip


def walk(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from walk(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from walk(node["additionalProperties"], f"{path}.*")


def fill_defaults(node: Schema, value: Any) -> Any:
    """What the API server does at admission: absent properties that have a default get it, then the value is searched deeper."""
    if isinstance(value, list):
        return [fill_defaults(node.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    properties = node.get("properties", {})
    value = {**{name: child["default"] for name, child in properties.items() if "default" in child}, **value}
    return {name: fill_defaults(properties.get(name, {}), item) for name, item in value.items()}


def without_empty(value: Any) -> Any:
    if isinstance(value, list):
        return [without_empty(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: kept for name, item in value.items() if (kept := without_empty(item)) not in ({}, [])}


def test_every_node_is_structural() -> None:
    for path, node in walk(job_schema()):
        assert set(node) <= KNOWN, path
        assert node["type"] in {"object", "array", "string", "integer", "number", "boolean"}, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert node["type"] != "array" or "items" in node, path


def test_every_field_of_spec_and_status_is_described() -> None:
    fields = [
        (path, node) for path, node in walk(job_schema()) if path.startswith(("spec.", "status.")) and not path.endswith(("[]", ".*"))
    ]
    assert len(fields) > 100
    assert [path for path, node in fields if not node.get("description")] == []


def test_strings_and_lists_of_the_spec_are_bounded() -> None:
    """The API server's cost estimate of a CEL rule needs a bound on what the rule walks."""
    for path, node in walk(job_schema()["properties"]["spec"]):
        assert node["type"] != "string" or "enum" in node or "maxLength" in node, path
        assert node["type"] != "array" or "maxItems" in node, path


def test_it_is_small_and_plain_yaml() -> None:
    text = crd_yaml()
    assert len(text) < 100_000
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


def test_every_spec_field_is_mutable_by_name_or_guarded() -> None:
    spec = job_schema()["properties"]["spec"]
    guarded = {rule["rule"].split("self.")[1].split(")")[0] for rule in spec["x-kubernetes-validations"] if "oldSelf" in rule["rule"]}
    assert guarded | set(MUTABLE) == set(spec["properties"])
    assert not guarded & set(MUTABLE)


def test_pods_take_any_field_of_a_pod_spec() -> None:
    pods = job_schema()["properties"]["spec"]["properties"]["pods"]["properties"]
    assert all(pod["x-kubernetes-preserve-unknown-fields"] is True for pod in pods.values())
