"""The ConfigMap with the resolved run, which the driver reads."""

from typing import Any

from rlhf_api.job import RLHFJob
from rlhf_api.run import resolve
from rlhf_operator.names import run_config_name

Raw = dict[str, Any]
FILE = "run.yaml"


def run_config(job: RLHFJob, metadata: Raw) -> Raw:
    return {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {**metadata, "name": run_config_name(job.metadata.name)},
        "data": {FILE: resolve(job).dump()},
    }
