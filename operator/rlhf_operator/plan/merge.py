"""Merging of what a user adds into what the operator writes. Nothing is changed in place; nothing that a user
writes raises.
"""

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
    """Lists of named things: one of `over` replaces its namesake and keeps its place, others are appended; the last
    one counts.
    """
    given = [item for at, item in enumerate(over) if not _named(over[at + 1 :], item.get(key), key)]
    kept = [found[0] if (found := _named(given, item.get(key), key)) else item for item in base]
    return [*kept, *(item for item in given if not _named(base, item.get(key), key))]


def _named(items: list[Raw], name: Any, key: str) -> list[Raw]:
    """Compared, not looked up: what should be a name may be anything, which the API server then refuses by its
    path.
    """
    return [item for item in items if item.get(key) == name]
