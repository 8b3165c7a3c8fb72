"""init and convert: what they write is valid, and what they cannot say they tell."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from rlhf_api.parse import parse_job
from rlhf_cli import convert_tables as tables
from rlhf_cli.app import app
from rlhf_cli.convert import convert, framework_of, manifest
from rlhf_cli.convert_read import flat
from rlhf_cli.convert_rules import FRAMEWORKS
from rlhf_cli.exits import Exit
from rlhf_cli.init import Answers, asked
from rlhf_cli.init import manifest as made_by_init
from rlhf_cli.manifest import schema


def ran(*words: str | Path, **given: Any) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], **given)


def spec_of(text: str) -> dict[str, Any]:
    raw = yaml.safe_load(text)
    parse_job(raw)
    found: dict[str, Any] = raw["spec"]
    return found


# init


@pytest.mark.parametrize(
    ("words", "has"),
    [
        ([], {"data": {"reasoningGym": {"task": "basic_arithmetic"}}}),
        (["--data", "/d/a.jsonl", "--reward", "pkg.mod:score"], {"data": {"jsonl": {"path": "/d/a.jsonl"}}}),
        (["--data", "openai/gsm8k", "--reward", "math"], {"data": {"dataset": {"path": "openai/gsm8k"}}}),
        (["--data", "/d/a.parquet", "--reward", "http://judge:80/x"], {"data": {"parquet": {"path": "/d/a.parquet"}}}),
        (["--gpus", "8", "--separated"], {"trainer": {"gpus": 4, "steps": 100}, "rollout": {"engines": 4}}),
        (["--gpus", "8"], {"trainer": {"gpus": 8, "steps": 100}, "rollout": {"engines": 8}}),
        (["--algorithm", "dapo", "--steps", "7"], {"algorithm": {"name": "dapo"}}),
    ],
)
def test_what_init_writes_is_valid(words: list[str], has: dict[str, Any]) -> None:
    result = ran("init", *words)
    assert result.exit_code == 0, result.output
    assert spec_of(result.stdout).items() >= has.items()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "x.jsonl"], "--reward is missing, and nobody can be asked here"),
        (["--data", "/d/x.jsonl", "--reward", "score"], "write a .py file, module:function"),
        (["--algorithm", "grpoo"], "did you mean grpo?"),
        (["--storage", "much"], "spec.checkpoint.claim.size"),
        (["--name", "Maths!"], "metadata.name"),
        (["--gpus", "0"], "--gpus"),
    ],
)
def test_what_init_does_not_take(words: list[str], told: str) -> None:
    result = ran("init", *words)
    assert (result.exit_code, told in result.stderr) == (Exit.USAGE, True), result.output


def test_init_takes_data_and_reward_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_text("{}")
    Path("my_reward.py").write_text("def reward(prompt, completion, **row):\n    return 1.0\n")
    result = ran("init", "--data", "train.jsonl", "--reward", "my_reward.py", "--separated",
        "--mount", "models:/models", "--mount", "/mnt/data:/data", "--set", "rollout.maxTokens=2048",
        "--set", "spec.trainer.learningRate=5e-3",
        "--set", "algorithm.kl={coefficient: 0.1}")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "kubectl rlhf run -f FILE --with train.jsonl" in result.stdout.splitlines()[0]
    spec = spec_of(result.stdout)
    assert spec["data"] == {"jsonl": {"path": "/files/train.jsonl"}}
    assert spec["rewards"] == [{"name": "my-reward", "type": "python", "code": Path("my_reward.py").read_text()}]
    assert (spec["rollout"]["maxTokens"], spec["trainer"]["learningRate"]) == (2048, 0.005)
    assert spec["algorithm"] == {"name": "grpo", "kl": {"coefficient": 0.1}}
    assert set(spec["pods"]) == {"head", "trainer", "rollout"}
    claim, node = spec["pods"]["rollout"]["volumes"]
    assert claim["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    assert node["hostPath"]["path"] == "/mnt/data"
    assert [one["mountPath"] for one in spec["pods"]["head"]["volumeMounts"]] == ["/models", "/data"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "absent.jsonl", "--reward", "math"], "absent.jsonl: no such file here"),
        (["--data", "/d/a.jsonl", "--reward", "absent.py"], "absent.py: No such file"),
        (["--data", "/d/a.jsonl", "--reward", "torn.py"], "torn.py, line 1"),
        (["--data", "/d/a.jsonl", "--reward", "score.py"], "score.py defines rewards: it must define reward("),
        (["--mount", "models"], "write CLAIM:/path"),
        (["--mount", "models:models"], "write CLAIM:/path"),
        (["--set", "rollout.maxTokens"], "such as rollout.maxTokens=2048"),
        (["--set", "rewards.name=a"], "write a field"),
        (["--set", "rollout.maxTokens=["], "is no YAML"),
        (["--set", "rollout.maxTokns=3"], "did you mean maxTokens?"),
        (["--set", "rollout.maxTokens=many"], "spec.rollout.maxTokens"),
    ],
)
def test_what_init_says_of_a_wrong_file_mount_or_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("torn.py").write_text("def reward(:")
    Path("score.py").write_text("def rewards(prompt, completion, **row):\n    return 1.0\n")
    result = ran("init", *words)
    assert (result.exit_code, told in result.stderr) == (Exit.USAGE, True), result.output


def test_init_asks_for_what_no_flag_tells() -> None:
    questions = []

    def ask(question: str, default: str) -> str:
        questions.append(question)
        return default or "pkg:score"

    answers = asked(Answers(name="maths", data="/d/a.jsonl", gpus=2), ask)
    assert [one.split(":")[0].split(",")[0] for one in questions] == [
        "Model", "Reward", "Training steps", "Volume for the checkpoints",
    ]
    assert spec_of(made_by_init(answers))["trainer"] == {"gpus": 2, "steps": 100}


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "job.yaml"
    assert ran("init", "--out", out).stdout == f"{out}\n"
    again = ran("init", "--out", out)
    assert (again.exit_code, "is there already" in again.stderr) == (Exit.USAGE, True)


# convert

TRL = """
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: trl-lib/DeepMath-103K
per_device_train_batch_size: 4
gradient_accumulation_steps: 8
num_generations: 8
max_completion_length: 1024
beta: 0.04
epsilon: 0.2
epsilon_high: 0.28
loss_type: grpo
learning_rate: 1.0e-5
lr_scheduler_type: cosine
max_steps: 500
use_peft: true
lora_r: 32
vllm_mode: colocate
reward_funcs: [accuracy_reward]
report_to: wandb
"""
VERL = """#!/usr/bin/env bash
set -x
python3 -m verl.trainer.main_ppo \\
    algorithm.adv_estimator=grpo \\
    data.train_files=$HOME/data/gsm8k/train.parquet data.val_files=/data/test.parquet \\
    data.train_batch_size=1024 data.max_prompt_length=512 data.max_response_length=1024 \\
    actor_rollout_ref.model.path=Qwen/Qwen3-8B \\
    actor_rollout_ref.actor.optim.lr=1e-6 \\
    actor_rollout_ref.actor.ppo_mini_batch_size=256 \\
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    actor_rollout_ref.actor.kl_loss_type=low_var_kl \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.n=5 \\
    +actor_rollout_ref.rollout.novel=1 \\
    trainer.n_gpus_per_node=8 trainer.nnodes=1 trainer.total_epochs=15 trainer.test_freq=5 $@
"""
OPENRLHF = """ray job submit --address="http://127.0.0.1:8265" -- python3 -m openrlhf.cli.train_ppo_ray \\
   --actor_num_nodes 1 --actor_num_gpus_per_node 8 --vllm_num_engines 4 --vllm_tensor_parallel_size 2 \\
   --colocate_all_models --pretrain OpenRLHF/Llama-3-8b --reward_pretrain OpenRLHF/Llama-3-8b-rm \\
   --prompt_data OpenRLHF/prompt-collection --input_key context_messages --apply_chat_template \\
   --rollout_batch_size 128 --n_samples_per_prompt 8 --train_batch_size 256 --max_epochs 1 \\
   --advantage_estimator gae --init_kl_coef 0.01 --actor_learning_rate 5e-7 --critic_learning_rate 9e-6 \\
   --eps_clip_low_high 0.2 0.3 --save_path ./ckpt --zero_stage 3 --bf16
"""


def test_trl() -> None:
    made = convert("trl", yaml.safe_load(TRL), gpus=2)
    text, words = manifest(made, "maths")
    spec = spec_of(text)
    assert spec["model"] == {"path": "Qwen/Qwen2.5-1.5B-Instruct", "lora": {"rank": 32}}
    assert spec["algorithm"] == {"kl": {"coefficient": 0.04}, "clipHigh": 0.28, "clipLow": 0.2,
        "lossAggregation": "sequences"}
    assert spec["rollout"] == {"maxTokens": 1024, "samplesPerPrompt": 8, "promptsPerStep": 8, "engines": 2}
    assert spec["trainer"] == {"learningRate": 1e-5, "learningRateSchedule": "cosine", "steps": 500, "gpus": 2}
    assert "not carried over: reward_funcs = ['accuracy_reward']" in words
    assert "not carried over: report_to = wandb" in words
    assert "# rewards: functions are not carried over" in text
    assert "left to trl's defaults, which are others here: data.maxPromptTokens" in words


def test_verl(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(VERL)
    result = ran("convert", path, "--name", "gsm")
    assert result.exit_code == 0, result.output
    spec = spec_of(result.stdout)
    assert spec["rollout"] == {
        "maxTokens": 1024, "promptsPerStep": 1024, "samplesPerPrompt": 5, "tensorParallelSize": 2, "engines": 4,
    }
    assert spec["trainer"] == {"learningRate": 1e-6, "updatesPerStep": 4, "gpus": 8, "steps": 100}
    assert spec["algorithm"] == {"name": "grpo", "kl": {"coefficient": 0.001, "place": "loss", "estimator": "k3"}}
    assert spec["data"]["parquet"] == {"path": "$HOME/data/gsm8k/train.parquet"}
    assert spec["evaluation"][0]["everySteps"] == 5
    for words in ("rollout.novel = 1", "trainer.total_epochs = 15", "trainer.steps: epochs of the data"):
        assert words in result.stderr


def test_openrlhf(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text(OPENRLHF)
    result = ran("convert", path, "--out", tmp_path / "job.yaml")
    assert result.exit_code == 0, result.output
    spec = spec_of((tmp_path / "job.yaml").read_text())
    assert spec["algorithm"] == {"kl": {"coefficient": 0.01, "place": "reward"}, "name": "ppo", "clipLow": 0.2,
        "clipHigh": 0.3}
    assert spec["rewards"] == [{"name": "model-0", "type": "model", "model": {"path": "OpenRLHF/Llama-3-8b-rm"}}]
    assert spec["trainer"] == {"epochs": 1, "learningRate": 5e-7, "updatesPerStep": 4, "gpus": 8, "steps": 100}
    assert spec["data"] == {"promptField": "context_messages", "chatTemplate": True,
        "dataset": {"path": "OpenRLHF/prompt-collection"}}
    assert spec["critic"] == {"learningRate": 9e-6}
    assert "not carried over: zero_stage = 3" in result.stderr


@pytest.mark.parametrize(
    ("framework", "given", "spec", "told"),
    [
        ("trl", {"loss_type": "sapo"}, {}, "not carried over: loss_type = sapo"),
        ("trl", {"importance_sampling_level": "sequence_token"}, {}, "not carried over: importance_sampling_level"),
        ("trl", {"beta": 0}, {}, "loss_type is not given"),
        ("trl", {"loss_type": "dapo"}, {"algorithm": {"lossAggregation": "tokens"}}, "rewards: functions"),
        ("trl", {"bf16": False}, {"model": {"dtype": "float32", "path": "my/model"}}, "rewards: functions"),
        ("trl", {"use_vllm": False}, {}, "use_vllm false"),
        ("trl", {"vllm_importance_sampling_correction": False}, {"algorithm": {"correction": {"tokenCap": 0}}}, "rew"),
        ("verl", {"algorithm.gamma": 0.9, "algorithm.adv_estimator": "grpo"}, {}, "grpo has no critic: left out is"),
        ("verl", {"trainer.nnodes": 1}, {"algorithm": {"name": "ppo"}}, "algorithm.adv_estimator is not given"),
        ("verl", {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_type": "abs"}, {},
            "algorithm.kl.estimator: abs is none of"),
        ("verl", {"data.val_files": ["/a.parquet", "/b.parquet"]}, {}, "evaluation: 2 files are given"),
        ("openrlhf", {"critic_learning_rate": 1e-5}, {"critic": {"learningRate": 1e-5}}, "advantage_estimator is not"),
    ],
)  # fmt: skip
def test_nothing_is_dropped_without_a_word(
    framework: str, given: dict[str, Any], spec: dict[str, Any], told: str,
) -> None:
    made = convert(framework, given, gpus=1)
    text, words = manifest(made, "x")
    assert yaml.safe_load(text)["spec"].items() >= spec.items()
    assert any(told in one for one in words), words


def test_steps_of_a_trl_generation_are_prompts_and_updates() -> None:
    given = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 16,
        "num_generations": 8, "loss_type": "dapo"}
    spec = convert("trl", given, gpus=2).spec
    assert (spec["rollout"]["promptsPerStep"], spec["trainer"]["updatesPerStep"]) == (32, 4)


def test_a_yaml_of_verl_is_read_too() -> None:
    nested = {"data": {"train_files": ["a.jsonl", "b.jsonl"], "train_batch_size": "$B"}, "trainer": {"nnodes": "$N"},
        "actor_rollout_ref": {"model": {"path": "m", "lora_rank": 0, "lora_alpha": 16}, "rollout": {"top_p": 0.9}}}
    given = flat(nested)
    assert framework_of(given) == "verl"
    _, words = manifest(convert("verl", given, None), "x")
    for part in ("data: 2 files are given", "not carried over: trainer.nnodes = $N", "top_p 0.9: in training",
        "not valid yet: spec.rollout.promptsPerStep"):  # fmt: skip
        assert any(part in one for one in words), part


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("hello: world", [], "no configuration of trl, verl, openrlhf"),
        ("'unclosed", [], "neither YAML nor a shell script"),
        ("beta: 0.1", ["--from", "vrel"], "did you mean verl?"),
        ("", [], "no configuration of"),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, text: str, words: list[str], told: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    result = ran("convert", path, *words)
    assert (result.exit_code, told in result.stderr) == (Exit.USAGE, True), result.output


def test_every_target_is_a_field() -> None:
    """Of the CRD; a value that a table gives is one that the field takes."""
    for table in (tables.TRL, tables.VERL, tables.OPENRLHF):
        for name, to in table.items():
            if to.path.startswith("rollout.engineArgs."):
                continue
            node = schema(f"spec.{to.path}")
            assert node, (name, to.path)
            if to.values and "enum" in node:
                assert set(to.values.values()) <= set(node["enum"]), name
    for _, (table, special, _) in FRAMEWORKS.items():
        assert not set(special) & set(table), "one place for each"
