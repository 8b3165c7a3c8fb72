"""Whether the job can be run as it is written, before anything is made."""

from rlhf_api.rules import MUTABLE, NEVER
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.verdict import Verdict, no, unknown, yes
from rlhf_operator.observed import Job

WORDS_MAX = 1024


def accepted(f: Facts) -> Verdict:
    if f.job.problems:
        return no("InvalidSpec", "; ".join(f.job.problems)[:WORDS_MAX])
    if not f.observed.kuberay:
        return unknown("KubeRayNotInstalled", "the cluster has no RayCluster CRD: install KubeRay 1.6 or later")
    return _queue(f) or _ignored(f) or yes("Accepted", "the spec is valid")


def hopeless(job: Job) -> bool:
    """Some problem lies in a field that the job, as it is, cannot change."""
    mutable, never = (tuple(f"spec.{name}" for name in names) for names in (MUTABLE, NEVER))
    mutable = (*mutable, "metadata.labels")
    if job.suspend:
        return any(problem.startswith(never) for problem in job.problems)
    return any(not problem.startswith(mutable) for problem in job.problems)


def _queue(f: Facts) -> Verdict | None:
    queue, asked = f.observed.queue, f.job.queue
    if queue is None or asked is None:
        return None
    if not queue.installed:
        words = (f"this cluster has no Kueue (0.15 or later), so there is no queue {asked.name!r}: install it, or "
            "remove spec.queue")
        return no("MissingReference", f"spec.queue.name: {words}")
    if not queue.found:
        words = (f"there is no LocalQueue {asked.name!r} in namespace {f.job.meta.namespace}: create it, or name one "
            "that exists")
        return no("MissingReference", f"spec.queue.name: {words}")
    return None


def _ignored(f: Facts) -> Verdict | None:
    """Of a CRD that is newer than this operator."""
    if not f.job.ignored:
        return None
    return yes(
        "UnknownFieldsIgnored", f"this operator does not know, and leaves out: {', '.join(f.job.ignored)}"[:WORDS_MAX]
    )
