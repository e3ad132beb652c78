"""Every architecture among the shipped pairs decodes as plain `generate` does, on tiny random models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import specdec
from specdec.pairing import find_pair, pair_names
from specdec.pairing.runnable import refusal

VOCAB = 64


def architectures() -> list[str]:
    pairs = [find_pair(name) for name in pair_names()]
    parts = [part for pair in pairs if refusal(pair) is None for part in (pair.target, pair.draft)]
    return sorted({part.facts.architecture for part in parts if part.facts is not None})


def tiny(architecture: str, seed: int) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None, "initializer_range": 0.3,
    }  # fmt: skip
    special: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
        "gemma2": {"sliding_window": 16, "tie_word_embeddings": False},  # tied, it repeats one token
        "phi3": {"sliding_window": 16, "original_max_position_embeddings": 128},
    }
    if architecture == "gpt2":
        sizes = {key: sizes[key] for key in ("vocab_size", "pad_token_id", "eos_token_id", "initializer_range")}
    config = tf.AutoConfig.for_model(architecture, **(sizes | special.get(architecture, {})))
    torch.manual_seed(seed)
    model: Any = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.generation_config.eos_token_id = None
    return model.eval()


def test_all_are_tried() -> None:
    assert set(architectures()) >= {"llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "opt"}


@pytest.mark.parametrize("architecture", architectures())
def test_greedy_text_is_plain_generates(architecture: str) -> None:
    target = tiny(architecture, 0)
    draft = tiny(architecture, 0)  # a copy with noise is accepted now and then
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    prompt = torch.randint(1, VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, Any] = {
        "input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 30, "do_sample": False,
    }  # fmt: skip
    plain = target.generate(**inputs)
    for options in ({"k": 3}, {"tree": (2, 2)}):
        spec = specdec.Speculator(target, draft, **options)
        assert torch.equal(spec.generate(**inputs), plain), options  # type: ignore[arg-type]
        assert spec.report is not None
        assert 0 < spec.report.num_accepted_tokens < spec.report.num_draft_tokens
