"""READ FIRST. The driver's life, from run config to exit code.

    read the config -> connect to Ray -> reserve the GPUs -> start feed, trainer and engines side by side -> prove who sits where
    -> restore the newest checkpoint -> connect the weight sync -> the loop -> export -> close

A failure anywhere ends the process: the kubelet starts it again in the same pod, and it resumes from its checkpoint. The exit code
says whether that makes sense (rlhf_api.progress), and /dev/termination-log carries the reason into the job's status.
"""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import RayTaskError
from yaml import YAMLError

from rlhf_api.progress import EXIT_BAD_DATA, EXIT_BAD_SPEC, EXIT_OK
from rlhf_api.run import RunConfig
from rlhf_worker.advice import advice
from rlhf_worker.calls import call, call_all, root_cause
from rlhf_worker.crew import Crew, close, start
from rlhf_worker.engines.arguments import check_engine_args
from rlhf_worker.errors import BadData, BadSpec
from rlhf_worker.placement import reserve
from rlhf_worker.progress import Reporter, StatusReporter, in_cluster_client
from rlhf_worker.stop import EXIT_TERMINATED, Stop, Terminated

EXIT_FAILED = 1
RAY_DEADLINE_SECONDS = 300.0
PLACEMENT_DEADLINE_SECONDS = 600.0
FILE_DEADLINE_SECONDS = 3600.0
TERMINATION_LOG = Path("/dev/termination-log")
LAST_WORDS_BYTES = 3000


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run leaves: for `local`, tests and benchmarks."""

    steps: int
    export: str | None
    seats: dict[str, list[str]]


def drive(config: RunConfig, reporter: Reporter, stop: Stop) -> Result:
    """The whole run on a connected Ray. Raises what ends it, with a note where it is known what to change."""
    try:
        return _drive(config, reporter, stop)
    except Exception as error:
        if words := advice("".join(traceback.format_exception(error)), config):
            root_cause(error).add_note(words)
        raise


def _drive(config: RunConfig, reporter: Reporter, stop: Stop) -> Result:
    with stop.abandonable():
        reporter.update(state="Starting", detail="checking the run config")
        check_engine_args(config)
        reporter.update(detail=f"waiting for {config.placement.gpus} GPUs")
        stage = reserve(config.placement, PLACEMENT_DEADLINE_SECONDS, name=f"rlhf-{config.job.name}")
        crew, seats = start(config, stage, reporter)
        from rlhf_worker.loop import Loop  # brings torch, which the actors did not have to wait for

        loop = Loop(config, crew, reporter, stop)
        loop.begin(*_restore(config, crew, reporter))
    loop.run()
    export = _export(config, crew, reporter)
    reporter.update(state="Done", detail="finished")
    close(crew)
    return Result(loop.step, export, seats)


def _restore(config: RunConfig, crew: Crew, reporter: Reporter) -> tuple[int, dict[str, Any]]:
    """Finished steps of the newest checkpoint, 0 for a new run, and the loop's memory. Raises BadData."""
    reporter.update(detail="looking for a checkpoint")
    restored = call_all(crew.savers, "restore", deadline_seconds=FILE_DEADLINE_SECONDS, what="restore")[0]
    for words in restored.passed_over:
        print(words, file=sys.stderr, flush=True)
    state = restored.state
    step = state.step if state else 0
    call(crew.feed, "begin", step, state.sampler if state else None, deadline_seconds=FILE_DEADLINE_SECONDS, what="start of the data")
    if state:
        total = config.trainer.steps
        reporter.update(detail="; ".join([f"resuming after step {step}", *restored.passed_over])[:1000], step=step, display=f"{step}/{total}", resumed_from_step=step)
    return step, state.loop if state else {}


def _export(config: RunConfig, crew: Crew, reporter: Reporter) -> str | None:
    if not config.checkpoint.export:
        return None
    reporter.update(detail="exporting the model")
    path: str = call_all(crew.policy, "export", deadline_seconds=FILE_DEADLINE_SECONDS, what="export")[0]
    print(f"exported the model to {path}", flush=True)
    return path


def guarded(work: Callable[[], object]) -> int:
    """Run, and turn what ended it into the exit code and the last words."""
    try:
        work()
    except Terminated as error:
        print(f"ended: {error}", file=sys.stderr, flush=True)
        return EXIT_TERMINATED
    except BaseException as error:
        cause = root_cause(error)
        words = last_words(error, cause)
        print(words, file=sys.stderr, flush=True)
        _tell_kubelet(words)
        return EXIT_BAD_SPEC if isinstance(cause, BadSpec) else EXIT_BAD_DATA if isinstance(cause, BadData) else EXIT_FAILED
    return EXIT_OK


def last_words(error: BaseException, cause: BaseException) -> str:
    """Type and message; for what no one foresaw, also the end of the traceback, which Ray carries in the message from the actor."""
    told = "\n".join([*getattr(cause, "__notes__", ()), f"{type(cause).__name__}: {cause}"])
    if isinstance(cause, (BadSpec, BadData)):
        return told
    trace = str(error) if isinstance(error, RayTaskError) else "".join(traceback.format_exception(error))
    room = LAST_WORDS_BYTES - len(told.encode())
    return told if room < 200 else f"{told}\n{trace.strip()[-room // 2 :]}"


def _tell_kubelet(words: str) -> None:
    try:
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_bytes(words.encode()[:LAST_WORDS_BYTES])
    except OSError as error:
        print(f"{TERMINATION_LOG}: {error}", file=sys.stderr, flush=True)


def _connect(config: RunConfig, stop: Stop) -> None:
    """To the Ray of this pod. The kubelet starts both containers at once, so its head may need a while."""
    deadline = time.monotonic() + RAY_DEADLINE_SECONDS
    while True:
        try:
            ray.init(address="auto", namespace=config.job.name, log_to_driver=True)
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
        stop.check()
        stop.wait(0.5)


def run(path: Path) -> None:
    """`rlhf_worker run`: in the head pod, beside Ray. Raises what ends it."""
    stop = Stop()
    stop.install()
    try:
        config = RunConfig.read(path)
    except (OSError, YAMLError, ValidationError) as error:
        raise BadSpec(f"run config {path}: {error}") from error
    reporter = StatusReporter(config, in_cluster_client())
    try:
        reporter.update(detail="waiting for Ray's head")
        _connect(config, stop)
        stop.install()  # again: ray.init takes SIGTERM for itself
        drive(config, reporter, stop)
    except BaseException as error:
        cause = root_cause(error)
        if not isinstance(cause, Terminated):
            reporter.update(detail=f"{type(cause).__name__}: {cause}"[:1000])
        raise
    finally:
        reporter.close()
