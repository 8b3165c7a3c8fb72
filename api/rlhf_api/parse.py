"""From a raw object to a job, or to the list of everything that is wrong with it."""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf_api.job import RLHFJob
from rlhf_api.overrides import override_problems
from rlhf_api.rules import violations
from rlhf_api.without import Loc, without

Raw = dict[str, Any]
KEYS = ("apiVersion", "kind", "metadata", "spec", "status")
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


class InvalidJob(Exception):
    """The object is no valid RLHFJob. `problems` name the field and the fix, one each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Lenient:
    """What could be read of an object. With problems the job must not be run as it is; without a job not even its shape
    is right.
    """

    job: RLHFJob | None
    ignored: list[str]
    problems: list[str]


def parse_job(raw: Raw) -> RLHFJob:
    """Schema first, then the rules that span fields. Raises InvalidJob."""
    read = parse_lenient(raw)
    unknown = [f"{path}: unknown field: remove it or correct its name" for path in read.ignored]
    if read.job is None or unknown or read.problems:
        raise InvalidJob([*read.problems, *unknown])
    return read.job


def parse_lenient(raw: object) -> Lenient:
    """Never raises. Unknown fields, which a newer CRD may have brought, are left out and named by their paths."""
    if not isinstance(raw, dict):
        return Lenient(None, [], ["an RLHFJob is a mapping with apiVersion, kind, metadata and spec"])
    return _read({key: raw[key] for key in KEYS if key in raw}, [])


def _read(raw: Raw, ignored: list[str]) -> Lenient:
    try:
        job = RLHFJob.model_validate(raw, by_alias=True, by_name=False)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        if unknown := [one["loc"] for one in errors if one["type"] == "extra_forbidden"]:
            return _read(reduce(without, unknown, raw), [*ignored, *map(_path, unknown)])
        return Lenient(None, ignored, [f"{_path(one['loc'])}: {one['msg']}" for one in errors])
    return Lenient(job, ignored, [*violations(job), *override_problems(job.spec), *_queue_label(job)])


def _queue_label(job: RLHFJob) -> list[str]:
    """A RayCluster gets the job's labels: Kueue would queue it, and the job would not know that it waits."""
    if job.spec.queue is not None or QUEUE_LABEL not in job.metadata.labels:
        return []
    return [f"metadata.labels: remove {QUEUE_LABEL}: the queue of an RLHFJob is spec.queue"]


def _path(loc: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def load_job(path: Path) -> RLHFJob:
    """The one RLHFJob in a YAML file. Raises InvalidJob, also for a file that is no YAML or holds none or several."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text()) if d]
    except OSError as error:
        raise InvalidJob([f"{path}: {error.strerror}"]) from None
    except yaml.YAMLError as error:
        raise InvalidJob([f"{path}: not YAML: {error}"]) from None
    jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == "RLHFJob"]
    if len(jobs) != 1:
        raise InvalidJob([f"{path}: holds {len(jobs)} RLHFJobs, one is needed"])
    return parse_job(jobs[0])
