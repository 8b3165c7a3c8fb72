"""The number of this driver's head pod, by the operator: it fences a checkpoint's writers (docs/decisions/0007)."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from rlhf_worker.errors import NotNumbered
from rlhf_worker.pod.job import POD_UID, OwnJob, Raw, attempt_of, ended
from rlhf_worker.stop import Ended, Stop

ANSWER_SECONDS = 600.0  # an operator that is replaced, or waits to lead, is back long before
POLL_SECONDS = 1.0

Found = TypeVar("Found")


def first_look(own: OwnJob, stop: Stop) -> Raw:
    """The job as it is when the driver starts. Raises Ended, Terminated, NotNumbered."""
    return _poll(own, stop, lambda raw: raw, "the API server")


def number(own: OwnJob, stop: Stop, pod_uid: str) -> int:
    """As soon as the operator has given it. 0 under one that numbers none. Raises Ended, Terminated, NotNumbered."""
    if not pod_uid:
        print(
            f"{POD_UID} is not set: this driver has no number, and nothing fences its checkpoints", file=sys.stderr,
            flush=True,
        )
        return 0
    return _poll(
        own,
        stop,
        lambda raw: attempt_of(raw, pod_uid),
        f"the operator to give pod {pod_uid} its number (status.record.attempt)",
    )


def _poll(own: OwnJob, stop: Stop, look: Callable[[Raw], Found | None], what: str) -> Found:
    end, told = time.monotonic() + ANSWER_SECONDS, ""
    where = "the operator's log (kubectl -n rlhf-system logs deploy/rlhf-operator)"
    while True:
        stop.check()
        trouble = ""
        try:
            raw = own.read()
            if (why := ended(raw, own.job)) or raw is None:
                raise Ended(why)
            if (found := look(raw)) is not None:
                return found
        except (httpx.HTTPError, OSError, ValueError) as error:
            trouble = f": {error}"
        words = f"waiting for {what}{trouble}"
        if words != told:
            print(words, file=sys.stderr, flush=True)
            told = words
        if time.monotonic() > end:
            raise NotNumbered(f"no answer in {ANSWER_SECONDS:g} s while {words}: look at {where}")
        stop.wait(POLL_SECONDS)
