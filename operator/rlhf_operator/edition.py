"""Which edition of a job's spec a RayCluster was made from: a digest, written on the RayCluster when it is made.

What a RayCluster is made of may be edited only while the job is suspended; but the user may take `suspend` back before
the old RayCluster is gone, or before anyone looked. Then the digest still tells that another RayCluster is due.
"""

import hashlib
import json
from typing import Any

from rlhf_api.job import RLHFJobSpec
from rlhf_api.rules import MUTABLE

Raw = dict[str, Any]


def edition(spec: RLHFJobSpec) -> str:
    """16 hexadecimal digits. Fields that may change at any time have no part in it, nor have defaults: a new field of a
    later version makes no job another one."""
    told = spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    for path in MUTABLE:
        _without(told, path.split("."))
    return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=8).hexdigest()


def _without(node: Raw, path: list[str]) -> None:
    """An object of which nothing is left says nothing, and goes too."""
    name, *rest = path
    if rest and name in node:
        _without(node[name], rest)
    if not rest or not node.get(name):
        node.pop(name, None)
