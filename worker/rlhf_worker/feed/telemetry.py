"""What a run tells about itself besides its status: metrics into TensorBoard, W&B, MLflow and Prometheus, and phase
times.
"""

import importlib.util
import os
import queue
import re
import sys
import threading
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol

from rlhf_api.job import MlflowSpec, TelemetrySpec, WandbSpec
from rlhf_api.run import RunConfig
from rlhf_worker.errors import BadSpec
from rlhf_worker.experience import Column, ScoredSample
from rlhf_worker.storage import Store

BACKLOG = 256  # calls that a slow backend may lag behind; further ones are dropped and counted
CLOSE_SECONDS = 30.0


class PhaseTimer:
    """Seconds by phase; a phase entered twice adds up, also when it raises."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Backend(Protocol):
    """Where metrics go. It may raise anything: `Lane` counts it."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Steps from `first_step` on are purged: a resumed run logs them again."""

    def __init__(self, directory: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(directory, purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One W&B run for all lives of a checkpoint. Its x axis is our step: W&B's own counter would drop the steps that a
    resumed run repeats.
    """

    def __init__(self, spec: WandbSpec, config: RunConfig, store: Store, run_id: str) -> None:
        import wandb

        self._run = wandb.init(
            project=spec.project, entity=spec.entity, name=spec.name or config.job.name, mode=spec.mode, id=run_id,
            resume="allow",
            dir=store.inside if store.local else None, config=config.to_dict(),
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )  # fmt: skip
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """One MLflow run for all lives of a checkpoint, found by its tag."""

    def __init__(self, spec: MlflowSpec, job: str, run_id: str) -> None:
        # A server that is down must cost seconds, not MLflow's minutes of tries.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=spec.tracking_uri)
        there = self._client.get_experiment_by_name(spec.experiment)
        experiment = there.experiment_id if there else self._client.create_experiment(spec.experiment)
        found = self._client.search_runs([experiment], f"tags.rlhf_run = '{run_id}'", max_results=1)
        run = found[0] if found else self._client.create_run(experiment, run_name=job, tags={"rlhf_run": run_id})
        self._run: str = run.info.run_id
        self._client.update_run(self._run, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Prometheus:
    """Serves the newest value of each metric; `reward/mean` is rlhf_reward_mean{rlhfjob="<name>"}."""

    def __init__(self, port: int, job: str) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry, series = CollectorRegistry(), dict[str, str]()

        @cache
        def gauge(name: str) -> Gauge:
            """Of two metrics whose names are one to Prometheus, the later gets a mark of its own name."""
            one = "rlhf_" + re.sub(r"\W", "_", name)
            if series.setdefault(one, name) != name:
                one = f"{one}_{zlib.crc32(name.encode()):08x}"
            return Gauge(one, f"{name} of the newest step", ["rlhfjob"], registry=registry).labels(job)

        self._gauge = gauge
        self._server, self._thread = start_http_server(port, registry=registry)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in {**values, "step": float(step)}.items():
            self._gauge(name).set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Failures:
    """Counts by field of spec.telemetry; the first of each field is told. None ends the run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, field: str, reason: object) -> None:
        self.counts[field] += 1
        if self.counts[field] == 1:
            text = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
            print(
                f"warning: spec.telemetry.{field}: {text}; the run goes on, telemetry/failures counts", file=sys.stderr,
                flush=True,
            )


class Lane(threading.Thread):
    """One backend in a thread of its own: slow, hung or broken, it costs the run nothing but its own lines."""

    def __init__(self, field: str, start: Callable[[], Backend], failures: Failures) -> None:
        super().__init__(name=f"telemetry-{field}", daemon=True)
        self.field, self._begin, self._failures = field, start, failures
        self._calls: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(BACKLOG)
        self.start()

    def put(self, call: tuple[int, Mapping[str, float]] | None) -> None:
        """Metrics of a step; None after the last."""
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._failures.add(self.field, f"it is {BACKLOG} steps behind; newer ones are dropped")

    def run(self) -> None:
        backend: Backend | None = None
        while (call := self._calls.get()) is not None:
            try:
                backend = backend or self._begin()  # tried again at the next step
                backend.log(*call)
            except Exception as error:
                self._failures.add(self.field, error)
        try:
            if backend:
                backend.close()
        except Exception as error:
            self._failures.add(self.field, error)


class Telemetry:
    """The backends that spec.telemetry names. `log` does not wait for them, nor raise for their sake."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        spec, store = config.telemetry, Store(config.checkpoint.path)
        self._store = store
        self.failures, self._last = Failures(), first_step - 1
        run_id = _run_id(store) if spec.wandb or spec.mlflow else ""
        starts: dict[str, Callable[[], Backend]] = {}
        if spec.tensorboard:
            starts["tensorboard"] = lambda: TensorBoard(store.url("tensorboard"), first_step)
        if wandb := spec.wandb:
            starts["wandb"] = lambda: Wandb(wandb, config, store, run_id)
        if mlflow := spec.mlflow:
            starts["mlflow"] = lambda: Mlflow(mlflow, config.job.name, run_id)
        if port := spec.prometheus_port:
            starts["prometheusPort"] = lambda: Prometheus(port, config.job.name)
        self._lanes = [Lane(field, start, self.failures) for field, start in starts.items()]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Steps never go back; a step may be logged in parts."""
        if step < self._last:
            raise ValueError(f"metrics of step {step} after those of step {self._last}")
        self._last = step
        for lane in self._lanes:
            lane.put((step, {**values, "telemetry/failures": float(self.failures.counts.total())}))

    def record(self, step: int, scored: Sequence[ScoredSample], advantages: Sequence[Column] | None) -> None:
        """The samples of a step into a file; a full disk costs the file only."""
        from rlhf_worker.feed import replay

        try:
            replay.write(self._store, step, scored, advantages)
        except Exception as error:
            self.failures.add("rolloutsEverySteps", error)

    def close(self) -> None:
        """What was logged is written, as far as it can be in CLOSE_SECONDS."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for lane in self._lanes:
            lane.put(None)
        for lane in self._lanes:
            lane.join(max(0.0, deadline - time.monotonic()))


def check(spec: TelemetrySpec) -> None:
    """Raises BadSpec for a backend whose package or key is missing."""
    for field, value, package in (("wandb", spec.wandb, "wandb"), ("mlflow", spec.mlflow, "mlflow")):
        there = importlib.util.find_spec(package)
        if value and (there is None or there.origin is None):  # None: a mere directory of this name
            raise BadSpec(f"spec.telemetry.{field}: the image has no python package {package}: use an image that has "
                f"it, or remove spec.telemetry.{field}")
    if spec.wandb and spec.wandb.mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise BadSpec("spec.telemetry.wandb.mode: online needs a key: set WANDB_API_KEY in pods.trainer.env, from "
                "a Secret, or mode to offline")


def _run_id(store: Store) -> str:
    """The name of this run at other services, kept beside its checkpoints: who starts anew with an empty directory is
    another run.
    """
    try:
        return store.read("run-id").decode()
    except FileNotFoundError:
        run_id = uuid.uuid4().hex[:16]
        store.write("run-id", run_id.encode())
        return run_id
