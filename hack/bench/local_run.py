"""One RLHFJob by the local driver, in a process of its own, with what its reporter was told of each step.

usage: python hack/bench/local_run.py MANIFEST OUT
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def job(name: str, **spec: Any) -> dict[str, Any]:
    """An RLHFJob that no cluster sees."""
    return {
        "apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "metadata": {"name": name},
        "spec": {"image": "none", **spec},
    }


def config(name: str, **spec: Any) -> Any:
    """The RunConfig of a job without data or rewards, for a benchmark that drives a part of the worker itself."""
    from rlhf_api.job import RLHFJob
    from rlhf_api.run import resolve

    nothing = {
        "data": {"jsonl": {"path": "none"}, "maxPromptTokens": 64},
        "rewards": [{"name": "none", "type": "python", "code": "none"}], "trainer": {"steps": 1},
    }
    return resolve(RLHFJob.model_validate(job(name, **nothing | spec)))


def run(manifest: dict[str, Any], work: Path) -> dict[str, Any]:
    """{"seats": ..., "steps": [{"step", "reward/mean", "seconds/step", ...}]}. A process each, so that a run starts
    with empty GPUs. Raises CalledProcessError.
    """
    name = manifest["metadata"]["name"]
    paths = [work / f"{name}.yaml", work / f"{name}.json"]
    paths[0].write_text(yaml.safe_dump(manifest))
    subprocess.run([sys.executable, __file__, *map(str, paths)], check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(paths[1].read_text())
    return found


def recorder(config: Any) -> Any:
    """A reporter for the console that keeps, as `steps`, what it was told of each."""
    from rlhf_worker.progress import ConsoleReporter

    class Recorder(ConsoleReporter):
        steps: list[dict[str, Any]]

        def stepped(self, step: int, values: Any, speed: Any, *, eta_seconds: int, synced: Any) -> None:
            super().stepped(step, values, speed, eta_seconds=eta_seconds, synced=synced)
            proof = {
                "equal": synced.proof.equal, "indirect": synced.proof.indirect, "proof/seconds": synced.proof.seconds,
            } if synced.proof else {}
            self.steps.append({"step": step, **proof, **values})

    made = Recorder(config)
    made.steps = []
    return made


def _child(path: Path, out: Path) -> int:
    from rlhf_worker.local import configure, local_ray
    from rlhf_worker.run import drive, guarded
    from rlhf_worker.stop import Stop

    def work() -> None:
        config = configure(path, {})
        reporter = recorder(config)
        with local_ray(config, verbose=True):
            result = drive(config, reporter, Stop())
        out.write_text(json.dumps({"seats": result.seats, "steps": reporter.steps}))

    return guarded(work)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(_child(Path(sys.argv[1]), Path(sys.argv[2])))
