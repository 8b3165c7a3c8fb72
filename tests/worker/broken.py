"""Checkpoints as users bring them: each function breaks a copy of the tiny model."""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
Break = Callable[[Path], Any]


def edit(name: str, **values: Any) -> Break:
    def work(path: Path) -> None:
        (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | values))

    return work


def become(name: str, content: bytes | str) -> Break:
    def work(path: Path) -> None:
        (path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return work


def cut(name: str, by: int) -> Break:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-by])


def gone(*names: str) -> Break:
    def work(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return work


def pickled(content: bytes) -> Break:
    """torch's older format in place of safetensors."""
    return lambda path: (gone("model.safetensors")(path), become("pytorch_model.bin", content)(path))


def cut_archive(path: Path) -> None:
    gone("model.safetensors")(path)
    with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 4000)
    cut("pytorch_model.bin", 100)(path)


def lacks_a_shard(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    become("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": shards}))(path)


def newer_tokenizer(path: Path) -> None:
    whole = json.loads((path / "tokenizer.json").read_text())
    become("tokenizer.json", json.dumps(whole | {"model": whole["model"] | {"type": "Quantum"}}))(path)


def other(model_type: str) -> Break:
    return become("config.json", json.dumps({"model_type": model_type}))


# By what is wrong: how it becomes so, and the words that name file and reason, of config.json and the weights.
CHECKPOINTS: Mapping[str, tuple[Break, str]] = {
    "weights a git-lfs pointer": (
        become("model.safetensors", POINTER),
        r"model\.safetensors is a git-lfs pointer.*git lfs pull",
    ),
    "weights cut": (
        cut("model.safetensors", 1000),
        r"model\.safetensors: its weights cannot be loaded: SafetensorError: .*not fully covered",
    ),
    "weights cut in their header": (
        cut("model.safetensors", 170_000),
        r"model\.safetensors: its weights cannot be loaded: SafetensorError",
    ),
    "weights empty": (become("model.safetensors", b""), r"model\.safetensors: .*SafetensorError: .*header too small"),
    "no weights": (gone("model.safetensors"), r"there are no weights beside its config\.json"),
    "a shard lacks": (lacks_a_shard, r"model-00002-of-00002\.safetensors: .*FileNotFoundError"),
    "a pickle broken": (
        pickled(b"not a pickle at all"),
        r"pytorch_model\.bin: .*neither an archive of torch nor a pickle",
    ),
    "a pickle empty": (pickled(b""), r"pytorch_model\.bin: .*neither an archive of torch nor a pickle"),
    "a pickle a git-lfs pointer": (pickled(POINTER.encode()), r"pytorch_model\.bin is a git-lfs pointer"),
    "a pickle cut": (cut_archive, r"pytorch_model\.bin: .*neither an archive of torch nor a pickle"),
    "config a git-lfs pointer": (become("config.json", POINTER), r"config\.json is a git-lfs pointer"),
    "config no text": (become("config.json", b"\xff\xfe\x00"), r"cannot read its config: OSError: .*not a valid JSON"),
    "config a list": (become("config.json", "[1]"), r"cannot read its config: ValueError"),
    "bitsandbytes": (
        edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantised .*bitsandbytes",
    ),
    "awq": (
        edit("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "quantised .*awq.*use the checkpoint that it was made",
    ),
    "gptq": (edit("config.json", quantization_config={"quant_method": "gptq", "bits": 4}), "quantised .*gptq"),
    "another vocab_size": (
        edit("config.json", vocab_size=96),
        r"an embedding of 81 tokens, the config\.json beside it a vocab_size of 96",
    ),
    "a number as text": (
        edit("config.json", rms_norm_eps="1e-6"),
        "cannot read its config: StrictDataclass.*rms_norm_eps.*expected float",
    ),
    "layers as text": (
        edit("config.json", num_hidden_layers="2"),
        "cannot read its config: StrictDataclass.*num_hidden_layers",
    ),
    "heads that do not divide": (
        edit("config.json", num_attention_heads=3),
        "cannot read its config: StrictDataclass.*attention heads",
    ),
    "an activation unknown": (
        edit("config.json", hidden_act="nope"),
        "cannot make this model of its config: KeyError: 'nope'",
    ),
    "a padding beyond the vocabulary": (
        edit("config.json", pad_token_id=500),
        "cannot make this model of its config: AssertionError",
    ),
    "a type unknown": (
        edit("config.json", model_type="nope"),
        "cannot read its config: ValueError: .*model type `nope`",
    ),
    "qwen2_5_vl": (other("qwen2_5_vl"), "cannot make this model of its config: ValueError: Unrecognized configuration"),
    "t5": (other("t5"), "cannot make this model of its config: ValueError: Unrecognized configuration"),
    "clip": (other("clip"), "cannot make this model of its config: ValueError: Unrecognized configuration"),
}
TOKENIZERS: Mapping[str, tuple[Break, str]] = {
    "newer": (newer_tokenizer, "cannot read its tokenizer: Exception: data did not match any variant of untagged enum"),
    "a git-lfs pointer": (become("tokenizer.json", POINTER), r"tokenizer\.json is a git-lfs pointer"),
    "cut": (cut("tokenizer.json", 100), "cannot read its tokenizer: "),
    "its config broken": (become("tokenizer_config.json", "{"), "cannot read its tokenizer: JSONDecodeError"),
    "none": (gone("tokenizer.json", "tokenizer_config.json"), "cannot read its tokenizer: ValueError"),
}
