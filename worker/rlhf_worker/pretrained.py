"""What can be said of a checkpoint without its weights. Cheap to import: transformers comes with the first call."""

import json
import pickle
import shutil
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_api.job import ModelSpec, PolicySpec
from rlhf_worker.errors import BadSpec, Call, explained

if TYPE_CHECKING:
    from torch.nn import ModuleList
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LFS = b"version https://git-lfs.github.com/spec/"
GENERATION = "generation_config.json"


def model_field(role: str) -> str:
    """Where the spec names the model of a role."""
    if role.startswith("reward:"):
        return f"spec.rewards[{role.removeprefix('reward:')}].model.path"
    return "spec.model.path" if role == "policy" else f"spec.{role}.model.path"


def location(spec: ModelSpec) -> str:
    """The model's directory, or its hub id, as libraries take it."""
    return str(Path(spec.path).expanduser()) if spec.path.startswith("~") else spec.path


def is_directory(spec: ModelSpec) -> bool:
    """And no hub id."""
    return spec.path.startswith(("/", "./", "../", "~")) or Path(spec.path).is_dir()


def require_path(spec: ModelSpec, field: str = "spec.model.path") -> None:
    """A path must be there with a config; a hub id is left to transformers. Raises BadSpec, which names `field`."""
    path = Path(location(spec))
    if is_directory(spec) and not (path / "config.json").is_file():
        why = "the directory has no config.json" if path.is_dir() else "no such directory"
        raise BadSpec(
            f"{field}: {spec.path}: {why}; mount the volume that holds the checkpoint in every pod (pods.*.volumes), "
            "or correct the path"
        )
    for name in ("config.json", "tokenizer.json"):
        refuse_pointer(path / name, field)


def load_config(spec: ModelSpec, field: str = "spec.model.path") -> "PreTrainedConfig":
    """Raises BadSpec for what cannot be read or the trainer does not compute, Passing where the hub does not answer."""
    require_path(spec, field)
    from transformers import AutoConfig

    with explained(Call.CONFIG, f"{field}: {spec.path}"):
        config = AutoConfig.from_pretrained(location(spec), trust_remote_code=spec.trust_remote_code)
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise BadSpec(
            f"{field}: {spec.path}: its weights are quantised (quantization_config of config.json: {method}), which "
            "are neither trained nor synced: use the checkpoint that it was made from, in bfloat16"
        )
    return config


def embedding_rows(spec: ModelSpec) -> int:
    """Tokens that the model knows: its tokenizer may have more. Raises BadSpec."""
    rows: int = load_config(spec).get_text_config().vocab_size
    return rows


def load_tokenizer(spec: ModelSpec, field: str = "spec.model.path") -> "PreTrainedTokenizerBase":
    """Raises BadSpec, or Passing where the hub does not answer."""
    require_path(spec, field)
    from transformers import AutoTokenizer

    with explained(Call.TOKENIZER, f"{field}: {spec.path}"):
        return AutoTokenizer.from_pretrained(location(spec), trust_remote_code=spec.trust_remote_code)


def check_template(tokenizer: "PreTrainedTokenizerBase", spec: ModelSpec, field: str = "spec.model.path") -> None:
    """One that renders chats must know which template it means. Raises BadSpec."""
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise BadSpec(
            f"{field}: {spec.path}: its tokenizer has chat templates {', '.join(sorted(named))} and none named "
            "default: name one of them default, in its tokenizer_config.json or chat_template files"
        )


def check_vocabulary(spec: ModelSpec, field: str, policy: ModelSpec) -> None:
    """Of a role that is given the policy's tokens. Raises BadSpec."""
    if spec.path != policy.path and load_tokenizer(spec, field).get_vocab() != load_tokenizer(policy).get_vocab():
        raise BadSpec(
            f"{field}: {spec.path} has another vocabulary than {policy.path}, whose tokens it is given: "
            "use a model of the same tokenizer"
        )


def refuse_pointer(file: Path, field: str) -> None:
    """Raises BadSpec where git left a note in place of a large file."""
    if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
        raise BadSpec(
            f"{field}: {file} is a git-lfs pointer and not the file itself: run `git lfs pull` where the checkpoint "
            "was cloned, or download it anew"
        )


def check_weights(spec: ModelSpec, field: str = "spec.model.path") -> None:
    """What can be said of a directory's weights by their headers. A hub's files are whole: they come with digests.

    Raises BadSpec, which names the file.
    """
    root = Path(location(spec))
    if not root.is_dir():
        return
    embedding = _embedding(spec, field)
    for file in _weight_files(root, f"{field}: {spec.path}"):
        refuse_pointer(file, field)
        with explained(Call.WEIGHTS, f"{field}: {file}"):
            if file.suffix != ".safetensors":
                _check_pickled(file)
            elif (rows := _rows(file, embedding[0])) not in (None, embedding[1]):
                raise BadSpec(
                    f"{field}: {file} has an embedding of {rows} tokens, the config.json beside it a vocab_size of "
                    f"{embedding[1]}: they are of different models, correct the one that is wrong"
                )


def _weight_files(root: Path, where: str) -> list[Path]:
    """Those that transformers would load, by its names and in its order. Raises BadSpec."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (root / name).is_file():
            return [root / name]
        index = root / f"{name}.index.json"
        if index.is_file():
            with explained(Call.WEIGHTS, f"{where}: {index.name}"):
                return [root / shard for shard in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    if not [*root.glob("*.safetensors"), *root.glob("*.bin")]:
        raise BadSpec(f"{where}: there are no weights beside its config.json (model.safetensors): copy them there too")
    return []  # of a name that only its own code knows


def _check_pickled(file: Path) -> None:
    """torch's own files: a zip archive, which ends in its contents, or an old pickle. Raises OSError, ValueError."""
    with file.open("rb") as opened:
        if not zipfile.is_zipfile(opened):
            opened.seek(0)
            if opened.read(1) != pickle.PROTO:
                raise ValueError("neither an archive of torch nor a pickle: it is cut off, or something else")


def _embedding(spec: ModelSpec, field: str) -> tuple[str, int]:
    """Name and rows of the input embedding, as the config has it; no name where the model does not tell it."""
    lm = skeleton(spec, field)
    with suppress(NotImplementedError):
        weight = getattr(lm.get_input_embeddings(), "weight", None)
        names = [name for name, parameter in lm.named_parameters() if parameter is weight]
        return (names[0], len(lm.get_parameter(names[0]))) if names else ("", 0)
    return "", 0


def _rows(file: Path, name: str) -> int | None:
    """Of the tensor, where the file has it, with or without the base model's prefix. Raises SafetensorError."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        keys = {name, name.partition(".")[2], f"model.{name}"} & set(opened.keys()) if name else set()
        return int(opened.get_slice(keys.pop()).get_shape()[0]) if keys else None


def identity(spec: PolicySpec, config: "PreTrainedConfig") -> dict[str, Any]:
    """What makes a checkpoint belong to this model: its path, its shape and its adapters."""
    shape = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )
    return {
        "path": spec.path, "lora": spec.lora and spec.lora.to_dict(),
        **{name: getattr(config, name, None) for name in shape}
    }


@cache  # one start asks for it several times, and it holds no memory
def skeleton(spec: ModelSpec, field: str = "spec.model.path") -> "PreTrainedModel":
    """The whole model without its weights, to look at. Raises BadSpec for one that the role of `field` cannot be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = load_config(spec, field)
    kind: Any = AutoModelForSequenceClassification if field.startswith("spec.rewards") else AutoModelForCausalLM
    with explained(Call.MODEL, f"{field}: {spec.path}"), torch.device("meta"):
        lm: PreTrainedModel = kind.from_config(config, trust_remote_code=spec.trust_remote_code)
    return lm


def export(lm: "PreTrainedModel", spec: ModelSpec, weights: dict[str, Any], directory: Path) -> None:
    """The model with these weights; and its generation config as it came, since transformers refuses to write some.

    Raises BadSpec, Passing.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    with explained(Call.EXPORT, f"spec.model.path: {spec.path}"):
        given, lm.generation_config = lm.generation_config, GenerationConfig()
        try:
            lm.save_pretrained(directory, state_dict=weights)
        finally:
            lm.generation_config = given
        (directory / GENERATION).unlink(missing_ok=True)
        came = cached_file(location(spec), GENERATION, _raise_exceptions_for_missing_entries=False)
        if came is not None:
            shutil.copyfile(came, directory / GENERATION)


def export_tokenizer(spec: ModelSpec, directory: Path) -> None:
    """Raises BadSpec, Passing."""
    with explained(Call.EXPORT, f"spec.model.path: {spec.path}"):
        load_tokenizer(spec).save_pretrained(directory)


def backbone(lm: "PreTrainedModel") -> "PreTrainedModel":
    """What is under the head. transformers' `base_model` does not know Llama 4's."""
    below: PreTrainedModel = getattr(lm, "model", lm) if lm.base_model is lm else lm.base_model
    return below


def decoder_layers(lm: "PreTrainedModel") -> "ModuleList":
    """Raises BadSpec for a model that names them otherwise."""
    from torch.nn import ModuleList

    base = backbone(lm)
    places = [(place, name) for place in (base, base.get_decoder()) for name in ("layers", "h", "blocks")]
    found = next((getattr(*place) for place in places if hasattr(*place)), None)
    if not isinstance(found, ModuleList):
        raise BadSpec(f"{lm.config.name_or_path}: {type(base).__name__} has no list of decoder layers, by which the "
            "trainer would shard it")
    return found


def adapted(spec: PolicySpec) -> list[str]:
    """Last part of the names of the linear layers that get adapters. Raises BadSpec."""
    from torch.nn import Linear

    assert spec.lora is not None
    there = sorted(
        {
            name.rpartition(".")[2]
            for name, layer in decoder_layers(skeleton(spec)).named_modules() if isinstance(layer, Linear)
        }
    )
    wanted = list(spec.lora.target_modules or there)
    if wrong := [name for name in wanted or ["of torch.nn.Linear"] if name not in there]:
        raise BadSpec(f"spec.model.lora.targetModules: the decoder of {spec.path} has no linear layers "
            f"{', '.join(wrong)}; it has {', '.join(there) or 'none'}")
    return wanted


def context_length(config: "PreTrainedConfig") -> int | None:
    """Positions that the model was made for; None when its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def make_readable(directory: Path) -> None:
    """For every user: safetensors writes files for its own user only."""
    for file in directory.iterdir():
        file.chmod(0o755 if file.is_dir() else 0o644)
