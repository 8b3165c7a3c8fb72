"""A copy of raw data that lacks what is at one place."""

from typing import Any

Loc = tuple[int | str, ...]  # as pydantic tells of an error's


def without(node: Any, loc: Loc) -> Any:
    """A copy that lacks what is at `loc`; only what lies on the way is copied."""
    first, rest = loc[0], loc[1:]
    copy: Any = [*node] if isinstance(node, list) else {**node}
    if rest:
        copy[first] = without(node[first], rest)
    else:
        del copy[first]
    return copy
