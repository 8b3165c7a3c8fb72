"""`rlhf_worker run` as in a pod, on a Ray of its own and against an API server of a test's.

    python -m tests.worker.in_pod <run.yaml> <api> <account> <port>
"""

import os
import sys
from pathlib import Path
from typing import Any

import httpx

from rlhf_api.run import RunConfig
from rlhf_worker import run
from rlhf_worker.local import local_ray
from rlhf_worker.pod import job
from rlhf_worker.pod.kept_log import kept_log
from rlhf_worker.pod.notices import Notices


def main(path: Path, api: str, account: Path, port: int) -> int:
    job.ACCOUNT = account
    place: dict[str, Any] = {
        "in_cluster_client": lambda: httpx.Client(base_url=api, timeout=5.0, trust_env=False),
        "listening": lambda heard: Notices(heard, os.environ["RAY_AUTH_TOKEN"], port),
        "_connect": lambda config, reporter, stop: None,  # the Ray of this process
    }
    vars(run).update(place)
    with local_ray(RunConfig.read(path), verbose=False), kept_log() as log:
        return run.guarded(lambda: run.run(path, log))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
