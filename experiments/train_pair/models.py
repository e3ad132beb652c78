"""Build what a pair consists of: a byte-level BPE tokenizer of the corpus, and the two Llamas of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.experiments.train_pair.recipe import Recipe, Shape

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_positions: int) -> PreTrainedTokenizerFast:
    """Learn merges from `texts`; id 0 is `<|endoftext|>`, which is bos, eos and pad."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte has an id: no unknown token is needed
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Load from disk alone."""
    return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


def llama_config(shape: Shape, recipe: Recipe, eos_token_id: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab_size, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, max_position_embeddings=recipe.max_positions, tie_word_embeddings=True,
        bos_token_id=eos_token_id, eos_token_id=eos_token_id, pad_token_id=eos_token_id,
    )  # fmt: skip


def build_models(recipe: Recipe, eos_token_id: int) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Target and draft, fp32, initialised from the recipe's seed (leaves the global RNG as it was)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        target = LlamaForCausalLM(llama_config(recipe.target, recipe, eos_token_id))
        draft = LlamaForCausalLM(llama_config(recipe.draft, recipe, eos_token_id))
    for model in (target, draft):
        # Residual branches start small, so that depth does not grow the residual stream (GPT-2, section 2.3).
        scale = 1 / math.sqrt(2 * model.config.num_hidden_layers)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(scale)
        # The padding row of nn.Embedding gets no gradient; here the padding id is also end-of-text, which must learn.
        model.model.embed_tokens.padding_idx = None
    return target.float(), draft.float()
