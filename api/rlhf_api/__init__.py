"""The contract between user, operator and worker: spec, status, run config, progress.

Law: imports pydantic and the standard library (yaml for files), nothing of kopf, kubernetes, ray, torch or vllm, and
does no I/O besides what `load_job` and `RunConfig.read` are asked for.
"""

GROUP = "rlhf.dev"
VERSION = "v1alpha1"
KIND = "RLHFJob"
PLURAL = "rlhfjobs"
API_VERSION = f"{GROUP}/{VERSION}"
