"""A decoder's shape from its config.json: parameters, bytes and FLOPs. Pure."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_api import memory
from rlhf_cli.exits import Wrong

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder with grouped-query attention and a gated MLP, dense or of experts. Others are near it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int  # of one expert, where there are some
    vocabulary: int
    tied: bool
    experts: int = 1
    active: int = 1  # experts a token
    qk_norm: bool = False

    @classmethod
    def read(cls, path: Path) -> "Shape":
        """Of a config.json. Raises Wrong."""
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise Wrong(f"{path}: no config.json of a model: {error}") from None
        return cls.of(config if isinstance(config, dict) else {}, str(path))

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> "Shape":
        """Raises Wrong for one that lacks a number."""
        config = config | (config.get("text_config") or {})  # models of several modes
        if missing := [name for name in NEEDED if not isinstance(config.get(name), int)]:
            raise Wrong(f"{where}: no shape of a decoder: it lacks {', '.join(missing)}")
        experts = config.get("num_experts") or config.get("num_local_experts") or 1
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return cls(
            hidden=hidden, layers=config["num_hidden_layers"], heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads, head_dim=config.get("head_dim") or hidden // heads,
            intermediate=(config.get("moe_intermediate_size") if experts > 1 else None) or config["intermediate_size"],
            vocabulary=config["vocab_size"], tied=bool(config.get("tie_word_embeddings", True)), experts=experts,
            active=config.get("num_experts_per_tok") or 1,
            qk_norm=str(config.get("model_type", "")).startswith("qwen3"),
        )  # fmt: skip

    @property
    def attention(self) -> int:
        """Parameters of one layer's projections."""
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def mlp(self) -> int:
        """Of one expert of one layer."""
        return 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All that are trained, norms and routers too."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        layer = self.attention + self.mlp * self.experts + router + norms
        return self.layers * layer + self.hidden + self.head * (1 if self.tied else 2)

    @property
    def of_activations(self) -> memory.Shape:
        """By which the run itself estimates them."""
        return memory.Shape(
            layers=self.layers, hidden=self.hidden, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim,
            inner=self.intermediate * self.active, vocabulary=self.vocabulary,
        )

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values, in bfloat16."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2

    def forward_flops(self, tokens: int, headed: int, length: float) -> float:
        """Of `tokens` in sequences of `length`, `headed` of which go through the head. A causal layer's attention is
        heads x head_dim x 2 x length a token; hack/bench/training.py counts the same.
        """
        products = self.layers * (self.attention + self.mlp * self.active)
        attention = self.layers * self.heads * self.head_dim * length
        return 2.0 * (products * tokens + self.head * headed + attention * tokens)

    def activation_bytes(self, tokens: int, recomputed: bool, attention: bool) -> int:
        """Kept for the backward pass, in bfloat16: of a layer its two norms' inputs and outputs, queries (projected,
        normed, rotated), keys and values, and the MLP's three. Recomputed: each layer's input, with `attention` what
        that made, and one layer whole.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * (4 * self.hidden + 3 * queries + 4 * keys + 3 * self.intermediate * self.active)
        kept = 2 * (self.hidden + attention * queries)
        return tokens * ((self.layers * kept + layer) if recomputed else self.layers * layer)
