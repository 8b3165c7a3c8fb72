"""Whole runs on this machine: real Ray, real vLLM, the tiny model. The learning run is shared by the tests that look at
it.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from hack.tiny_model import write
from rlhf_worker.__main__ import main
from rlhf_worker.feed import replay
from rlhf_worker.pretrained import load_tokenizer
from tests.worker.checkpoints import checkpoint
from tests.worker.test_telemetry import tensorboard

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(900)]
SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
DEADLINE = 600


@dataclass
class Run:
    code: int
    output: str
    checkpoints: Path

    @property
    def rewards(self) -> list[float]:
        return [float(value) for value in re.findall(r"^step \d+/\d+  reward (\S+)", self.output, re.MULTILINE)]


Runs = dict[str, Future[Run]]


def command(manifest: Path, tiny: Path, checkpoints: Path, *more: str) -> list[str]:
    """The sample's directories are these; a manifest that `changed` wrote keeps the sample's paths."""
    kind = next((kind for kind in ("separated", "ppo") if kind in manifest.name), "colocated")
    mounts = {"models/tiny": tiny, f"checkpoints/tiny-{kind}": checkpoints}
    volumes = [
        word for mount, directory in mounts.items() for word in ("--volume", f"/var/lib/rlhf/{mount}={directory}")
    ]
    return [sys.executable, "-u", "-m", "rlhf_worker", "local", str(manifest), *volumes, *more]


def run(manifest: Path, tiny: Path, checkpoints: Path, *more: str) -> Run:
    done = subprocess.run(command(manifest, tiny, checkpoints, *more), capture_output=True, text=True, timeout=DEADLINE)
    return Run(done.returncode, done.stdout + done.stderr, checkpoints)


def changed(tmp_path: Path, **sections: Any) -> Path:
    """The colocated sample with some sections of its spec updated."""
    job = yaml.safe_load((SAMPLES / "tiny-colocated.yaml").read_text())
    for name, values in sections.items():
        job["spec"][name] = {**job["spec"].get(name, {}), **values} if isinstance(values, dict) else values
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


SEPARATED: dict[str, Any] = {
    "rollout": {"engines": 2}, "trainer": {"gpus": 2, "steps": 3, "updatesPerStep": 2},
    "placement": {"mode": "Separated"},
    "algorithm": {"kl": {"coefficient": 0.01}}, "weightSync": {"verifyEverySteps": 1},
    "evaluation": [
        {
            "name": "held-out", "everySteps": 2, "limit": 9, "samples": 2, "temperature": 0.5, "maxTokens": 8,
            "data": {"jsonl": {"path": "/var/lib/rlhf/models/tiny/prompts.jsonl"}, "maxPromptTokens": 48},
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """By their directories' names. Two at a time: a run waits for its processes a third of its time."""
    folder = tmp_path_factory.mktemp("runs")
    colocated = SAMPLES / "tiny-colocated.yaml"

    def of(name: str, **sections: Any) -> Path:
        (folder / f"{name}-job").mkdir()
        return changed(folder / f"{name}-job", **sections)

    with ThreadPoolExecutor(2) as pool:
        learned = pool.submit(run, colocated, tiny, folder / "learned")

        def after(name: str, step: int, manifest: Path, model: Path) -> Run:
            """From a checkpoint of the first."""
            left = checkpoint(learned.result().checkpoints, step)
            shutil.copytree(left, folder / name / f"step-{step}")
            return run(manifest, model, folder / name)

        write(folder / "other")
        yield {
            "learned": learned,
            "separated": pool.submit(run, of("separated", **SEPARATED), tiny, folder / "separated"),
            "ppo": pool.submit(run, SAMPLES / "tiny-ppo.yaml", tiny, folder / "ppo"),
            "resumed": pool.submit(after, "resumed", 20, colocated, tiny),
            "no-model": pool.submit(run, colocated, folder / "nowhere", folder / "no-model"),
            "typo": pool.submit(
                run, of("typo", rollout={"engineArgs": {"max_modle_len": 64}}), tiny, folder / "typo"
            ),
            "of-another": pool.submit(
                after, "of-another", 30, of("of-another", rollout={"engine": "hf"}), folder / "other"
            ),
        }  # fmt: skip


@pytest.fixture(scope="module")
def learned(runs: Runs) -> Run:
    return runs["learned"].result()


def test_the_colocated_sample_learns(learned: Run) -> None:
    assert learned.code == 0, learned.output
    assert learned.rewards[0] < 0.1
    assert learned.rewards[-1] > 0.9


def test_every_step_tells_its_speed(learned: Run) -> None:
    """No peak of a CPU is known, so that no step has an MFU."""
    line = re.compile(r"^step \d+/.*  mfu unknown: .*  idle (\S+) \1  (\w+): \d+% of a step: .+$", re.MULTILINE)
    phases = [phase for _, phase in line.findall(learned.output)]
    assert len(phases) == 30 and set(phases) <= {"generate", "score", "train", "sync", "data"}
    for name in ("rollout/tokens_per_second_per_gpu", "train/tokens_per_second_per_gpu", "train/tflops_per_gpu"):
        assert all(value > 0 for _, value in tensorboard(learned.checkpoints, name))
    assert {value for _, value in tensorboard(learned.checkpoints, "rollout/sequences_most")} == {128.0}
    assert all(0 <= value < 1 for _, value in tensorboard(learned.checkpoints, "idle/engines"))


def test_trainer_and_engine_shared_the_logical_gpu(learned: Run) -> None:
    seats = dict(re.findall(r"^(trainer 0|engine 0): (\S+)$", learned.output, re.MULTILINE))
    assert seats["trainer 0"] == seats["engine 0"]


def test_every_proof_was_exact_where_it_can_be(learned: Run) -> None:
    proofs = re.findall(r"weights version (\d+) delivered by shm: (\d+) checksums equal, (\d+) packed or loaded, "
        r"probe within (\S+),", learned.output)
    assert [int(version) for version, *_ in proofs] == [0, 10, 20, 30]
    assert all(int(equal) > 0 and float(probe) < 1e-4 for _, equal, _, probe in proofs)


def test_the_export_loads_and_writes_the_letter(learned: Run) -> None:
    path = learned.checkpoints / "export"
    tokenizer, model = load_tokenizer_of(path), AutoModelForCausalLM.from_pretrained(path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    ids = tokenizer("2 + 3 =", return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :])
    assert text.count("e") >= 14


def test_the_samples_of_a_step_are_kept_and_score_the_same(learned: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(
        path.name for path in (learned.checkpoints / "rollouts").iterdir()
    ) == [f"step-{step}.parquet" for step in (10, 20, 30)]
    assert main(
        ["replay", str(learned.checkpoints), "--step", "20", "--job", str(SAMPLES / "tiny-colocated.yaml")]
    ) == 0
    assert "; 0 of 128 samples differ" in capsys.readouterr().out
    items = replay.read(learned.checkpoints, 20)
    assert f"{sum(item.reward for item in items) / len(items):.3f}" == f"{learned.rewards[19]:.3f}"
    assert {version for item in items for version in item.sample.versions} == {19}


def load_tokenizer_of(path: Path) -> Any:
    from rlhf_api.job import ModelSpec

    return load_tokenizer(ModelSpec(path=str(path)))


def test_resuming_gives_the_same_bits(learned: Run, runs: Runs, tmp_path: Path) -> None:
    """30 steps == 20 + resume + 10: model, optimizer moments, and the rewards on the way."""
    assert [p.name.split(".")[0] for p in sorted(learned.checkpoints.glob("step-*"))] == ["step-20", "step-30"]
    resumed = runs["resumed"].result()
    assert resumed.code == 0, resumed.output
    assert "resuming after step 20" in resumed.output
    assert resumed.rewards == learned.rewards[20:]
    one, other = (
        flat(checkpoint(path, 30) / "policy", tmp_path / f"{index}.pt")
        for index, path in enumerate((learned.checkpoints, resumed.checkpoints))
    )
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def flat(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(checkpoint, scratch)
    return dict(tensors("", torch.load(scratch, weights_only=True)))


def tensors(prefix: str, node: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in node.items() if isinstance(node, dict) else ():
        yield from tensors(f"{prefix}/{name}", value)
    if isinstance(node, torch.Tensor):
        yield prefix, node


def test_separated_with_two_engines_and_two_ranks(runs: Runs) -> None:
    """Two FSDP ranks, two engines in one sync, several updates a step, a KL term, no shared GPU, and an evaluation set.
    """
    done = runs["separated"].result()
    assert done.code == 0, done.output
    seats = re.findall(r"^(?:trainer|engine) \d: (\S+)$", done.output, re.MULTILINE)
    assert len(seats) == len(set(seats)) == 4
    assert len(re.findall(r"delivered by shm", done.output)) == 4
    assert [step for step, _ in tensorboard(done.checkpoints, "eval/held-out/best_reward")] == [0, 2, 3]
    assert all(0 < value <= 8 for _, value in tensorboard(done.checkpoints, "eval/held-out/mean_length"))


def test_ppo_with_a_critic_a_reference_and_a_reward_model_learns(runs: Runs) -> None:
    done = runs["ppo"].result()
    assert done.code == 0, done.output
    assert sum(done.rewards[-5:]) / 5 > sum(done.rewards[:5]) / 5 + 0.2
    seats = dict(re.findall(r"^(trainer 0|engine 0|reward:last-letter 0): (\S+)$", done.output, re.MULTILINE))
    assert seats["trainer 0"] == seats["engine 0"] != seats["reward:last-letter 0"]
    assert {part.name for part in checkpoint(done.checkpoints, 30).iterdir() if part.is_dir()} == {"policy", "critic"}


def test_sigterm_saves_and_exits_143(tiny: Path, tmp_path: Path) -> None:
    """Without vLLM; test_engine_loss.py ends a run with engines in the same way."""
    manifest = changed(tmp_path, rollout={"engine": "hf"})
    process = subprocess.Popen(
        command(manifest, tiny, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    assert process.stdout is not None
    start, seen = time.monotonic(), []
    for text in process.stdout:
        seen.append(text)
        assert time.monotonic() - start < DEADLINE, "".join(seen)
        if text.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, "".join(seen)
    steps = [int(match[1]) for text in seen if (match := re.match(r"step (\d+)/", text))]
    assert (tmp_path / "latest").read_text() == checkpoint(tmp_path, steps[-1]).name


def test_a_missing_model_ends_the_run_before_any_engine(runs: Runs) -> None:
    done = runs["no-model"].result()
    assert done.code == 64
    assert "BadSpec: spec.model.path: " in done.output and "no such directory" in done.output


def test_an_unknown_engine_argument_is_named(runs: Runs) -> None:
    done = runs["typo"].result()
    assert done.code == 64
    words = "vLLM 0.32.0 has no such argument; close to it: max_model_len"
    assert f"spec.rollout.engineArgs.max_modle_len: {words}" in done.output


def test_a_checkpoint_of_another_model_is_refused(runs: Runs) -> None:
    """The same shape under another path is another model, whatever generates."""
    done = runs["of-another"].result()
    assert done.code == 65
    assert "is of another model" in done.output
