"""Before the first step and before anything heavy is loaded: every check by name, in the actors that need what it tries.

The driver runs them one after the other, so that one that hangs is known by its name. All have a minute together, but
for the rewards: the first call of one may load a model, and has the time that its own spec gives it.
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
REPLY_SECONDS = 10.0  # beyond a reward's own deadline, whose error says more


def preflight(groups: Sequence[Sequence[ActorHandle]], feed: ActorHandle, reporter: Reporter) -> None:
    """groups: the ranks of each process group, joined; feed: opened. Raises BadSpec, PreflightFailed, DeadlineExceeded, or what a check raised."""
    start, done = time.monotonic(), []
    ranks = [rank for group in groups for rank in group]
    reporter.update(detail="preflight")
    patience = call(feed, "patience", deadline_seconds=DEADLINE_SECONDS, what="preflight")
    for name in (*CHECKS, *(f"rewards[{reward}]" for reward in patience)):
        left, began = DEADLINE_SECONDS - (time.monotonic() - start), time.monotonic()
        reward = name.removeprefix("rewards[").removesuffix("]")
        try:
            if reward in patience:
                seconds = patience[reward] + REPLY_SECONDS
                call(feed, "try_reward", reward, deadline_seconds=seconds, what=f"preflight check {name}")
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
