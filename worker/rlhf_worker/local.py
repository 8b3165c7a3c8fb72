"""`rlhf_worker local`: an RLHFJob on this machine, without Kubernetes. The same planner and the same driver, on a Ray of its own."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ray

from rlhf_api.parse import InvalidJob, load_job
from rlhf_api.run import RunConfig, resolve
from rlhf_worker.errors import BadSpec
from rlhf_worker.placement import device_here
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.run import Result, drive
from rlhf_worker.stop import Stop

OBJECT_STORE_BYTES = 512 << 20
START_TRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Overrides:
    """What the command line changes of the manifest."""

    steps: int | None = None
    checkpoint: Path | None = None
    model: str | None = None


def configure(path: Path, overrides: Overrides) -> RunConfig:
    """Raises BadSpec with everything that is wrong with the manifest."""
    try:
        config = resolve(load_job(path))
    except InvalidJob as error:
        raise BadSpec("; ".join(error.problems)) from error
    changes: dict[str, object] = {}
    if overrides.steps is not None:
        changes["trainer"] = config.trainer.model_copy(update={"steps": overrides.steps})
    if overrides.checkpoint is not None:
        changes["checkpoint"] = config.checkpoint.model_copy(update={"path": str(overrides.checkpoint.absolute())})
    if overrides.model is not None:
        changes["model"] = config.model.model_copy(update={"path": overrides.model})
    return config.model_copy(update=changes)


def local(path: Path, overrides: Overrides, verbose: bool = False) -> Result:
    """To the end of the run; it resumes when the checkpoint path holds a checkpoint. Raises what ends it."""
    config = configure(path, overrides)
    stop = Stop()
    stop.install()
    reporter = ConsoleReporter(config)
    with LocalRay(config, verbose):
        return drive(config, reporter, stop)


def _end_children() -> None:
    """A Ray that did not come up leaves the processes it had started."""
    for thread in Path("/proc/self/task").iterdir():
        for pid in (thread / "children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


class LocalRay:
    """A Ray for this run alone: its own directory and ports, ended with it. Logical GPUs where there is no real one."""

    def __init__(self, config: RunConfig, verbose: bool) -> None:
        self.config = config
        self.verbose = verbose

    def __enter__(self) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.pop("RAY_ADDRESS", None)
        self._check_gpus()
        self.directory = tempfile.mkdtemp(prefix="rlhf-")
        for left in reversed(range(START_TRIES)):
            try:
                self._init()
                return
            except Exception as error:  # Ray raises a bare Exception when its own 30 s for a start are over, as on a busy machine
                ray.shutdown()
                _end_children()
                if not left:
                    raise
                print(f"Ray did not start ({error}); trying again", file=sys.stderr, flush=True)

    def _init(self) -> None:
        placement = self.config.placement
        ray.init(
            address="local", namespace=self.config.job.name, num_gpus=placement.gpus, log_to_driver=self.verbose,
            resources={group.ray_resource: float(len(group.slots)) for group in placement.groups},
            include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=self.directory,
        )

    def _check_gpus(self) -> None:
        if device_here() == "cpu":
            return
        import torch

        if (there := torch.cuda.device_count()) < self.config.placement.gpus:
            raise BadSpec(f"spec.trainer.gpus and spec.rollout ask for {self.config.placement.gpus} GPUs, this machine has {there}: lower them")

    def __exit__(self, *_: object) -> None:
        ray.shutdown()
        shutil.rmtree(self.directory, ignore_errors=True)
