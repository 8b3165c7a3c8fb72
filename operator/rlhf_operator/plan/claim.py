"""The PersistentVolumeClaim of checkpoint.claim. Pure."""

from typing import Any

from rlhf_api.job import ClaimSpec, RLHFJob
from rlhf_operator.names import claim_name

Raw = dict[str, Any]


def checkpoint_claims(job: RLHFJob, metadata: Raw) -> tuple[Raw, ...]:
    """None or one. What is kept has no owner: it outlives the job, and a later job of the same name takes it up."""
    asked = job.spec.checkpoint.claim
    if asked is None:
        return ()
    lasting = {key: value for key, value in metadata.items() if key != "ownerReferences"}
    return ({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {**(metadata if asked.on_delete == "Delete" else lasting), "name": claim_name(job.metadata.name)},
        "spec": _spec(asked),
    },)


def _spec(asked: ClaimSpec) -> Raw:
    """An absent class is the cluster's default; an empty one would mean a volume without a class."""
    storage = {"storageClassName": asked.storage_class_name} if asked.storage_class_name else {}
    return {"accessModes": [asked.access_mode], **storage, "resources": {"requests": {"storage": asked.size}}}
