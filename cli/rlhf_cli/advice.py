"""What to do about a reason of a condition or a failure. Pure; docs/status.md explains each, and a test compares."""

from rlhf_client.job import Job

ADVICE: dict[str, str] = {
    # Accepted
    "InvalidSpec": "correct the field that the message names, and run it as a new job",
    "MissingReference": "make the object that the message names, in the job's namespace",
    "NameConflict": "remove the object that has the name already, or name the job otherwise",
    "Refused": "undo the edit that the message names, or suspend the job first",
    "UnknownFieldsIgnored": "upgrade the operator: its CRD is newer than it is",
    "KubeRayNotInstalled": "install KubeRay 1.6 or newer (helm install kuberay-operator kuberay/kuberay-operator)",
    "KubeRayTooOld": "upgrade KubeRay to 1.6 or newer, and its CRDs, which Helm leaves as they are",
    # QuotaReserved
    "WaitingForQuota": "wait, or free quota of the queue",
    "NoMatchingFlavor": "no flavor of the queue fits the pods: look at their nodeSelector and resources",
    "ExceedsMaxQuota": "ask for less (trainer.gpus, rollout.engines), or raise the queue's quota: it can never fit",
    "Misconfigured": "correct the queue that spec.queue.name names",
    "KueueNotReacting": "look whether Kueue runs, and whether its integration for RayClusters is on",
    # ClusterReady
    "ImagePullFailed": "correct spec.image in a new job, or give the pull secret under spec.pods",
    "ContainerConfigFailed": "make the ConfigMap or Secret that spec.pods names",
    "ContainerCrashing": "read the container's last words in the message",
    "InvalidRayCluster": "KubeRay refuses what spec.pods makes of its pods: the message is its own",
    "QuotaExceeded": "raise the ResourceQuota of the namespace, or ask for less",
    "ReplicaFailure": "look at the admission policy that the message names",
    "Unschedulable": "no node has room: free GPUs, ask for fewer, or correct nodeSelector and tolerations",
    "WaitingForOldObjects": "somebody's finalizer holds the object that the message names: remove it",
    "FailedMount": "look at the volume that the message names",
    "FailedAttachVolume": "look at the volume that the message names",
    # PreflightPassed
    "Memory": "lower what the message names: placement.fractions.rollout, or set trainer.offload, or more trainer.gpus",
    "CheckpointPath": "mount a volume that every trainer pod can write (spec.checkpoint.claim makes one)",
    "SharedMemory": "mount a larger /dev/shm: an emptyDir of medium Memory",
    "Devices": "the device plugin gives one GPU out twice: look at the node",
    "Reduce": "look at the network between the pods (NCCL_DEBUG=INFO in spec.pods.trainer.env tells)",
    # others
    "SyncFailed": "the run tries again by itself; look at the message if it stays",
    "SaveFailed": "free room where checkpoint.path is, or lower checkpoint.keep",
    "LastSaveFailed": "free room where checkpoint.path is, or lower checkpoint.keep",
    "Ephemeral": "checkpoints die with the trainer's pod: set spec.checkpoint.claim in the next job",
    "WouldLoseCheckpoint": "suspend is refused: set spec.checkpoint.ephemeral if losing the checkpoints is meant",
    "Stalled": "kubectl rlhf logs tells where it stands; the operator restarts it after stallTimeoutSeconds",
    # Failed
    "InvalidData": "correct the file and line that the message names, and run it as a new job",
    "BackoffLimitExceeded": "the last failure below is why: mend it, and run it as a new job (it goes on from its "
        "checkpoint where checkpoint.path is kept)",
    "DeadlineExceeded": "raise runPolicy.activeDeadlineSeconds in a new job on the same checkpoint.path",
    "ProvisioningDeadlineExceeded": "free GPUs, or raise runPolicy.provisioningDeadlineSeconds",
    "ReprovisioningDeadlineExceeded": "free GPUs, or raise runPolicy.reprovisioningDeadlineSeconds",
}


def what_to_do(job: Job) -> list[str]:
    """`reason: advice` of each trouble that has one, and of a job that nobody looks after."""
    if not job.phase:
        return ["no operator has looked at the job: is it running (kubectl -n rlhf-system get pods), and does it watch "
            "this namespace?"]
    reasons = dict.fromkeys([job.status.reason or "", *(one.reason for one in job.troubles())])
    return [f"{reason}: {ADVICE[reason]}" for reason in reasons if reason in ADVICE]
