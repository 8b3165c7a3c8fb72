"""CPUs of a container, read from its resources. Pure."""

import re
from typing import Any

FACTORS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
QUANTITY = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?(?:[eE][+-]?[0-9]{1,2})?)([a-zA-Z]{0,2})")
MOST = 4096


def whole_cores(resources: Any) -> int | None:
    """The limit, else the request, in whole cores from 1 to MOST. None where neither is a quantity: the API server
    will say so.
    """
    given = resources if isinstance(resources, dict) else {}
    for side in (given.get("limits"), given.get("requests")):
        if isinstance(side, dict) and (cores := _cores(side.get("cpu"))) is not None:
            return min(MOST, max(1, int(cores)))
    return None


def _cores(quantity: Any) -> float | None:
    found = QUANTITY.fullmatch(str(quantity))
    return float(found[1]) * FACTORS[found[2]] if found and found[2] in FACTORS else None
