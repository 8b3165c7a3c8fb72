"""Keeps ``nvidia.com/gpu`` in the status of the node: the kubelet knows no such device and drops it when it registers.

Run as ``python -m hack.cluster.logical_gpus <kubeconfig> <node>``. It reads every second and writes only a difference.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from hack.cluster.kube import Api, ApiError
from hack.cluster.settings import GPU_RESOURCE, LOGICAL_GPUS


def keep(api: Api, node: str) -> bool:
    """Declare the GPUs if the node lacks them. Returns whether it wrote."""
    declared = {GPU_RESOURCE: str(LOGICAL_GPUS)}
    status = api.get(f"/api/v1/nodes/{node}")["status"]
    if status.get("capacity", {}).get(GPU_RESOURCE) == status.get(
        "allocatable", {},
    ).get(GPU_RESOURCE) == declared[GPU_RESOURCE]:
        return False
    api.patch(f"/api/v1/nodes/{node}/status", {"status": {"capacity": declared, "allocatable": declared}})
    return True


def main() -> None:
    api, node = Api.from_kubeconfig(Path(sys.argv[1])), sys.argv[2]
    while True:
        try:
            if keep(api, node):
                print(f"declared {LOGICAL_GPUS} of {GPU_RESOURCE}", flush=True)
        except ApiError as error:
            print(error, flush=True)
        time.sleep(1)


if __name__ == "__main__":
    main()
