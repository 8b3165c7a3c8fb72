"""`rlhf_worker local`: an RLHFJob on this machine, without Kubernetes. The same planner and the same driver, on a Ray
of its own.
"""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from rlhf_api.parse import InvalidJob, load_job
from rlhf_api.run import RunConfig, resolve
from rlhf_worker.errors import BadSpec
from rlhf_worker.placement import device_here
from rlhf_worker.progress import ConsoleReporter
from rlhf_worker.run import Result, drive
from rlhf_worker.stop import Stop
from rlhf_worker.watcher import HOOK, children

OBJECT_STORE_BYTES = 512 << 20
START_TRIES = 3
SHORT_TEMP = "/tmp"
TEMP_BYTES = 107 - len("/rlhf-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1234")


def volume(text: str) -> tuple[str, str]:
    """`MOUNT=DIR`: a mount of the pods, and the directory of this machine that stands for it. Raises BadSpec."""
    mount, sign, directory = text.partition("=")
    if not (sign and mount.startswith("/") and directory):
        raise BadSpec(f"--volume {text!r} is not MOUNT=DIR with an absolute MOUNT")
    return mount.rstrip("/"), str(Path(directory).absolute())


def mapped(node: Any, volumes: Mapping[str, str]) -> Any:
    """Every path of a manifest that lies in a mount, at its place on this machine; the deepest mount wins."""
    if isinstance(node, dict):
        return {key: mapped(value, volumes) for key, value in node.items()}
    if isinstance(node, list):
        return [mapped(value, volumes) for value in node]
    mounts = [mount for mount in volumes if isinstance(node, str) and f"{node}/".startswith(f"{mount}/")]
    if not mounts:
        return node
    deepest = max(mounts, key=len)
    return volumes[deepest] + node.removeprefix(deepest)


def configure(path: Path, volumes: Mapping[str, str], steps: int | None = None) -> RunConfig:
    """Raises BadSpec with everything that is wrong with the manifest."""
    try:
        run = resolve(load_job(path))
        config = RunConfig.model_validate(mapped(run.to_dict(), volumes))
    except InvalidJob as error:
        raise BadSpec("; ".join(error.problems)) from error
    changes: dict[str, Any] = {"stall_timeout_seconds": run.stall_timeout_seconds}
    if steps is not None:
        changes["trainer"] = config.trainer.model_copy(update={"steps": steps})
    return config.model_copy(update=changes)


def local(path: Path, volumes: Mapping[str, str], steps: int | None = None, verbose: bool = False) -> Result:
    """To the end of the run; it resumes when the checkpoint path holds a checkpoint. Raises what ends it."""
    config = configure(path, volumes, steps)
    stop, reporter = Stop(), ConsoleReporter(config)
    with local_ray(config, verbose):
        stop.install()  # after ray.init, which takes SIGTERM for itself
        return drive(config, reporter, stop)


@contextlib.contextmanager
def local_ray(config: RunConfig, verbose: bool) -> Iterator[None]:
    """A Ray for this run alone: its own directory and ports, ended with it. Logical GPUs where there is no real one.
    Raises BadSpec.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.update(HOOK)
    os.environ.pop("RAY_ADDRESS", None)
    _check_gpus(config)
    _shorten_temp()
    with tempfile.TemporaryDirectory(prefix="rlhf-", ignore_cleanup_errors=True) as directory:
        _start_ray(config, verbose, directory)
        try:
            yield
        finally:
            ray.shutdown()


def _shorten_temp() -> None:
    """For this process and its children: a socket's path has 107 bytes at most, of which Ray and vLLM take most."""
    if len(os.fsencode(chosen := tempfile.gettempdir())) > TEMP_BYTES:
        print(f"TMPDIR is too long for paths of sockets ({chosen}): using {SHORT_TEMP}", file=sys.stderr, flush=True)
        os.environ["TMPDIR"] = tempfile.tempdir = SHORT_TEMP


def _check_gpus(config: RunConfig) -> None:
    if device_here() == "cpu":
        return
    import torch

    if (there := torch.cuda.device_count()) < config.placement.gpus:
        raise BadSpec(f"spec.trainer.gpus and spec.rollout ask for {config.placement.gpus} GPUs, this machine has "
            f"{there}: lower them")


def _start_ray(config: RunConfig, verbose: bool, directory: str) -> None:
    for left in reversed(range(START_TRIES)):
        try:
            ray.init(
                address="local", namespace=config.job.name, num_gpus=config.placement.gpus, log_to_driver=verbose,
                resources={group.ray_resource: float(len(group.slots)) for group in config.placement.groups},
                include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=directory,
            )  # fmt: skip
            return
        # Ray raises a bare Exception when its own 30 s for a start are over, as on a busy machine
        except Exception as error:
            ray.shutdown()
            _end_children()
            if not left:
                raise
            print(f"Ray did not start ({error}); trying again", file=sys.stderr, flush=True)


def _end_children() -> None:
    """A Ray that did not come up leaves the processes it had started."""
    for pid in list(children(os.getpid())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
