"""CEL, as far as the transition rules go: read as python, so that a pure test can try an edit. tests/cluster tries them
for real.
"""

import re
from collections.abc import Callable
from typing import Any

SIGNS = ((r"&&", " and "), (r"\|\|", " or "), (r"!(?!=)", " not "))
HAS = re.compile(r"has\(([\w.]+)\)")
MACRO = re.compile(r"\.(all|exists)\((\w+), ")


def allows(cel: str, old: Any, new: Any) -> bool:
    """Whether the rule lets an edit from `old` to `new` pass."""
    text = MACRO.sub(r".\1(lambda \2: ", HAS.sub(_has, cel))
    for sign, word in SIGNS:
        text = re.sub(sign, word, text)
    return bool(eval(text, {"__builtins__": {}, "self": Value(new), "oldSelf": Value(old)}))


def _has(match: re.Match[str]) -> str:
    root, _, name = match[1].rpartition(".")
    return f"({root}.has('{name}'))"


class Value:
    """An object or a list, with CEL's methods."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        return _wrapped(self._raw[name])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and bool(self._raw == other._raw)

    __hash__ = None  # type: ignore[assignment]

    def has(self, name: str) -> bool:
        return name in self._raw

    def size(self) -> int:
        return len(self._raw)

    def all(self, holds: Callable[[Any], bool]) -> bool:
        return all(holds(_wrapped(item)) for item in self._raw)

    def exists(self, holds: Callable[[Any], bool]) -> bool:
        return any(holds(_wrapped(item)) for item in self._raw)


def _wrapped(raw: Any) -> Any:
    return Value(raw) if isinstance(raw, dict | list) else raw
