"""An RLHFJob as the cluster has it: what this client understands of it typed, what it does not, named."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pydantic import ValidationError

from rlhf_api.progress import Progress
from rlhf_api.status import Condition, Failure, RLHFJobStatus
from rlhf_api.without import Loc, without

Raw = dict[str, Any]
ENDED = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class Job:
    """`raw` is the whole object. `not_understood`: fields of the status that a newer operator wrote in another form."""

    raw: Raw
    status: RLHFJobStatus
    not_understood: tuple[str, ...] = ()

    @classmethod
    def of(cls, raw: Raw) -> "Job":
        """Never raises: what cannot be read is left out, and named."""
        status, lost = _status(raw.get("status") or {}, ())
        return cls(raw, status, lost)

    @property
    def name(self) -> str:
        return str(self.raw["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.raw["metadata"].get("namespace", "default"))

    @property
    def uid(self) -> str:
        return str(self.raw["metadata"].get("uid", ""))

    @property
    def spec(self) -> Raw:
        found: Raw = self.raw.get("spec") or {}
        return found

    @property
    def phase(self) -> str:
        """As the operator wrote it, also one that this client does not know. Empty: no operator has seen the job."""
        status = self.raw.get("status")
        return str(status.get("phase") or "") if isinstance(status, dict) else ""

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    @property
    def progress(self) -> Progress:
        return self.status.progress or Progress()

    @property
    def last_failure(self) -> Failure | None:
        return next(iter(self.status.failures), None)

    def condition(self, kind: str) -> Condition | None:
        return next((one for one in self.status.conditions if one.type == kind), None)

    def troubles(self) -> Iterator[Condition]:
        """Conditions that tell of something amiss, the one that set the phase first."""
        bad = {"Degraded": "True", "Failed": "True"}
        quiet = ("Suspended", "Complete", "ResourcesReleased", "Failed", "Degraded")
        found = [one for one in self.status.conditions
            if one.status == bad.get(one.type) or (one.type not in quiet and one.status != "True")]
        yield from sorted(found, key=lambda one: one.reason != self.status.reason)


def _status(raw: Any, lost: tuple[str, ...]) -> tuple[RLHFJobStatus, tuple[str, ...]]:
    if not isinstance(raw, dict):
        return RLHFJobStatus(), ("status",)
    try:
        return RLHFJobStatus.model_validate(raw), lost
    except ValidationError as error:
        wrong = {_place(one["loc"], raw) for one in error.errors(include_url=False, include_input=False)}
        # Of a list the last element goes first, so that the numbers of the others stay right.
        left = reduce(without, sorted(wrong, key=str, reverse=True), raw)
        return _status(left, (*lost, *(".".join(map(str, ("status", *loc))) for loc in sorted(wrong, key=str))))


def _place(loc: Loc, raw: Any) -> Loc:
    """What to leave out: an element of a list goes as a whole, and so does a part that lacks something."""
    node, place = raw, list[int | str]()
    for part in loc:
        if not isinstance(node, dict | list) or (isinstance(node, dict) and part not in node):
            break
        place.append(part)
        if isinstance(node, list):
            break
        node = node[part]
    return tuple(place) or loc[:1]
