"""From a raw object to a job, or to the list of everything that is wrong with it."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rlhf_api.job import RLHFJob
from rlhf_api.rules import violations


class InvalidJob(Exception):
    """The object is no valid RLHFJob. `problems` name the field and the fix, one each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def parse_job(raw: dict[str, Any]) -> RLHFJob:
    """Schema first, then the rules that span fields. Raises InvalidJob."""
    try:
        job = RLHFJob.model_validate({key: raw[key] for key in ("apiVersion", "kind", "metadata", "spec", "status") if key in raw}, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidJob([_problem(list(e["loc"]), e["type"], e["msg"]) for e in error.errors()]) from None
    if problems := violations(job):
        raise InvalidJob(problems)
    return job


def _problem(loc: list[int | str], kind: str, message: str) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    return f"{path}: unknown field: remove it or correct its name" if kind == "extra_forbidden" else f"{path}: {message}"


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
