"""Sums of Kubernetes resource quantities as text."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal


def text(value: Decimal) -> str:
    """A canonical quantity for ``value``: whole, or in thousandths."""
    if value == value.to_integral_value():
        return str(int(value))
    return f"{int((value * 1000).to_integral_value(ROUND_CEILING))}m"
