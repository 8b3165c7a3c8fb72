"""As much of a raw object as a model can read: what another version wrote is passed over, the rest must not be lost
with it."""

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)
Loc = tuple[int | str, ...]


def salvage(model: type[M], raw: object) -> M:
    """Never raises. `model` needs no field: what cannot be read has its default."""
    kept = raw if isinstance(raw, dict) else {}
    while True:
        try:
            return model.model_validate(kept)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = first["loc"][:-1] if first["type"] == "missing" else first["loc"]
        if not where:
            return model()
        kept = _without(kept, where)


def _without(node: Any, loc: Loc) -> Any:
    """A copy without what is at `loc`; without all of the parent where that is no longer an object."""
    first, rest = loc[0], loc[1:]
    if isinstance(node, list) and isinstance(first, int):
        inner = [_without(node[first], rest)] if rest and _holds(node[first], rest[0]) else []
        return [*node[:first], *inner, *node[first + 1 :]]
    others = {key: value for key, value in node.items() if key != first}
    return {**others, first: _without(node[first], rest)} if rest and _holds(node[first], rest[0]) else others


def _holds(node: Any, key: int | str) -> bool:
    return (isinstance(node, dict) and key in node) or (
        isinstance(node, list) and isinstance(key, int) and key < len(node)
    )
