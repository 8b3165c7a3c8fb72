"""``python -m hack.cluster.kuberay_standin --kubeconfig <file>``: serve RayClusters in place of KubeRay."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from hack.cluster.kube import Api
from hack.cluster.kuberay_standin import controller


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="a kubeconfig of the embedded cluster")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    controller.log.warning("this is a STAND-IN for the KubeRay operator: it keeps its contract for RayClusters, and "
        "is not KubeRay")
    controller.run(Api.from_kubeconfig(arguments.kubeconfig))


if __name__ == "__main__":
    main()
