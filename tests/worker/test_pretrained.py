"""What users bring as a model: refused before its weights are read, with field, file and the library's words."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_api.job import ModelSpec, TrainerSpec
from rlhf_worker.errors import BadSpec, Passing
from rlhf_worker.pretrained import export, export_tokenizer, load_config, location, skeleton
from rlhf_worker.trainer.checks import CHECKS
from rlhf_worker.trainer.model import load_policy
from tests.worker.broken import CHECKPOINTS, TOKENIZERS, Break, become, edit, lacks_a_shard
from tests.worker.configs import run_config
from tests.worker.moe import KINDS, write_moe
from tests.worker.rewards import write_reward


@pytest.fixture
def path(tiny: Path, tmp_path: Path) -> Path:
    found = tmp_path / "model"
    shutil.copytree(tiny, found)
    return found


def ranks(path: Path, *names: str, **changes: Any) -> Any:
    """One rank, as checks see it."""
    config = run_config(model={"path": str(path), "dtype": "float32"}, **changes)
    return SimpleNamespace(config=config, names=names or ("policy",), rank=0, world=1, device=torch.device("cpu"))


@pytest.mark.parametrize(("damage", "words"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_broken_checkpoint_is_refused_before_it_is_loaded(path: Path, damage: Break, words: str) -> None:
    damage(path)
    with pytest.raises(BadSpec, match=f"(?s)spec\\.model\\.path: .*{words}"):
        CHECKS["Model"](ranks(path))


@pytest.mark.parametrize(("damage", "words"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_broken_tokenizer_is_refused(path: Path, damage: Break, words: str) -> None:
    damage(path)
    with pytest.raises(BadSpec, match=f"(?s)spec\\.model\\.path: .*{words}"):
        CHECKS["Tokenizer"](ranks(path))


@pytest.mark.parametrize("name", ["weights cut", "a pickle broken", "a shard lacks", "another vocab_size"])
def test_what_breaks_after_the_checks_is_refused_by_the_load(path: Path, name: str) -> None:
    damage, _ = CHECKPOINTS[name]
    damage(path)
    with pytest.raises(BadSpec, match=r"spec\.model\.path: .*: its weights cannot be loaded: "):
        load_policy(ModelSpec(path=str(path)), 1.0, TrainerSpec(steps=1))


def test_good_checkpoints_pass(path: Path) -> None:
    CHECKS["Model"](ranks(path))
    CHECKS["Tokenizer"](ranks(path))
    state = AutoModelForCausalLM.from_pretrained(path).state_dict()
    (path / "model.safetensors").unlink()
    for old in (False, True):
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        CHECKS["Model"](ranks(path))
        load_policy(ModelSpec(path=str(path)), 1.0, TrainerSpec(steps=1))


def test_the_wrong_of_every_role_is_told_at_once(path: Path, tiny: Path, tmp_path: Path) -> None:
    write_reward(tiny, tmp_path / "rm")
    lacks_a_shard(tmp_path / "rm")
    edit("config.json", rms_norm_eps="1e-6")(path)
    rank = ranks(
        path, "policy", "reward:r", rewards=[{"name": "r", "type": "model", "model": {"path": str(tmp_path / "rm")}}]
    )
    with pytest.raises(BadSpec) as told:
        CHECKS["Model"](rank)
    words = str(told.value)
    assert "spec.model.path: " in words and "spec.rewards[r].model.path: " in words and "2 things are wrong" in words


def test_a_reward_models_chat_templates_need_a_default(path: Path, tiny: Path, tmp_path: Path) -> None:
    write_reward(tiny, tmp_path / "rm")
    named = [{"name": "tool_use", "template": "{{messages}}"}, {"name": "rag", "template": "x"}]
    edit("tokenizer_config.json", chat_template=named)(tmp_path / "rm")
    rank = ranks(path, "reward:r", rewards=[{"name": "r", "type": "model", "model": {"path": str(tmp_path / "rm")}}])
    with pytest.raises(
        BadSpec, match=r"spec\.rewards\[r\]\.model\.path: .*chat templates rag, tool_use and none named default"
    ):
        CHECKS["Tokenizer"](rank)


@pytest.mark.parametrize(
    ("role", "changes", "field"),
    [
        ("critic", {"algorithm": {"name": "ppo"}, "critic": {"model": {"path": "/short"}}}, "spec.critic.model.path"),
        (
            "reference",
            {"reference": {"model": {"path": "/short"}}, "algorithm": {"name": "grpo", "kl": {"coefficient": 0.1}}},
            "spec.reference.model.path",
        ),
        (
            "reward:r",
            {"rewards": [{"name": "r", "type": "model", "model": {"path": "/short"}}]},
            "spec.rewards[r].model.path",
        ),
    ],
)
def test_every_roles_context_is_checked_at_the_start(
    path: Path, tiny: Path, tmp_path: Path, role: str, changes: Any, field: str
) -> None:
    write_reward(tiny, tmp_path / "short")
    edit("config.json", max_position_embeddings=31)(tmp_path / "short")
    changed = json.loads(json.dumps(changes).replace("/short", str(tmp_path / "short")))
    with pytest.raises(BadSpec) as told:
        CHECKS["Model"](ranks(path, role, **changed))
    assert (
        "spec.data.maxPromptTokens (16) + spec.rollout.maxTokens (16) is 32, "
        f"but the model at {field} has a context of 31" in str(told.value)
    )
    edit("config.json", max_position_embeddings=32)(tmp_path / "short")
    CHECKS["Model"](ranks(path, role, **changed))


def test_a_role_that_gets_the_policys_tokens_has_its_vocabulary(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(path, other)
    rank = ranks(path, "policy", "critic", algorithm={"name": "ppo"}, critic={"model": {"path": str(other)}})
    CHECKS["Tokenizer"](rank)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(BadSpec, match=r"spec\.critic\.model\.path: .*other has another vocabulary than"):
        CHECKS["Tokenizer"](rank)


GENERATION = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3], "own": {"x": 1}}


@pytest.mark.parametrize("content", [json.dumps(GENERATION, indent=7), "{", json.dumps({"temperature": "hot"}), None])
def test_the_generation_config_is_exported_as_it_came(path: Path, tmp_path: Path, content: str | None) -> None:
    """transformers reads such files, and refuses to write them."""
    (path / "generation_config.json").unlink(missing_ok=True)
    if content is not None:
        become("generation_config.json", content)(path)
    spec, target = ModelSpec(path=str(path)), tmp_path / "out"
    CHECKS["Model"](ranks(path))
    policy = load_policy(spec, 1.0, TrainerSpec(steps=1))
    policy.lm.config.use_cache = False
    export(policy.lm, spec, policy.lm.state_dict(), target)
    export_tokenizer(spec, target)
    written = target / "generation_config.json"
    assert (written.read_text() if written.exists() else None) == content
    assert AutoTokenizer.from_pretrained(target).get_vocab() == AutoTokenizer.from_pretrained(path).get_vocab()
    again = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in policy.lm.state_dict().items())


def test_what_an_export_refuses_is_refused_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any, **__: Any) -> None:
        raise ValueError("this config cannot be written")

    monkeypatch.setattr(type(load_config(ModelSpec(path=str(path)))), "save_pretrained", no)
    with pytest.raises(
        BadSpec,
        match=r"spec\.model\.path: .*: transformers cannot write it again, which an export does: ValueError: this",
    ):
        CHECKS["Model"](ranks(path))


def test_a_path_of_the_home_directory_is_meant_everywhere(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(path.parent))
    rank = ranks(path)
    rank.config = run_config(model={"path": "~/model", "dtype": "float32"})
    assert location(rank.config.model) == str(path)
    CHECKS["Model"](rank)
    CHECKS["Tokenizer"](rank)
    load_policy(rank.config.model, 1.0, TrainerSpec(steps=1))


def test_a_hub_that_does_not_answer_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2
    from transformers import AutoConfig

    def cut(*_: Any, **__: Any) -> None:
        raise OSError("Can't load the configuration") from httpx2.RemoteProtocolError("cut")

    monkeypatch.setattr(AutoConfig, "from_pretrained", cut)
    skeleton.cache_clear()
    for check in ("Model", "Tokenizer"):
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", cut)
        with pytest.raises(
            Passing, match=r"spec\.model\.path: org/name: transformers cannot read its (config|tokenizer): OSError"
        ):
            CHECKS[check](ranks(Path("org/name")))


@pytest.mark.parametrize("kind", KINDS)
def test_models_whose_checkpoints_have_another_form_pass(tmp_path: Path, kind: str) -> None:
    write_moe(tmp_path, kind)
    CHECKS["Model"](ranks(tmp_path))
