"""Make the tiny model of the tests and samples: a random Llama of 2 layers with a character tokenizer, prompts for it
(prompts.jsonl), and a reward model that likes texts which end in an "e" (reward/). Under 1 MB, the same bytes every
time.

usage: python -m hack.tiny_model DIRECTORY [--hidden-size N]
"""

import argparse
import copy
import json
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from rlhf_worker.pretrained import make_readable

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = string.ascii_letters + string.digits + " .,:;!?+-*/=()\n"
HIDDEN, LAYERS, HEADS, KV_HEADS = 64, 2, 4, 2
HEAD_DIM = 32  # the least that vLLM's CPU attention has a kernel for


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; anything else is <unk>. No chat template: prompts are taken as they are."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512,
    )


def model(tie: bool = True, hidden_size: int = HIDDEN) -> LlamaForCausalLM:
    """Random weights from seed 0, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=512,
        tie_word_embeddings=tie, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="float32",
    )
    return LlamaForCausalLM(config)


def reward_model(policy: LlamaForCausalLM) -> LlamaForSequenceClassification:
    """The policy's backbone; its score is how far the last token's hidden state lies along the embedding of "e"."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(policy.model.state_dict())
    letter = policy.model.embed_tokens.weight[[len(SPECIAL) + CHARACTERS.index("e")]]
    model.score.weight.data = letter.detach() / letter.norm() / letter.shape[1] ** 0.5
    return model


def prompts() -> list[str]:
    """64 sums of one-digit numbers."""
    return [f"{a} + {b} =" for a in range(1, 9) for b in range(1, 9)]


def write(directory: Path, hidden_size: int = HIDDEN) -> None:
    logging.disable_progress_bar()
    policy = model(hidden_size=hidden_size)
    policy.save_pretrained(directory)
    reward_model(policy).save_pretrained(directory / "reward")
    for place in (directory, directory / "reward"):
        tokenizer().save_pretrained(place)
    make_readable(directory / "reward")
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()))
    make_readable(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--hidden-size", type=int, default=HIDDEN)
    given = parser.parse_args()
    write(given.directory, given.hidden_size)
