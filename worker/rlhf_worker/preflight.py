"""Before the first step and before anything heavy is loaded: every check by name, in the actors that will need what it tries, all within a minute.

The driver runs them one after the other, so that one that hangs is known by its name.
"""

import time
from collections.abc import Sequence

from ray.actor import ActorHandle

from rlhf_api.progress import Preflight
from rlhf_worker.calls import call, call_all, root_cause
from rlhf_worker.progress import Reporter
from rlhf_worker.stop import Ended, Terminated
from rlhf_worker.trainer.checks import CHECKS

DEADLINE_SECONDS = 60.0


def preflight(groups: Sequence[Sequence[ActorHandle]], feed: ActorHandle, reporter: Reporter) -> None:
    """groups: the ranks of each process group, joined; feed: opened. Raises BadSpec, PreflightFailed, DeadlineExceeded, or what a check raised."""
    start, done = time.monotonic(), []
    ranks = [rank for group in groups for rank in group]
    reporter.update(detail="preflight")
    for name in (*CHECKS, "Rewards"):
        left, began = DEADLINE_SECONDS - (time.monotonic() - start), time.monotonic()
        try:
            if name == "Rewards":
                call(feed, "try_rewards", deadline_seconds=left, what="preflight check Rewards")
            else:
                call_all(ranks, "preflight", name, deadline_seconds=left, what=f"preflight check {name}")
        except (Terminated, Ended):
            raise
        except Exception as error:
            cause = root_cause(error)
            reporter.update(preflight=Preflight(failed=name, message=f"{type(cause).__name__}: {cause}"[:1000], seconds=f"{time.monotonic() - start:.1f}"))
            raise
        done.append(f"{name} {time.monotonic() - began:.1f} s")
    words = ", ".join(done)
    reporter.update(preflight=Preflight(message=words, seconds=f"{time.monotonic() - start:.1f}"))
    print(f"preflight: {words}", flush=True)
