"""Kubernetes' resource quantities: how much a text such as 500m, 1e3 or 1.5Gi means."""

import re
from decimal import ROUND_CEILING, Decimal

PATTERN = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))(?:([KMGTPE]i|[numkMGTPE]?)|[eE]([+-]?[0-9]{1,3}))", re.ASCII)
POWERS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
BINARY = {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", start=1)}
LONGEST, MOST = 64, Decimal(2**63 - 1)


def parse(quantity: str | int | float) -> Decimal:
    """The number a quantity means ("500m" is 0.5, "1Gi" is 1073741824). Raises ValueError."""
    text = str(quantity)
    found = PATTERN.fullmatch(text) if len(text) <= LONGEST and not isinstance(quantity, bool) else None
    if found is None:
        raise ValueError(f"{text[:LONGEST]!r} is not a quantity")
    number, suffix, exponent = found.groups()
    value = Decimal(number) * (BINARY.get(suffix) or Decimal(10) ** int(exponent or POWERS[suffix]))
    if abs(value) > MOST:
        raise ValueError(f"{text!r} is more than any quantity can be")
    return value


def whole(quantity: str | int | float) -> int:
    """Rounded up, as Kubernetes does where it needs an integer. Raises ValueError."""
    return int(parse(quantity).to_integral_value(ROUND_CEILING))
