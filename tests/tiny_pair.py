"""A saved pair of tiny random Llamas with a byte-level tokenizer, for tests that go through files."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from models import build, noisy_copy
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and an end token that also starts empty prompts (unless `bos` is False)."""
    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END, bos_token=END if bos else None
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_pair(folder: Path, chat_template: str | None = None, bos: bool = True) -> Path:
    """Write `target/` and `draft/`, the draft a noisy copy that is accepted now and then."""
    tokenizer = byte_tokenizer(chat_template, bos)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    target = build(tf.LlamaForCausalLM, config, torch.float32, seed=5, attention="sdpa")
    for role, model in (("target", target), ("draft", noisy_copy(target, 0.05))):
        model.save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)
    return folder
