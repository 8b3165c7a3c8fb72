"""What can be said of a checkpoint without its weights. Cheap to import: transformers comes with the first call."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_api.job import ModelSpec, PolicySpec
from rlhf_worker.errors import BadSpec

if TYPE_CHECKING:
    from torch.nn import ModuleList
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def model_field(role: str) -> str:
    """Where the spec names the model of a role."""
    if role.startswith("reward:"):
        return f"spec.rewards[{role.removeprefix('reward:')}].model.path"
    return "spec.model.path" if role == "policy" else f"spec.{role}.model.path"


def require_path(spec: ModelSpec, field: str = "spec.model.path") -> None:
    """A path must be there with a config; a hub id is left to transformers. Raises BadSpec, which names `field`."""
    looks_local = spec.path.startswith(("/", "./", "../", "~"))
    if looks_local and not (Path(spec.path).expanduser() / "config.json").is_file():
        there = "the directory has no config.json" if Path(spec.path).is_dir() else "no such directory"
        raise BadSpec(f"{field}: {spec.path}: {there}; mount the volume that holds the checkpoint in every pod (pods.*.volumes), or correct the path")


def load_config(spec: ModelSpec, field: str = "spec.model.path") -> "PreTrainedConfig":
    """Raises BadSpec for a checkpoint or hub id that cannot be read."""
    require_path(spec, field)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BadSpec(f"{field}: {spec.path}: transformers cannot read its config: {error}") from error
    return config


def embedding_rows(spec: ModelSpec) -> int:
    """Tokens that the model knows: its tokenizer may have more. Raises BadSpec."""
    rows: int = load_config(spec).get_text_config().vocab_size
    return rows


def load_tokenizer(spec: ModelSpec, field: str = "spec.model.path") -> "PreTrainedTokenizerBase":
    """Raises BadSpec."""
    require_path(spec, field)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BadSpec(f"{field}: {spec.path}: transformers cannot read its tokenizer: {error}") from error


def identity(spec: PolicySpec, config: "PreTrainedConfig") -> dict[str, Any]:
    """What makes a checkpoint belong to this model: its path, its shape and its adapters."""
    shape = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {"path": spec.path, "lora": spec.lora and spec.lora.to_dict(), **{name: getattr(config, name, None) for name in shape}}


@cache  # one start asks for it several times, and it holds no memory
def skeleton(spec: ModelSpec) -> "PreTrainedModel":
    """The whole model without its weights, to look at. Raises BadSpec."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(spec), trust_remote_code=spec.trust_remote_code)
        return made


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
        raise BadSpec(f"{lm.config.name_or_path}: {type(base).__name__} has no list of decoder layers, by which the trainer would shard it")
    return found


def adapted(spec: PolicySpec) -> list[str]:
    """Last part of the names of the linear layers that get adapters. Raises BadSpec."""
    from torch.nn import Linear

    assert spec.lora is not None
    there = sorted({name.rpartition(".")[2] for name, layer in decoder_layers(skeleton(spec)).named_modules() if isinstance(layer, Linear)})
    wanted = list(spec.lora.target_modules or there)
    if wrong := [name for name in wanted or ["of torch.nn.Linear"] if name not in there]:
        raise BadSpec(f"spec.model.lora.targetModules: the decoder of {spec.path} has no linear layers {', '.join(wrong)}; it has {', '.join(there) or 'none'}")
    return wanted


def context_length(config: "PreTrainedConfig") -> int | None:
    """Positions that the model was made for; None when its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def make_readable(directory: Path) -> None:
    """For every user: safetensors writes files for its own user only."""
    for file in directory.iterdir():
        file.chmod(0o755 if file.is_dir() else 0o644)
