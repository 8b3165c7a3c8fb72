"""Whether the job can be run as it is written, before anything is made."""

from rlhf_api.overrides import override_problems
from rlhf_api.rules import MUTABLE
from rlhf_operator.decide.facts import Facts
from rlhf_operator.decide.verdict import Verdict, no, unknown, yes
from rlhf_operator.observed import Job


def accepted(f: Facts) -> Verdict:
    if problems := problems_of(f.job):
        return no("InvalidSpec", "; ".join(problems))
    if not f.observed.kuberay:
        return unknown("KubeRayNotInstalled", "the cluster has no RayCluster CRD: install KubeRay 1.6 or later")
    return _queue(f) or yes("Accepted", "the spec is valid")


def problems_of(job: Job) -> tuple[str, ...]:
    return job.problems if job.parsed is None else override_problems(job.parsed.spec)


def hopeless(job: Job) -> bool:
    """Some problem lies in a field that cannot change while the job lives."""
    fixable = tuple(f"spec.{name}" for name in MUTABLE)
    return any(not problem.startswith(fixable) for problem in job.problems)


def _queue(f: Facts) -> Verdict | None:
    queue, asked = f.observed.queue, f.spec.queue
    if queue is None or asked is None:
        return None
    if not queue.installed:
        return no("MissingReference", f"spec.queue.name: this cluster has no Kueue (0.15 or later), so there is no queue {asked.name!r}: install it, or delete the job and create it without spec.queue")
    if not queue.found:
        return no("MissingReference", f"spec.queue.name: there is no LocalQueue {asked.name!r} in namespace {f.job.meta.namespace}: create it, or name one that exists in a new job")
    return None
