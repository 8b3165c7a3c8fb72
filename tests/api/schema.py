"""Reading the CRD's schema: its nodes, and what the API server makes of an object by it."""

from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def walk(node: Schema, path: str = "") -> Iterator[tuple[str, Schema]]:
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}".lstrip("."))
    if "items" in node:
        yield from walk(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from walk(node["additionalProperties"], f"{path}.*")


def fill_defaults(node: Schema, value: Any) -> Any:
    """What the API server does at admission: absent properties that have a default get it, then the value is searched
    deeper.
    """
    if isinstance(value, list):
        return [fill_defaults(node.get("items", {}), item) for item in value]
    if not isinstance(value, dict):
        return value
    properties = node.get("properties", {})
    value = {**{name: child["default"] for name, child in properties.items() if "default" in child}, **value}
    return {name: fill_defaults(properties.get(name, {}), item) for name, item in value.items()}
