"""Volumes for PersistentVolumeClaims: the default StorageClass, whose volumes are directories of this node.

Run as ``python -m hack.cluster.claims <kubeconfig>``. A claim's directory is
``/var/lib/rlhf/claims/<namespace>-<claim>``, open to every user, as fsGroup does nothing for a host path. It outlives
the claim only where the volume says Retain.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from hack.cluster.kube import Api, ApiError, Object
from hack.cluster.mirror import Changes, Mirror

DIRECTORY = Path("/var/lib/rlhf/claims")
CLASS = "standard"
PROVISIONER = "rlhf.dev/embedded"
_PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
_RESYNC = 30.0


def storage_class() -> Object:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS, "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "Immediate",
    }


def directory_of(claim: Object) -> Path:
    return DIRECTORY / f"{claim['metadata']['namespace']}-{claim['metadata']['name']}"


def wanting(claims: list[Object], volumes: list[Object]) -> list[Object]:
    """The claims of our class that have no volume and for which none was made yet."""
    served = {volume["spec"].get("claimRef", {}).get("uid") for volume in volumes}
    return [
        claim
        for claim in claims
        if claim["spec"].get("storageClassName") == CLASS
        and not claim["spec"].get("volumeName")
        and not claim["metadata"].get("deletionTimestamp")
        and claim["metadata"]["uid"] not in served
    ]


def released(volumes: list[Object]) -> list[Object]:
    """Our volumes whose claim is gone and that are not to be kept."""
    return [
        volume
        for volume in volumes
        if (volume["metadata"].get("annotations") or {}).get(_PROVISIONED_BY) == PROVISIONER
        and volume.get("status", {}).get("phase") == "Released"
        and volume["spec"]["persistentVolumeReclaimPolicy"] == "Delete"
        and not volume["metadata"].get("deletionTimestamp")
    ]


def volume_for(claim: Object) -> Object:
    meta = claim["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"pvc-{meta['uid']}", "annotations": {_PROVISIONED_BY: PROVISIONER}},
        "spec": {
            "storageClassName": CLASS,
            "persistentVolumeReclaimPolicy": "Delete",
            "accessModes": claim["spec"]["accessModes"],
            "capacity": {"storage": claim["spec"]["resources"]["requests"]["storage"]},
            "hostPath": {"path": str(directory_of(claim)), "type": "Directory"},
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
            },
        },
    }


def keep(api: Api, claims: list[Object], volumes: list[Object]) -> None:
    """Give each claim its volume, and take back what was released."""
    for claim in wanting(claims, volumes):
        directory = directory_of(claim)
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o777)
        _create(api, volume_for(claim))
        print(f"made {directory}", flush=True)
    for volume in released(volumes):
        shutil.rmtree(volume["spec"]["hostPath"]["path"], ignore_errors=True)
        api.delete(f"/api/v1/persistentvolumes/{volume['metadata']['name']}")
        print(f"removed {volume['spec']['hostPath']['path']}", flush=True)


def _create(api: Api, volume: Object) -> None:
    """A volume that the mirror does not show yet is there all the same."""
    try:
        api.create("/api/v1/persistentvolumes", volume)
    except ApiError as error:
        if error.code != 409:
            raise


def _ensure_class(api: Api) -> None:
    path = "/apis/storage.k8s.io/v1/storageclasses"
    if api.find(f"{path}/{CLASS}") is None:
        api.create(path, storage_class())


def main() -> None:
    api, changes = Api.from_kubeconfig(Path(sys.argv[1])), Changes()
    claims = Mirror(api, "/api/v1/persistentvolumeclaims", changes)
    volumes = Mirror(api, "/api/v1/persistentvolumes", changes)
    while True:
        try:
            _ensure_class(api)
            if claims.complete and volumes.complete:
                keep(api, claims.all(), volumes.all())
        except ApiError as error:
            print(error, flush=True)
            changes.note()
        changes.wait(_RESYNC)


if __name__ == "__main__":
    main()
