"""How a run's end becomes an exit code and last words."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError

from rlhf_worker import run
from rlhf_worker.errors import BadData, BadSpec, DeadlineExceeded
from rlhf_worker.local import configure, mapped, volume
from rlhf_worker.stop import Stop, Terminated

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"


def raising(error: BaseException) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


def from_actor(cause: Exception) -> BaseException:
    """As `ray.get` raises it."""
    error: BaseException = RayTaskError("Policy.load()", "Traceback: policy.py line 7", cause, pid=1, ip="::1").as_instanceof_cause()
    return error


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination-log"
    path.touch()
    monkeypatch.setattr(run, "TERMINATION_LOG", path)
    return path


@pytest.mark.parametrize(
    ("error", "code"),
    [(BadSpec("spec.x: wrong"), 64), (BadData("data.jsonl:3"), 65), (DeadlineExceeded("late"), 1), (Terminated("SIGTERM"), 143), (KeyError("k"), 1)],
)
def test_exit_codes_also_through_actors(log: Path, error: Exception, code: int) -> None:
    assert run.guarded(raising(error)) == code
    assert run.guarded(raising(from_actor(error))) == code or isinstance(error, Terminated)
    assert run.guarded(raising(from_actor(from_actor(error)))) == code or isinstance(error, Terminated)  # type: ignore[arg-type]


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
    (tmp_path / "job.yaml").write_text("kind: RLHFJob\napiVersion: rlhf.dev/v1alpha1\nmetadata: {name: x}\nspec: {imag: y}\n")
    with pytest.raises(BadSpec, match=r"spec\.image.*spec\.imag: unknown field"):
        configure(tmp_path / "job.yaml", {})
