"""Kubernetes resource quantities, as far as a Ray node's resources need them."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_SUFFIXES = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "": "1", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15", "E": "1e18"}
_FACTORS = {key: Decimal(value) for key, value in _SUFFIXES.items()} | {
    f"{letter}i": Decimal(1024**power) for power, letter in enumerate("KMGTPE", start=1)
}


def parse(quantity: str | int | float) -> Decimal:
    """The number a quantity means ("500m" is 0.5, "1Gi" is 1073741824). Raises ValueError."""
    match = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)", str(quantity).strip())
    if not match or match[2] not in _FACTORS:
        raise ValueError(f"{quantity!r} is not a quantity")
    return Decimal(match[1]) * _FACTORS[match[2]]


def whole(quantity: str | int | float) -> int:
    """Rounded up, as Kubernetes does where it needs an integer."""
    return int(parse(quantity).to_integral_value(ROUND_CEILING))


def text(value: Decimal) -> str:
    """A canonical quantity for ``value``: whole, or in thousandths."""
    if value == value.to_integral_value():
        return str(int(value))
    return f"{int((value * 1000).to_integral_value(ROUND_CEILING))}m"
