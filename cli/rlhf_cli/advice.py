"""What to do about a reason of a condition: the one source of `kubectl rlhf status` and of docs/reasons.md, which
`make generate` prints. A test holds its reasons against the operator's and the worker's, both ways. Pure.
"""

from dataclasses import dataclass

from rlhf_api.status import ConditionType
from rlhf_client.job import Job


@dataclass(frozen=True, slots=True)
class Advice:
    """`means` and `do`: sentences without an end. Without `do` there is nothing to be done."""

    of: tuple[ConditionType, ...]
    means: str
    do: str = ""


def _about(of: ConditionType, rows: dict[str, tuple[str, str] | str]) -> dict[str, Advice]:
    """Of one condition: reason to (means, do), or to means alone."""
    return {
        reason: Advice((of,), told) if isinstance(told, str) else Advice((of,), *told) for reason, told in rows.items()
    }


ADVICE: dict[str, Advice] = {
    **_about(ConditionType.ACCEPTED, {
        "Accepted": "the spec is valid",
        "UnknownFieldsIgnored": ("the CRD is newer than the operator, which leaves out what the message names",
            "upgrade the operator: its CRD is newer than it is"),
        "MissingReference": ("the queue that the spec names is not there, or Kueue is not",
            "make the object that the message names, in the job's namespace"),
        "NameConflict": ("an object of somebody else has a name that the job needs",
            "remove the object that has the name already, or name the job otherwise"),
        "Refused": ("the API server does not take what the operator planned: an edit that a job at work cannot follow, "
            "a quota, or an admission policy",
            "undo the edit or mend the policy that the message names; edits that need other pods want a suspended job"),
        "KubeRayNotInstalled": ("the cluster has no RayCluster of ray.io/v1; the job starts by itself once it has",
            "install KubeRay 1.6 or newer (helm install kuberay-operator kuberay/kuberay-operator)"),
        "KubeRayTooOld": ("the RayCluster CRD lacks fields that the job needs; the message names them",
            "upgrade KubeRay to 1.6 or newer, and its CRDs, which Helm leaves as they are"),
    }),
    "InvalidSpec": Advice((ConditionType.ACCEPTED, ConditionType.FAILED),
        "the spec has a fault: the operator found it, or the driver did (exit code 64); of Failed: no edit can mend it",
        "correct the field that the message names, and run it as a new job"),
    **_about(ConditionType.QUOTA_RESERVED, {
        "Reserved": "the queue has admitted the job",
        "WaitingForQuota": ("the queue has not admitted the job yet; waiting counts for no deadline",
            "wait, or free quota of the queue"),
        "NoMatchingFlavor": ("no flavor of the ClusterQueue fits the pods",
            "no flavor of the queue fits the pods: look at their nodeSelector and resources"),
        "ExceedsMaxQuota": ("the job asks for more than the queue can ever give",
            "ask for less (trainer.gpus, rollout.engines), or raise the queue's quota: it can never fit"),
        "TopologyPlacementFailed": ("Kueue finds no place for the pods in the topology that is asked for",
            "free whole nodes or racks, or ask for a wider topology by the labels of spec.pods"),
        "Misconfigured": ("the queue itself is not right", "correct the queue that spec.queue.name names"),
        "Evicted": ("the queue took the quota back: the driver has saved, and the job waits again",
            "wait; the message is Kueue's own"),
        "KueueNotReacting": ("Kueue made no Workload for the RayCluster within a minute",
            "look whether Kueue runs, and whether its integration for RayClusters is on"),
    }),
    "Preempted": Advice((ConditionType.QUOTA_RESERVED, ConditionType.RUNNING),
        "pods, or the quota, were taken for others; the run goes on from its checkpoint, and it costs no restart",
        "wait; if it happens often, give the job a higher priority, and save more often (checkpoint.everySteps)"),
    **_about(ConditionType.CLUSTER_READY, {
        "AllPodsReady": "the head and every worker pod are ready",
        "NotCreated": "there is no RayCluster yet",
        "Creating": "the pods are being made, and nothing is amiss with them so far",
        "WaitingForOldPods": "pods of the RayCluster before this one are still ending; the operator ends those that "
            "nobody else does",
        "WaitingForOldObjects": ("an object of an earlier job of this name has not gone yet",
            "wait; if it stays, somebody's finalizer holds the object that the message names: remove it"),
        "Suspended": "the queue holds the RayCluster back: QuotaReserved says why",
        "ImagePullFailed": ("a node cannot pull an image",
            "correct spec.image in a new job, or give the pull secret under spec.pods"),
        "ContainerConfigFailed": ("a container cannot be made, mostly for a ConfigMap or Secret that is missing",
            "make the ConfigMap or Secret that spec.pods names"),
        "ContainerCrashing": ("a container other than the driver ends again and again",
            "read the container's last words in the message"),
        "InvalidRayCluster": ("KubeRay does not take the RayCluster",
            "KubeRay refuses what spec.pods makes of its pods: the message is its own"),
        "QuotaExceeded": ("a ResourceQuota refuses the pods",
            "raise the ResourceQuota of the namespace, or ask for less"),
        "ReplicaFailure": ("the API server refuses the pods", "look at the admission policy that the message names"),
        "Unschedulable": ("no node has room for a pod; the message is the scheduler's",
            "no node has room: free GPUs, ask for fewer, or correct nodeSelector and tolerations"),
        "WaitingForGang": ("the pods wait for each other, by the gates of their scheduler",
            "wait; if it stays, look at the scheduler that set the gates"),
        "FailedMount": ("a volume does not come to its node", "look at the volume that the message names"),
        "FailedAttachVolume": ("a volume cannot be attached to the node",
            "look at the volume that the message names: another node holds it (ReadWriteOnce), or its driver is down"),
        "FailedCreatePodSandBox": ("the node's network or runtime does not make the pod",
            "look at the node that the message names: its network plugin or its container runtime"),
        "HeadNotReady": ("Ray in the head pod was ready and is not", "wait: it is started again; if it stays, read the "
            "head's log (kubectl rlhf logs NAME --pod HEAD_POD)"),
        "WorkersMissing": ("not all worker pods have come, or one that was ready is not",
            "wait; if it stays, look at the pods that the message counts (kubectl describe pod)"),
        "Deleted": "the RayCluster is being deleted",
    }),
    **_about(ConditionType.RUNNING, {
        "DriverRunning": "the driver trains",
        "DriverPending": "the driver waits for its pod",
        "DriverStarting": "the driver loads model and engines: status.progress.detail tells how far it is",
        "DriverStopped": "the job is suspended or being deleted",
        "AppFailed": ("the driver ended with an error, and is started again",
            "read the last failure's own words; an error that comes back ends the job after runPolicy.backoffLimit"),
        "OOMKilled": ("a container was killed for memory of its node", "raise the memory of the container that the "
            "message names (spec.pods.trainer.resources, spec.pods.driver.resources), or lower spec.rewards[].workers"),
        "HeadLost": ("Ray's head process, the head pod or the RayCluster went away; another one is made",
            "nothing if it happened once; else look at the head's node and its memory"),
        "NodeLost": ("a node took pods with it, or a worker pod was deleted; it is made anew",
            "nothing if it happened once; else look at the node that status.failures names"),
    }),
    "Stalled": Advice((ConditionType.PROGRESSING, ConditionType.RUNNING),
        "the run did not get further within runPolicy.stallTimeoutSeconds; its head pod is replaced",
        "kubectl rlhf logs tells where it stands; steps that take so long need a longer runPolicy.stallTimeoutSeconds"),
    "Finished": Advice((ConditionType.RUNNING, ConditionType.PROGRESSING, ConditionType.CLUSTER_READY),
        "the job has ended: Complete or Failed says how"),
    **_about(ConditionType.PROGRESSING, {
        "WarmingUp": "before the first finished step of this driver",
        "StepAdvancing": "steps are finishing",
    }),
    "NoReportYet": Advice((ConditionType.PROGRESSING, ConditionType.PREFLIGHT_PASSED, ConditionType.WEIGHTS_IN_SYNC),
        "the driver has not come so far, or does not run"),
    **_about(ConditionType.PREFLIGHT_PASSED, {
        "ChecksPassed": "every check before the first step passed: the message has their times",
        "Spec": ("rollout.engineArgs or weightSync.backend is wrong by itself",
            "correct the field that the message names, and run it as a new job"),
        "Data": ("prompts, the code of rewards or telemetry cannot be used",
            "correct the file, line or package that the message names"),
        "EngineArguments": ("vLLM, or the environment's class, refuses what it is given",
            "correct the key of rollout.engineArgs, or the field, that the message names"),
        "Join": ("the ranks do not find each other",
            "look at the network between the pods, and at what torch says in the trainer's log"),
        "Devices": ("torch sees no GPU, or two ranks see the same one",
            "the device plugin gives no GPU or gives one out twice: look at the node"),
        "SharedMemory": ("/dev/shm is too small for several ranks in a pod",
            "mount a larger /dev/shm: an emptyDir of medium Memory"),
        "Reduce": ("an all-reduce over the ranks did not end",
            "look at the network between the pods (NCCL_DEBUG=INFO in spec.pods.trainer.env tells)"),
        "SharedGPU": ("a process of the pod cannot open a GPU's memory of another one, which Colocated needs",
            "look at the container's security context and the GPU driver, or set placement.mode to Separated"),
        "Model": ("a role's config or weights cannot be used",
            "correct the path or the file that the message names; a gated one needs HF_TOKEN in spec.pods.trainer.env"),
        "Memory": ("what trainer and engine hold at the worst moment is more than the GPU has",
            "lower what the message names: placement.fractions.rollout, or set trainer.offload, or more trainer.gpus"),
        "CheckpointPath": ("checkpoint.path cannot be written, is not the same for every rank, or has no room",
            "mount a volume that every trainer pod can write (spec.checkpoint.claim makes one)"),
        "Tokenizer": ("a tokenizer does not load, or is not the policy's where it must be",
            "use a critic and a reference of the policy's own family, or mend the files that the message names"),
        "Environments": ("the environment cannot be loaded", "mend the code: its traceback is in the message"),
        "Rewards": ("a reward gave no number for the first prompt",
            "mend the reward that the message names: its own error is there; of a service, see that the pods reach it"),
    }),
    **_about(ConditionType.WEIGHTS_IN_SYNC, {
        "InSync": "the engines hold the trainer's weights",
        "SyncFailed": ("a weight sync failed; engines that hold a part serve nothing",
            "the run tries again by itself; look at the message if it stays"),
    }),
    **_about(ConditionType.CHECKPOINT_AVAILABLE, {
        "Saved": "status.progress.checkpoint is the newest whole one",
        "NoneYet": "no checkpoint was due so far (checkpoint.everySteps)",
        "SaveFailed": ("no save has succeeded so far; training goes on",
            "free room where checkpoint.path is, or lower checkpoint.keep"),
        "LastSaveFailed": ("the last save failed, and an older checkpoint is whole; training goes on",
            "free room where checkpoint.path is, or lower checkpoint.keep"),
        "Ephemeral": ("the checkpoints lie in the trainer's pod and go with it",
            "checkpoints die with the trainer's pod: set spec.checkpoint.claim in the next job"),
    }),
    **_about(ConditionType.SUSPENDED, {
        "UserRequested": "spec.suspend is true, and nothing is held",
        "NotSuspended": "spec.suspend is false, or the job has ended",
        "Stopping": "the driver finishes its step and saves, or pods are going",
        "WouldLoseCheckpoint": ("suspending would lose the finished steps, so the run goes on",
            "suspend is refused: set spec.checkpoint.ephemeral if losing the checkpoints is meant"),
        "FinalSave": "the job is being deleted and saves first (runPolicy.finalSave)",
    }),
    **_about(ConditionType.DEGRADED, {
        "Healthy": "nothing is amiss",
        "PodEnding": "a pod is being deleted, by a drain or for another's sake: the driver is told, and saves",
        "WorkerRestarting": "Ray in a worker pod is being started again",
        "EngineRestarting": ("an engine was lost and is being started anew, while the others serve",
            "wait; if it comes back again and again, read its log (kubectl rlhf logs NAME --of engines)"),
        "ReconcileError": ("a pass of the operator ended with an error, and is tried again",
            "read the message: a right is missing, or the API server does not answer; the operator's log has more"),
    }),
    **_about(ConditionType.RESOURCES_RELEASED, {
        "PodsGone": "the job holds no pods",
        "InUse": "the job holds its pods",
        "Terminating": "the pods are going",
        "RetainedByPolicy": "runPolicy.cleanup keeps the pods for a look: delete the job to release them",
    }),
    **_about(ConditionType.COMPLETE, {"JobSucceeded": "the driver finished all steps"}),
    **_about(ConditionType.FAILED, {
        "InvalidData": ("the driver refused data or a checkpoint (exit code 65)",
            "correct the file and line that the message names, and run it as a new job"),
        "BackoffLimitExceeded": ("more than runPolicy.backoffLimit restarts without a finished step in between",
            "the last failure is why: mend it, and run it as a new job (it goes on from its checkpoint where "
            "checkpoint.path is kept)"),
        "DeadlineExceeded": ("it ran longer than runPolicy.activeDeadlineSeconds",
            "raise runPolicy.activeDeadlineSeconds in a new job on the same checkpoint.path"),
        "ProvisioningDeadlineExceeded": ("not all pods were ready in time; ClusterReady said why",
            "free GPUs, or raise runPolicy.provisioningDeadlineSeconds"),
        "ReprovisioningDeadlineExceeded": ("pods that were lost were not ready again in time",
            "free GPUs, or raise runPolicy.reprovisioningDeadlineSeconds"),
    }),
}  # fmt: skip


def what_to_do(job: Job) -> list[str]:
    """`reason: advice` of each trouble that has one, and of a job that nobody looks after."""
    if not job.phase:
        return ["no operator has looked at the job: is it running (kubectl -n rlhf-system get pods), and does it watch "
            "this namespace?"]
    reasons = dict.fromkeys([job.status.reason or "", *(one.reason for one in job.troubles())])
    return [f"{reason}: {ADVICE[reason].do}" for reason in reasons if reason in ADVICE and ADVICE[reason].do]
