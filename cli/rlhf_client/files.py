"""Files of a user that go to a job's pods: a ConfigMap that the job owns, mounted at MOUNT. Pure."""

import base64
import copy
import re
from collections.abc import Mapping
from typing import Any

from rlhf_api import API_VERSION, KIND
from rlhf_client.errors import Refused
from rlhf_client.names import HEAD, JOB_LABEL, TRAINER, files

Raw = dict[str, Any]
MOUNT, VOLUME = "/files", "files"
MOST_BYTES = 1 << 20  # of a ConfigMap; the API server refuses more
READERS = (HEAD, TRAINER)  # the driver, and whoever reads data and computes rewards


def mounted(raw: Mapping[str, Any]) -> Raw:
    """The manifest with the job's files in the pods that read them."""
    made = copy.deepcopy(dict(raw))
    pods = made["spec"].setdefault("pods", {})
    volume = {"name": VOLUME, "configMap": {"name": files(str(raw["metadata"]["name"]))}}
    mount = {"name": VOLUME, "mountPath": MOUNT, "readOnly": True}
    for role in READERS:
        for field, entry in (("volumes", volume), ("volumeMounts", mount)):
            there = pods.setdefault(role, {}).setdefault(field, [])
            if entry not in there:
                there.append(copy.deepcopy(entry))
    return made


def checked(given: Mapping[str, bytes]) -> None:
    """Raises Refused for what no ConfigMap holds."""
    for name in given:
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", name) or name in (".", ".."):
            raise Refused(f"file {name!r}: rename it: letters, digits, '-', '_' and '.' alone")
    if (size := sum(map(len, given.values()))) > MOST_BYTES:
        raise Refused(f"the files have {size / 2**20:.1f} MiB, a ConfigMap holds 1: put them on a volume, an object "
            "store or the hub, and name the place in spec.data")


def config_map(name: str, given: Mapping[str, bytes], uid: str = "") -> Raw:
    """It goes with the job. `uid`: of the job, when it is there."""
    owner: Raw = {"apiVersion": API_VERSION, "kind": KIND, "name": name, "uid": uid, "controller": False,
        "blockOwnerDeletion": False}
    metadata = {"name": files(name), "labels": {JOB_LABEL: name}, **({"ownerReferences": [owner]} if uid else {})}
    texts = {file: text for file, content in given.items() if (text := _text(content)) is not None}
    packed = {file: base64.b64encode(content).decode() for file, content in given.items() if file not in texts}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": texts,
        "binaryData": packed}


def _text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def same(there: Raw, made: Raw) -> bool:
    """Whether two ConfigMaps hold the same."""
    return all((there.get(field) or {}) == (made.get(field) or {}) for field in ("data", "binaryData"))


def owned_by(there: Raw, uid: str) -> bool:
    return any(owner.get("uid") == uid for owner in there["metadata"].get("ownerReferences") or [])
