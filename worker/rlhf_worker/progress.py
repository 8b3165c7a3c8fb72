"""What the driver tells of the run: on the terminal, and in a pod (`pod/reports.py`) in `status.progress` of its
RLHFJob.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from annotated_types import MaxLen

from rlhf_api.progress import Progress, Saved, Speed, Sync
from rlhf_api.run import RunConfig
from rlhf_worker.stop import Stop
from rlhf_worker.weights.sync import Synced
from rlhf_worker.words import printable

# What a restart changes nothing of. The rest of a report is about the driver that made it.
STAYS = (
    "step", "step_time", "reward", "kl", "mismatch", "tokens_per_second", "speed", "eta_seconds", "eta", "checkpoint",
    "save_error", "productive_seconds", "dropped_prompts",
)  # fmt: skip


def now() -> str:
    """RFC 3339, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def in_words(seconds: int) -> str:
    """75 -> 1m15s, 5400 -> 1h30m"""
    minutes, rest = divmod(max(0, seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def step_fields(step: int, total: int, values: Mapping[str, float], eta_seconds: int) -> dict[str, Any]:
    """Of a finished step: numbers for people, with few digits."""
    fields: dict[str, Any] = {
        "step": step, "display": f"{step}/{total}", "step_time": now(), "reward": f"{values['reward/mean']:.3f}",
        "mismatch": f"{values['mismatch/abs']:.2g}" if "mismatch/abs" in values else None,
        "tokens_per_second": f"{values['rollout/tokens_per_second']:.0f}", "eta_seconds": eta_seconds,
        "eta": in_words(eta_seconds), "productive_seconds": int(values["seconds/productive"]),
        "dropped_prompts": int(values["data/dropped_prompts"]) if "data/dropped_prompts" in values else None,
    }
    return fields | ({"kl": f"{values['train/kl']:.2g}"} if "train/kl" in values else {})


def fitting(name: str, value: Any) -> Any:
    """A field's text as the API server takes it: one that is too long, or no UTF-8, would cost the whole report."""
    if not isinstance(value, str):
        return value
    most = next((rule.max_length for rule in Progress.model_fields[name].metadata if isinstance(rule, MaxLen)), None)
    return printable(value)[:most]


def sync_fields(synced: Synced, before: Sync | None) -> dict[str, Any]:
    proven = synced.version if synced.proof else before.verified_version if before else None
    return {
        "sync": Sync(
            version=synced.version, seconds=f"{synced.seconds:.3f}", backend=synced.backend, verified_version=proven,
        )
    }


class Reporter:
    """The run's progress, with a line on the terminal for each step and checkpoint."""

    pods_ready = True  # whether all that Kubernetes gives is there
    drain = False  # whether the pods go as soon as the run has saved

    def __init__(self, config: RunConfig, known: Progress | None = None) -> None:
        """known: what the driver before this one told last."""
        total = config.trainer.steps
        stays = {name: getattr(known, name) for name in STAYS} if known else {}
        display = f"{known.step if known else 0}/{total}"
        self.progress = Progress(total_steps=total, display=display, activity_time=now(), **stays)
        self._lock = threading.Lock()  # several threads tell what is amiss
        self._bounded = 0
        self._engines: str | None = None
        self._leaving: list[str] = []

    def update(self, synced: Synced | None = None, **fields: Any) -> None:
        with self._lock:
            fields |= sync_fields(synced, self.progress.sync) if synced else {}
            fits = {name: fitting(name, value) for name, value in fields.items()}
            self.progress = self.progress.model_copy(update=fits)

    def active(self) -> None:
        """The run got further: what waits for that counts anew. Told with the next report."""
        Reporter.update(self, activity_time=now())

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """What runs inside has a deadline of its own: it may take its time, and is not held to have stalled."""
        self._bounded += 1
        try:
            yield
        finally:
            self._bounded -= 1
            self.active()

    def engines(self, amiss: str | None) -> None:
        """What is amiss with the engines; None when nothing is, and what left has been replaced."""
        self._leaving = self._leaving if amiss else []
        self._engines = amiss
        self._tell_amiss()

    def leaving(self, pod: str) -> None:
        """The pod goes, and its engines with it."""
        words = f"pod {pod} is being deleted"
        self._leaving = [*(one for one in self._leaving if one != words), words]
        self._tell_amiss()

    def _tell_amiss(self) -> None:
        self.update(degraded="; ".join(filter(None, [self._engines, *self._leaving])) or None)

    def stepped(
        self, step: int, values: Mapping[str, float], speed: Speed, *, eta_seconds: int, synced: Synced | None,
    ) -> None:
        fields = step_fields(step, self.progress.total_steps, values, eta_seconds)
        self.update(synced, **fields, speed=speed, activity_time=now())
        print(line(self.progress, values), flush=True)

    def saved(self, step: int, path: str) -> None:
        self.update(checkpoint=Saved(step=step, path=path, time=now()), save_error=None, activity_time=now())
        print(f"saved step {step} to {path}", flush=True)

    def resumed(self, step: int, path: str, passed_over: Sequence[str]) -> None:
        """From the checkpoint of `step`, or from nothing when it is 0: now is known what of the last report is so."""
        last = self.progress.checkpoint
        there = last if last and last.step == step else Saved(step=step, path=path, time=now()) if step else None
        words = f"resuming after step {step}" if step else "from the first step"
        self.update(
            detail="; ".join([words, *passed_over]), step=step, display=f"{step}/{self.progress.total_steps}",
            checkpoint=there, resumed_from_step=step or None,
        )  # fmt: skip


def drained(reporter: Reporter, stop: Stop, how: str) -> None:
    """Nothing is under way or unsaved: the pods may go, for as long as they are to. Raises Terminated or Ended."""
    reporter.update(state="Drained", detail=f"{how}; waiting for the pods to go")
    with reporter.bounded():
        while reporter.drain:
            stop.check()
            stop.wait(1.0)


def line(progress: Progress, values: Mapping[str, float]) -> str:
    """One step in one line."""
    phases = " ".join(f"{name} {values[f'seconds/{name}']:.2f}" for name in ("generate", "score", "train", "sync"))
    version = progress.sync.version if progress.sync else 0
    learned = "  ".join(
        f"{name} {values[key]:.3g}"
        for name, key in (("loss", "train/loss"), ("grad", "train/grad_norm"), ("critic", "critic/loss"))
        if key in values
    )
    return (
        f"step {progress.display}  reward {progress.reward}  {progress.tokens_per_second} tok/s  version {version}  "
        f"mismatch {progress.mismatch}  {learned}  "
        f"{values['seconds/step']:.2f} s ({phases})  eta {progress.eta}{pace(progress.speed)}"
    )


def pace(speed: Speed | None) -> str:
    """The end of a step's line."""
    if speed is None:
        return ""
    mfu = f"mfu {speed.mfu}" if speed.mfu else "mfu unknown: no peak of this device"
    return f"  {mfu}  idle {speed.idle_trainer} {speed.idle_engines}  {speed.advice}"


class ConsoleReporter(Reporter):
    """The same reports as lines on the terminal alone. Nothing can suspend a run by hand."""

    def update(self, synced: Synced | None = None, **fields: Any) -> None:
        super().update(synced, **fields)
        if fields.get("state") or fields.get("detail"):
            print(f"{self.progress.state}: {self.progress.detail}", flush=True)
        if synced and synced.proof:
            print(proven(synced), flush=True)


def proven(synced: Synced) -> str:
    """The proof of a sync in one line."""
    proof = synced.proof
    assert proof is not None
    probe = f", probe within {proof.probe:.2g}" if proof.probe is not None else ""
    return (f"weights version {synced.version} delivered by {synced.backend}: {proof.equal} checksums equal, "
        f"{proof.indirect} packed or loaded{probe}, in {proof.seconds:.2f} s")
