"""How a run's end becomes an exit code and last words."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, RayTaskError

from rlhf_api.placement import Placement
from rlhf_worker import local, run
from rlhf_worker.errors import BadData, BadSpec, DeadlineExceeded, combined
from rlhf_worker.local import configure, mapped, volume
from rlhf_worker.placement import Patience
from rlhf_worker.progress import Reporter
from rlhf_worker.stop import Ended, Stop, Terminated
from tests.worker.configs import run_config

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"


def raising(error: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


def from_actor(cause: BaseException) -> BaseException:
    """As `ray.get` raises it."""
    error: BaseException = RayTaskError(
        "Policy.load()", "Traceback: policy.py line 7", cause, pid=1, ip="::1",
    ).as_instanceof_cause()
    return error


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setattr(run, "TERMINATION_LOG", path)
    return path


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadSpec("spec.x: wrong"), 64), (BadData("data.jsonl:3"), 65), (DeadlineExceeded("late"), 1),
        (Terminated("SIGTERM"), 143), (KeyError("k"), 1)
    ],
)
def test_exit_codes_also_through_actors(log: Path, error: Exception, code: int) -> None:
    assert run.guarded(raising(error)) == code
    assert run.guarded(raising(from_actor(error))) == code or isinstance(error, Terminated)
    assert run.guarded(raising(from_actor(from_actor(error)))) == code or isinstance(error, Terminated)


def test_success_is_zero_and_silent(log: Path) -> None:
    assert run.guarded(lambda: None) == 0
    assert not log.read_text()


def test_wrong_input_leaves_one_clear_line(log: Path) -> None:
    run.guarded(raising(from_actor(BadSpec("spec.model.path: /m: no such directory"))))
    assert log.read_text() == "BadSpec: spec.model.path: /m: no such directory"


def test_other_failures_leave_the_actors_traceback_in_3_kb(log: Path) -> None:
    run.guarded(raising(from_actor(ValueError("v" * 100))))
    words = log.read_text()
    assert words.startswith("ValueError: vvv") and "policy.py line 7" in words
    run.guarded(raising(ValueError("v" * 10000)))
    assert log.stat().st_size <= 3000


LONG = [
    "a line\n" * 4000, "\u20ac" * 5000, "one\n" + "\u20ac" * 5000, "half a pair \ud800" + "x" * 5000,
    "x" * 2998 + "\n\u20ac",
]  # fmt: skip


@pytest.mark.parametrize("text", LONG)
def test_last_words_are_whole_lines_that_fit_and_are_always_written(log: Path, text: str) -> None:
    """A kubelet takes the end of what does not fit, so that the reason would be gone."""
    for error in (ValueError(text), BadData(text), from_actor(ValueError(text))):
        assert run.guarded(raising(error)) in (1, 65)
        words = log.read_bytes().decode()
        assert len(words.encode()) <= 3000
        assert words.startswith((f"ValueError: {text[:3]}", f"BadData: {text[:3]}"))


class Mute(BadData):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Bare(ValueError):
    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise RuntimeError("no notes")


@pytest.mark.parametrize(("error", "code"), [(Mute(), 65), (Bare("x"), 1)])
def test_an_error_that_cannot_be_looked_at_leaves_its_class(log: Path, error: Exception, code: int) -> None:
    assert run.guarded(raising(error)) == code
    assert type(error).__name__ in log.read_text()


def test_what_several_problems_leave_is_a_line_each(log: Path) -> None:
    errors = [BadData("line 3 \ud800"), BadSpec("spec.model.path: /m"), ValueError("v" * 5000)]
    assert run.guarded(raising(from_actor(combined(errors)))) == 64
    first, *lines = log.read_text().splitlines()
    assert first == "BadSpec: 3 things are wrong:"
    assert lines[:2] == ["1. BadSpec: spec.model.path: /m", "2. BadData: line 3 \\ud800"]
    assert lines[2].startswith("3. ValueError: vvv")


def test_a_long_traceback_loses_its_first_lines_and_no_half_of_one(log: Path) -> None:
    trace = "\n".join(f"Frame line {number} of many" for number in range(1000))
    run.guarded(raising(RayTaskError("Policy.load()", trace, ValueError("why"), pid=1, ip="::1").as_instanceof_cause()))
    first, second, *rest = log.read_text().splitlines()
    assert first == "ValueError: why" and second.startswith("Frame line ") and "Frame line 999 of many" in rest


def test_what_ray_tells_of_an_actors_death_stays_whole(log: Path) -> None:
    exit_type = "Worker exit type: SYSTEM_ERROR Worker exit detail: killed by SIGKILL by OOM killer"
    died = ActorDiedErrorContext(class_name="Policy", actor_id=b"1" * 16, pid=7, error_message=exit_type)
    run.guarded(raising(ActorDiedError(died)))
    assert log.read_text().startswith("ActorDiedError: The actor died") and exit_type in log.read_text()


def test_a_job_that_has_ended_is_no_failure(log: Path) -> None:
    assert run.guarded(raising(Ended("RLHFJob tiny is Failed (BackoffLimitExceeded)"))) == 0
    assert not log.read_text()


def test_the_end_of_the_job_interrupts_everything() -> None:
    stop = Stop()
    stop.end("RLHFJob tiny is gone")
    with pytest.raises(Ended, match="is gone"):
        stop.interrupt()
    stop.ask("pod a is being deleted")
    with pytest.raises(Ended):
        stop.check()


@pytest.mark.parametrize("missing", [[], ["GPU: asked 1, Ray has 0"] * 2])
def test_a_driver_that_starts_gives_up_pods_that_are_to_go(monkeypatch: pytest.MonkeyPatch, missing: list[str]) -> None:
    """At once, and not after the minutes that models take to load; it goes on when the pods stay after all."""
    reporter, stop, told = Reporter(run_config()), Stop(), list[tuple[str, str]]()

    def update(synced: None = None, **fields: str) -> None:
        Reporter.update(reporter, synced, **fields)
        told.append((reporter.progress.state, reporter.progress.detail))

    def reserved(placement: Placement, patience: Patience, name: str, tell: Callable[[str], None]) -> str:
        reporter.drain = bool(missing)
        for words in missing:
            tell(words)
        return "stage"

    monkeypatch.setattr(reporter, "update", update)
    monkeypatch.setattr(stop, "wait", lambda seconds: setattr(reporter, "drain", False))
    monkeypatch.setattr(run, "reserve", reserved)
    reporter.drain = not missing
    assert run._reserve(run_config(), reporter, stop) == "stage"  # type: ignore[comparison-overlap]
    waiting = ("Starting", "waiting for 1 GPUs")
    gone = ("Drained", "nothing was under way; waiting for the pods to go")
    lacking = [("Starting", f"waiting for 1 GPUs: {missing[0]}")] if missing else []
    assert told == [waiting, gone, waiting, *lacking]


def test_a_stop_interrupts_only_what_may_be_dropped() -> None:
    stop = Stop()
    stop.interrupt()
    with stop.abandonable():
        stop._on_signal(15, None)
        assert stop.asked
        with pytest.raises(Terminated):
            stop.interrupt()
    stop.interrupt()  # outside: only the flag
    with pytest.raises(Terminated), stop.abandonable():
        pass


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("tiny-*.yaml")), ids=lambda p: p.stem)
def test_samples_resolve_onto_directories_of_this_machine(path: Path) -> None:
    config = configure(path, dict(map(volume, ["/var/lib/rlhf=here", "/var/lib/rlhf/models/=/m"])), steps=3)
    assert (config.trainer.steps, config.model.path) == (3, "/m/tiny")
    assert config.checkpoint.path == f"{Path.cwd()}/here/checkpoints/{path.stem}"
    assert [reward.code for reward in config.rewards] == [reward.code for reward in configure(path, {}).rewards]


def test_only_whole_directories_are_mapped() -> None:
    assert mapped({"a": ["/data", "/data/x", "/database", 3]}, {"/data": "/d"}) == {"a": ["/d", "/d/x", "/database", 3]}


@pytest.mark.parametrize("text", ["/data", "data=here", "/data="])
def test_a_wrong_volume_is_refused(text: str) -> None:
    with pytest.raises(BadSpec, match="MOUNT=DIR"):
        volume(text)


def test_a_wrong_manifest_lists_everything(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("kind: RLHFJob\napiVersion: rlhf.dev/v1alpha1\nmetadata: {name: x}\nspec: "
        "{imag: y}\n")
    with pytest.raises(BadSpec, match=r"spec\.model.*spec\.imag: unknown field"):
        configure(tmp_path / "job.yaml", {})


@pytest.mark.parametrize(("length", "stays"), [(20, True), (90, False)])
def test_rays_sockets_fit_whatever_tmpdir_is(monkeypatch: pytest.MonkeyPatch, length: int, stays: bool) -> None:
    root = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    chosen = root if stays else root / ("x" * length)
    chosen.mkdir(exist_ok=True)
    monkeypatch.setenv("TMPDIR", str(chosen))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(local, "_check_gpus", lambda config: None)
    places: list[str] = []
    monkeypatch.setattr(local, "_start_ray", lambda config, verbose, directory: places.append(directory))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with local.local_ray(run_config(), verbose=False):
        pass
    shutil.rmtree(root)
    assert Path(places[0]).parent == (chosen if stays else Path("/tmp"))
    assert os.environ["TMPDIR"] == str(Path(places[0]).parent)
    assert len(f"{places[0]}/session_2026-11-28_17-55-24_251786_1234567/sockets/plasma_store") <= 107
