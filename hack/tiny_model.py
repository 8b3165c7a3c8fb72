"""Make the tiny model of the tests: a random Llama of 2 layers with a character tokenizer. Under 1 MB, the same bytes every time.

usage: python hack/tiny_model.py <directory>
"""

import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=512)


def model(tie: bool = True) -> LlamaForCausalLM:
    """Random weights from seed 0, float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=512,
        tie_word_embeddings=tie, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="float32",
    )
    return LlamaForCausalLM(config)


def write(directory: Path) -> None:
    model().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    make_readable(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
