"""Merging of what a user adds into what the operator writes. Nothing is changed in place."""

from typing import Any

Raw = dict[str, Any]


def deep_merge(base: Raw, over: Raw) -> Raw:
    """`over` wins; mappings are merged key by key, everything else is replaced."""
    both = {
        key: deep_merge(base[key], value) if isinstance(base.get(key), dict) and isinstance(value, dict) else value
        for key, value in over.items()
    }
    return {**base, **both}


def merge_named(base: list[Raw], over: list[Raw], key: str) -> list[Raw]:
    """Lists of named things: one of `over` replaces its namesake and keeps its place, the others are appended."""
    given = {item.get(key): item for item in over}
    kept = [given.pop(item.get(key), item) for item in base]
    return [*kept, *given.values()]
