"""How long the driver and its actors wait for one another: all of it follows from spec.runPolicy.stallTimeoutSeconds.

The operator replaces the head of a run that gets no further for that long. Who waits gives up before, so that the run's
last words say on what. Waits that the spec names by themselves (rollout.deadlineSeconds, weightSync.deadlineSeconds,
timeouts of rewards) are not here, nor those of a machine's own doings, which take seconds whatever the model.
"""

from rlhf_api.run import RunConfig

SILENT_SECONDS = 300.0  # more than any step of an engine takes, also the first of a kind, for which vLLM may compile


def work_seconds(config: RunConfig) -> float:
    """For one call: a start, a pass over a step's samples, its rewards, a checkpoint's files, an export."""
    return 0.9 * config.stall_timeout_seconds


def collective_seconds(config: RunConfig) -> float:
    """For one rank in a collective of a call: it tells where it waits, before the call ends without words."""
    return work_seconds(config) / 2


def silent_seconds(config: RunConfig) -> float:
    """For an engine's core that neither answers nor finishes anything: past it, it hangs."""
    return min(SILENT_SECONDS, work_seconds(config) / 4)


def sleep_seconds(config: RunConfig) -> float:
    """For engines to lend their memory: at first they may have to pin as much of the host's as the weights take."""
    return min(SILENT_SECONDS, work_seconds(config) / 4)
