"""What the real vLLM refuses before it loads anything, told with the field."""

import asyncio
import json
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import StableLmConfig

from hack.tiny_model import tokenizer, write
from rlhf_worker.engines.arguments import check_known
from rlhf_worker.engines.engine import Engine, captures_more
from rlhf_worker.errors import BadSpec
from tests.worker.configs import run_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def engine(monkeypatch: pytest.MonkeyPatch, path: Path, lora: dict[str, Any] | None = None, **rollout: Any) -> Engine:
    monkeypatch.setattr(Engine, "_environment", lambda *_: None)  # which is of a Ray worker
    model = {"path": str(path), "dtype": "float32"} | ({} if lora is None else {"lora": lora})
    placement = {"mode": "Separated" if rollout.get("staleness") else "Colocated"}
    config = run_config(model=model, rollout={"maxTokens": 16, **rollout}, placement=placement)
    return Engine(config, 0, "cpu", [0], [], 1)


def started(monkeypatch: pytest.MonkeyPatch, path: Path, **rollout: Any) -> None:
    """As far as it goes before a model is loaded."""
    asyncio.run(engine(monkeypatch, path, **rollout).prepare("shm"))


def test_a_model_class_that_vllm_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["NopeForCausalLM"]}))
    with pytest.raises(
        BadSpec,
        match=r"spec\.model\.path: .*: vLLM \S+ does not know its model class \['NopeForCausalLM'\]: use a model",
    ):
        started(monkeypatch, tmp_path)


def test_vllm_looks_at_the_model_s_class_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its default it imports itself and torch once more, in another; only what cannot be imported is left to that.
    """
    from vllm.model_executor.models import ModelRegistry, registry

    def another(_: Any) -> Any:
        raise RuntimeError("another process")

    write(tmp_path)
    (name,) = json.loads((tmp_path / "config.json").read_text())["architectures"]
    whole = registry._LazyRegisteredModel("vllm.model_executor.models.llama", name)
    broken = registry._LazyRegisteredModel("rlhf_worker.no_such_module", name)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setattr(registry, "_run_in_subprocess", another)
    for entry in (whole, broken):
        registry._try_inspect_model_cls.cache_clear()
        monkeypatch.setitem(ModelRegistry.models, name, entry)
        with pytest.raises(BadSpec, match="does not know its model class") if entry is broken else nullcontext():
            started(monkeypatch, tmp_path)
    registry._try_inspect_model_cls.cache_clear()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"max_num_seqs": 0}, "greater than or equal to 1"),
        ({"max_num_batched_tokens": 4}, "max_num_batched_tokens"),
        ({"speculative_config": {"method": "nope"}}, ""),
    ],
)
def test_an_argument_that_vllm_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], words: str
) -> None:
    write(tmp_path)
    with pytest.raises(BadSpec, match=rf"(?s)spec\.rollout\.engineArgs: vLLM \S+ refuses them: .*{words}"):
        started(monkeypatch, tmp_path, engineArgs=args)


def stablelm(path: Path) -> None:
    StableLmConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        architectures=["StableLmForCausalLM"],
    ).save_pretrained(path)
    tokenizer().save_pretrained(path)


def test_a_model_class_that_vllm_serves_without_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stablelm(tmp_path)
    asyncio.run(engine(monkeypatch, tmp_path).prepare("shm"))
    said = (rf"spec\.model\.lora: vLLM serves StableLmForCausalLM, the class of {tmp_path}, without adapters: remove "
        r"spec\.model\.lora, or use another model")
    with pytest.raises(BadSpec, match=said):
        asyncio.run(engine(monkeypatch, tmp_path, lora={}).prepare("adapter"))


def test_transformers_own_model_of_that_class_takes_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stablelm(tmp_path)
    asyncio.run(engine(monkeypatch, tmp_path, lora={}, engineArgs={"model_impl": "transformers"}).prepare("adapter"))


def test_arguments_are_held_against_vllms_own_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, with what is wrong of the model; what vLLM itself starts with is of its types."""
    write(tmp_path)
    wrong = {
        "max_num_seqs": "8",
        "enforce_eager": "yes",
        "kv_cache_dtype": "fp9",
        "max_num_sequences": 1,
        "max_model_len": "4096",
    }
    with pytest.raises(BadSpec) as told:
        asyncio.run(engine(monkeypatch, tmp_path, engineArgs=wrong).prepare("shm"))
    assert all(f"spec.rollout.engineArgs.{name}" in str(told.value) for name in wrong), told.value
    right = {
        "max_num_seqs": 8,
        "compilation_config": {"mode": 0},
        "enable_prefix_caching": False,
        "max_num_batched_tokens": None,
    }
    asyncio.run(engine(monkeypatch, tmp_path, engineArgs=right).prepare("shm"))
    import vllm

    known = {field.name: field.type for field in fields(vllm.AsyncEngineArgs)}
    given = {
        name: value
        for name, value in vars(vllm.AsyncEngineArgs()).items()
        if isinstance(value, bool | int | float | str | None)
    }
    check_known(given, known, "")


@pytest.mark.parametrize(
    ("given", "at_a_time", "graphs", "wanted"),
    [
        ({}, 1024, 512, 1024),
        ({}, 256, 512, None),
        ({}, 1024, 0, None),  # eager: there are none
        ({"max_cudagraph_capture_size": 64}, 1024, 64, 64),
        ({"cudagraph_capture_sizes": [1, 8]}, 1024, 8, None),
        ({"compilation_config": {"max_cudagraph_capture_size": 64}}, 1024, 64, None),
        ({"compilation_config": {"cudagraph_capture_sizes": [1, 8]}}, 1024, 8, None),
    ],
)
def test_cuda_graphs_for_all_that_run_at_a_time_unless_the_user_says_for_how_many(
    given: dict[str, Any], at_a_time: int, graphs: int, wanted: int | None
) -> None:
    from vllm import AsyncEngineArgs

    args = AsyncEngineArgs(model="none", **given)
    made: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=at_a_time),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=graphs),
    )
    assert captures_more(args, made) is (wanted == at_a_time)
    assert args.max_cudagraph_capture_size == wanted
