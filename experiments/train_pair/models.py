"""Build the two Llamas of a recipe."""

from __future__ import annotations

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.experiments.train_pair.recipe import Recipe, Shape


def llama_config(shape: Shape, recipe: Recipe, eos_token_id: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )


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
