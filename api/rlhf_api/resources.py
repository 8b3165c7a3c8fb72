"""Requests and limits of a container, as Kubernetes judges them."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from rlhf_api.quantity import parse

Raw = dict[str, Any]
STANDARD = re.compile(r"cpu|memory|ephemeral-storage|hugepages-[0-9A-Za-z]+")
EXTENDED = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
# What no container can want: Kubernetes takes it, and the pod never runs.
SENSIBLE = {
    "cpu": (Decimal("0.001"), Decimal(100_000), "cores, such as 4 or 500m"),
    "memory": (Decimal(1 << 20), Decimal(1 << 60), "bytes, such as 16Gi"),
}


def resource_problems(resources: Raw, path: str) -> Iterator[str]:
    """`resources` has the shape of a container's; it is the amounts that are judged."""
    amounts: dict[str, dict[str, Decimal]] = {"requests": {}, "limits": {}}
    for side, found in amounts.items():
        for name, quantity in resources.get(side, {}).items():
            try:
                found[name] = parse(quantity)
            except ValueError as error:
                yield f"{path}.{side}.{name}: {error}: write it as 4, 500m or 16Gi"
    for side, found in amounts.items():
        for name, amount in found.items():
            yield from (f"{path}.{side}.{name}: {text}" for text in _amount(name, amount))
    yield from (f"{path}.{text}" for text in _sides(amounts["requests"], amounts["limits"]))


def _amount(name: str, amount: Decimal) -> Iterator[str]:
    least, most, unit = SENSIBLE.get(name, (Decimal(0), Decimal(2**63), ""))
    if not STANDARD.fullmatch(name) and not EXTENDED.fullmatch(name):
        yield "is no resource: name cpu, memory, ephemeral-storage, hugepages-<size> or domain/name"
    elif amount < 0:
        yield "is less than nothing: raise it"
    elif amount and not least <= amount <= most:
        yield f"is {amount:f} {unit}: correct it"
    elif "/" in name and amount != amount.to_integral_value():
        yield "counts devices: make it a whole number"


def _sides(requests: dict[str, Decimal], limits: dict[str, Decimal]) -> Iterator[str]:
    for name, amount in requests.items():
        if name in limits and amount > limits[name]:
            yield f"requests.{name}: is more than limits.{name}: lower it, or raise the limit"
        elif (name.startswith("hugepages-") or "/" in name) and amount != limits.get(name):
            yield f"requests.{name}: must equal limits.{name}: it cannot be shared"
