"""READ FIRST. The driver's life, from run config to exit code.

    read the config and the job -> be numbered by the operator -> connect to Ray -> reserve the GPUs
    -> start feed, trainer and engines side by side -> prove who sits where -> restore the newest checkpoint
    -> connect the weight sync -> the loop -> export -> close

A failure anywhere ends the process: the kubelet starts it again in the same pod, and it resumes from its checkpoint.
The exit code says whether that makes sense (rlhf_api.progress), and /dev/termination-log carries the reason into the
job's status. When the job has ended, the driver ends with 0, whatever it does. """

import os
import sys
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
from rlhf_worker.deadlines import work_seconds
from rlhf_worker.engines.arguments import settled
from rlhf_worker.errors import BadData, BadSpec, said
from rlhf_worker.hub import fetch
from rlhf_worker.placement import Patience, Stage, reserve
from rlhf_worker.pod import attempt, head
from rlhf_worker.pod.job import POD_UID, OwnJob, in_cluster_client, stall_timeout
from rlhf_worker.pod.kept_log import KeptLog
from rlhf_worker.pod.notices import Notices, listening
from rlhf_worker.pod.reports import StatusReporter
from rlhf_worker.progress import Reporter, drained
from rlhf_worker.roll import Roll
from rlhf_worker.stop import EXIT_TERMINATED, Ended, Stop, Terminated
from rlhf_worker.watcher import watched
from rlhf_worker.words import first_lines, last_lines, printable

EXIT_FAILED = 1
# Both count only while all pods are ready: before that, the operator's clocks do.
RAY_DEADLINE_SECONDS = 300.0
PLACEMENT_DEADLINE_SECONDS = 600.0
TERMINATION_LOG = Path("/dev/termination-log")
LAST_WORDS_BYTES = 3000


@dataclass(frozen=True, slots=True)
class Result:
    """What a finished run leaves: for `local`, tests and benchmarks."""

    steps: int
    export: str | None
    seats: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class InCluster:
    """What a driver in a pod has besides: its head pod's number, ears for pods that go, and a log that is kept."""

    attempt: int
    notices: Notices | None
    log: KeptLog


def drive(config: RunConfig, reporter: Reporter, stop: Stop, pod: InCluster | None = None) -> Result:
    """The whole run on a connected Ray. Raises what ends it, with a note where it is known what to change."""
    roll = Roll(stop)
    try:
        return _drive(config, reporter, stop, roll, pod)
    except Exception as error:
        told = roll.explained(error)
        if words := advice("".join(traceback.format_exception(told)), config):
            root_cause(told).add_note(words)
        if told is error:
            raise
        raise told from told.__cause__
    finally:
        roll.close()


def _drive(config: RunConfig, reporter: Reporter, stop: Stop, roll: Roll, pod: InCluster | None) -> Result:
    with stop.abandonable(), reporter.bounded():
        reporter.update(state="Starting")
        stage = _reserve(config, reporter, stop)
        config = settled(config, stage.device)
        if pod and pod.notices:
            pod.notices.listen()
        roll.watch()
        fetch(config, stage, reporter)
        crew, seats = start(config, stage, reporter, roll)
        if pod:
            pod.log.send_to(crew.feed, pod.attempt)
        from rlhf_worker.loop import Loop  # brings torch, which the actors did not have to wait for

        loop = Loop(config, crew, reporter, stop)
        loop.begin(*_restore(config, crew, reporter, pod.attempt if pod else 0))
    loop.run()
    with stop.abandonable(), reporter.bounded():
        export = _export(config, crew, reporter)
    reporter.update(state="Done", detail="finished")
    if pod:
        pod.log.close()  # while the feed still takes it
    roll.close()
    close(crew)
    return Result(loop.step, export, seats)


def _reserve(config: RunConfig, reporter: Reporter, stop: Stop) -> Stage:
    """Waits for the GPUs as long as the operator does. A run whose pods are to go meanwhile has nothing to save."""
    what = f"waiting for {config.placement.gpus} GPUs"

    def idle() -> None:
        if reporter.drain:
            drained(reporter, stop, "nothing was under way")
            reporter.update(state="Starting", detail=what)

    def tell(missing: str) -> None:
        idle()
        if (words := f"{what}: {missing}") != reporter.progress.detail:
            reporter.update(detail=words)

    reporter.update(detail=what)
    idle()
    patience = Patience(PLACEMENT_DEADLINE_SECONDS, lambda: reporter.pods_ready)
    return reserve(config.placement, patience, f"rlhf-{config.job.name}", tell)


def _restore(config: RunConfig, crew: Crew, reporter: Reporter, number: int) -> tuple[int, dict[str, Any]]:
    """Finished steps of the newest checkpoint, 0 for a new run, and the loop's memory. Raises BadData, Fenced."""
    reporter.update(detail="looking for a checkpoint")
    fence, deadline = (config.job.uid, number), work_seconds(config)
    call_all(crew.savers, "fence", *fence, deadline_seconds=deadline, what="fence of the checkpoints")
    restored = call_all(crew.savers, "restore", deadline_seconds=deadline, what="restore")[0]
    for words in restored.passed_over:
        print(words, file=sys.stderr, flush=True)
    state = restored.state
    step = state.step if state else 0
    sampler = state.sampler if state else None
    call(crew.feed, "begin", step, sampler, deadline_seconds=deadline, what="start of the data")
    reporter.resumed(step, restored.path, restored.passed_over)
    return step, state.loop if state else {}


def _export(config: RunConfig, crew: Crew, reporter: Reporter) -> str | None:
    if not config.checkpoint.export:
        return None
    reporter.update(detail="exporting the model")
    paths: list[str] = [
        call_all(crew.policy, "export", best, deadline_seconds=work_seconds(config), what="export")[0]
        for best in ([False, True] if config.checkpoint.best else [False])
    ]
    for path in paths:
        none = "no whole checkpoint has the metric of spec.checkpoint.best"
        print(f"exported the model to {path}" if path else none, flush=True)
    return paths[0]


def guarded(work: Callable[[], object]) -> int:
    """Run, and turn what ended it into the exit code and the last words."""
    try:
        work()
    except Ended as error:
        print(f"ended: {error}", file=sys.stderr, flush=True)
    except Terminated as error:
        print(f"ended: {error}", file=sys.stderr, flush=True)
        return EXIT_TERMINATED
    except BaseException as error:
        cause = root_cause(error)
        words = _always(error, cause)
        print(words, file=sys.stderr, flush=True)
        _tell_kubelet(words)
        codes = {BadSpec: EXIT_BAD_SPEC, BadData: EXIT_BAD_DATA}
        return next((code for kind, code in codes.items() if isinstance(cause, kind)), EXIT_FAILED)
    return EXIT_OK


def _always(error: BaseException, cause: BaseException) -> str:
    """The last words, also of an error that fails when it is looked at: without any, nobody knew why the job failed."""
    try:
        return last_words(error, cause)
    except Exception as failure:
        return f"{type(cause).__name__}, whose message cannot be printed ({type(failure).__name__})"


def last_words(error: BaseException, cause: BaseException) -> str:
    """Whole lines: what to do and what happened; for what no one foresaw, also the end of the traceback.

    Ray carries the actor's in the error's message.
    """
    lines = [*getattr(cause, "__notes__", ()), said(cause)]
    told = first_lines(printable("\n".join(lines)), LAST_WORDS_BYTES)
    if isinstance(cause, (BadSpec, BadData)):
        return told
    trace = str(error) if isinstance(error, RayTaskError) else "".join(traceback.format_exception(error))
    end = last_lines(printable(trace).strip().removesuffix(told).strip(), LAST_WORDS_BYTES - len(told.encode()) - 1)
    return f"{told}\n{end}" if end else told


def _tell_kubelet(words: str) -> None:
    try:
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_bytes(words.encode())
    except OSError as error:
        print(f"{TERMINATION_LOG}: {error}", file=sys.stderr, flush=True)


@head.attended()
def _connect(config: RunConfig, reporter: Reporter, stop: Stop) -> None:
    """To the Ray of this pod, whose head may need a while: the kubelet starts both containers at once."""
    reporter.update(detail="waiting for Ray's head")
    patience = Patience(RAY_DEADLINE_SECONDS, lambda: reporter.pods_ready)
    while True:
        try:
            context = ray.init(address="auto", namespace=config.job.name, log_to_driver=True)
            head.watch(Path(context.address_info["session_dir"]), _head_lost)
            return
        except ConnectionError:
            if patience.over:
                raise
        stop.check()
        stop.wait(0.5)


def _head_lost(why: str) -> None:
    """At once: every actor went with the head, so nothing can be saved, and the main thread may wait for what never
    comes.
    """
    print(why, file=sys.stderr, flush=True)
    _tell_kubelet(why)
    os._exit(EXIT_FAILED)


class Heard:
    """What becomes of a notice that a pod is being deleted."""

    def __init__(self, reporter: Reporter, stop: Stop) -> None:
        self._reporter, self._stop = reporter, stop

    def trainer(self, pod: str) -> None:
        """As SIGTERM of its own pod. A step that trains is finished first; one that outlasts the pod is lost."""
        self._reporter.update(detail=f"pod {pod} is being deleted: saving after this step")
        self._stop.ask(f"pod {pod} is being deleted")

    def rollout(self, pod: str) -> None:
        self._reporter.leaving(pod)


def run(path: Path, log: KeptLog) -> None:
    """`rlhf_worker run`: in the head pod, beside Ray. Raises what ends it.

    Its watcher can end it because the pod's processes share a namespace: whoever is the first in one cannot be killed
    from inside. """
    watcher = watched()
    stop = Stop()
    stop.install()
    try:
        config = RunConfig.read(path)
    except (OSError, UnicodeError, YAMLError, ValidationError) as error:
        raise BadSpec(f"run config {path}: {error}") from error
    own, pod_uid = OwnJob(config.job, in_cluster_client()), os.environ.get(POD_UID, "")
    seen = attempt.first_look(own, stop)
    config = config.model_copy(update={"stall_timeout_seconds": stall_timeout(seen)})
    reporter = StatusReporter(config, own, seen, stop, pod_uid)
    try:
        with reporter.bounded():
            reporter.update(detail="waiting for the operator to number this attempt")
            number = attempt.number(own, stop, pod_uid)
            reporter.update(attempt=number)
            notices = listening(Heard(reporter, stop))
            _connect(config, reporter, stop)
        stop.install()  # again: ray.init takes SIGTERM for itself
        drive(config, reporter, stop, InCluster(number, notices, log))
    except BaseException as error:
        cause = root_cause(error)
        if not isinstance(cause, (Terminated, Ended)):
            reporter.update(detail=said(cause))
        raise
    finally:
        reporter.close()
        watcher.kill()
        watcher.wait()
