"""Tiny random models of every supported family. Built once a session, used by all tests; never mutated.

Weights are drawn wide (and embeddings narrow), so that greedy text wanders over the vocabulary instead of settling
on one token; norms and biases are perturbed, so that a forgotten one shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 41
PAD, BOS, EOS = 0, 1, 2

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)  # fmt: skip
_WINDOW = 6


def _config(kind: type, vocab: int = VOCAB, layers: int = 2, hidden: int = 32, heads: int = 4, **fields: Any) -> Any:
    defaults = dict(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=256, initializer_range=0.3,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return kind(**{**defaults, **fields})


def _gpt2(vocab: int = VOCAB, layers: int = 2, hidden: int = 32, **fields: Any) -> Any:
    return tf.GPT2Config(
        vocab_size=vocab, n_embd=hidden, n_layer=layers, n_head=4, n_positions=128, initializer_range=0.3,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **fields,
    )  # fmt: skip


Builder = Callable[[], tuple[type[PreTrainedModel], Any]]

BUILDERS: dict[str, Builder] = {
    "llama-mha": lambda: (tf.LlamaForCausalLM, _config(tf.LlamaConfig, num_key_value_heads=4)),
    "llama-gqa": lambda: (tf.LlamaForCausalLM, _config(tf.LlamaConfig, num_key_value_heads=2)),
    "llama-mqa": lambda: (tf.LlamaForCausalLM, _config(tf.LlamaConfig, num_key_value_heads=1, layers=3)),
    "llama-tied": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "llama-wide-vocab": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, vocab=97, hidden=48, layers=1, num_key_value_heads=2),
    ),
    "llama-bias": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, vocab=32, hidden=16, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    ),
    "llama-rope-linear": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, num_key_value_heads=2, rope_parameters=_rope("linear", factor=2.0)),
    ),
    "llama-rope-dynamic": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, num_key_value_heads=2, rope_parameters=_rope("dynamic", factor=2.0)),
    ),
    "llama-rope-llama3": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, num_key_value_heads=1, rope_parameters=_LLAMA3),
    ),
    "llama-rope-yarn": lambda: (
        tf.LlamaForCausalLM,
        _config(
            tf.LlamaConfig,
            num_key_value_heads=2,
            rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64),
        ),
    ),
    # Text longer than the config's maximum is legal with RoPE: plain decoding just goes on.
    "llama-past-maximum": lambda: (
        tf.LlamaForCausalLM,
        _config(tf.LlamaConfig, num_key_value_heads=2, max_position_embeddings=8),
    ),
    "qwen2": lambda: (tf.Qwen2ForCausalLM, _config(tf.Qwen2Config, num_key_value_heads=2)),
    "qwen2-mixed-window": lambda: (
        tf.Qwen2ForCausalLM,
        _config(
            tf.Qwen2Config,
            num_key_value_heads=2,
            layers=3,
            use_sliding_window=True,
            sliding_window=_WINDOW,
            max_window_layers=1,
        ),
    ),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, _config(tf.Qwen3Config, num_key_value_heads=2, head_dim=8)),
    "mistral": lambda: (
        tf.MistralForCausalLM,
        _config(tf.MistralConfig, num_key_value_heads=2, sliding_window=None),
    ),
    "mistral-window": lambda: (
        tf.MistralForCausalLM,
        _config(tf.MistralConfig, num_key_value_heads=2, sliding_window=_WINDOW),
    ),
    "gpt2": lambda: (tf.GPT2LMHeadModel, _gpt2()),
    "gpt-neox": lambda: (tf.GPTNeoXForCausalLM, _config(tf.GPTNeoXConfig)),
    "gemma": lambda: (tf.GemmaForCausalLM, _config(tf.GemmaConfig, num_key_value_heads=1, head_dim=8)),
    "gemma2": lambda: (
        tf.Gemma2ForCausalLM,
        _config(tf.Gemma2Config, num_key_value_heads=2, head_dim=8, sliding_window=_WINDOW),
    ),
    "gemma3": lambda: (
        tf.Gemma3ForCausalLM,
        _config(tf.Gemma3TextConfig, num_key_value_heads=2, head_dim=8, sliding_window=_WINDOW),
    ),
}
FAMILIES = tuple(BUILDERS)

_NEAR, _FULL = "sliding_attention", "full_attention"
BUILDERS |= {
    "gemma2-capped": lambda: (
        tf.Gemma2ForCausalLM,
        _config(
            tf.Gemma2Config, num_key_value_heads=2, head_dim=8, sliding_window=_WINDOW, query_pre_attn_scalar=2,
            attn_logit_softcapping=1.5, final_logit_softcapping=2.0,
        ),
    ),
    "gemma3-mixed": lambda: (
        tf.Gemma3ForCausalLM,
        _config(
            tf.Gemma3TextConfig, layers=3, num_key_value_heads=2, head_dim=8, sliding_window=_WINDOW,
            layer_types=[_NEAR, _FULL, _NEAR], final_logit_softcapping=2.0, query_pre_attn_scalar=3,
        ),
    ),
    "phi3": lambda: (
        tf.Phi3ForCausalLM,
        _config(
            tf.Phi3Config, num_key_value_heads=2, sliding_window=_WINDOW,
            rope_parameters=_rope("default", partial_rotary_factor=0.5),
        ),
    ),
    "phi3-longrope": lambda: (
        tf.Phi3ForCausalLM,
        _config(
            tf.Phi3Config, num_key_value_heads=2, sliding_window=None,
            rope_parameters=_rope(
                "longrope", factor=4.0, original_max_position_embeddings=64,
                short_factor=[1.1, 1.2, 1.3, 1.4], long_factor=[2.0, 3.0, 4.0, 5.0],
            ),
        ),
    ),
    "granite": lambda: (
        tf.GraniteForCausalLM,
        _config(
            tf.GraniteConfig, num_key_value_heads=2, embedding_multiplier=3.0, residual_multiplier=0.7,
            attention_multiplier=0.3, logits_scaling=1.7,
        ),
    ),
    "smollm3": lambda: (
        tf.SmolLM3ForCausalLM,
        _config(tf.SmolLM3Config, num_key_value_heads=2, no_rope_layers=[1, 0], use_sliding_window=False),
    ),
}  # fmt: skip
"""Only the tests of passes take these: what they differ in is nobody else's business."""

_EAGER_ONLY = {"gemma2", "gemma2-capped"}


def build(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype, seed: int, attention: str) -> PreTrainedModel:
    """A random model in eval mode, weights drawn in float64 and rounded to `dtype`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = cls._from_config(config, dtype=torch.float64, attn_implementation=attention)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.add_(0.2 * torch.randn_like(weight))
            model.get_input_embeddings().weight *= 0.3
    return model.to(dtype).eval()


def llama(seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random Llama of any shape, in float32."""
    return build(tf.LlamaForCausalLM, _config(tf.LlamaConfig, **sizes), torch.float32, seed, "sdpa")


@lru_cache(maxsize=256)
def target(family: str, dtype: str = "fp64", seed: int = 0, attention: str = "sdpa") -> PreTrainedModel:
    """The random model of a family; `attention` is overridden where a family has no SDPA."""
    cls, config = BUILDERS[family]()
    return build(cls, config, DTYPES[dtype], seed, "eager" if family in _EAGER_ONLY else attention)


DRAFTS = ("random", "near", "far", "self", "other", "padded-vocab")


@lru_cache(maxsize=512)
def draft(kind: str, family: str, dtype: str = "fp64", seed: int = 0) -> PreTrainedModel:
    """A drafter for `target(family, dtype, seed)`.

    random: an unrelated one-layer Llama; other: an unrelated GPT-2; near, far: noisy copies of the target, accepted
    often and now and then; self: the target itself; padded-vocab: a Llama with a larger vocabulary.
    """
    base = target(family, dtype, seed)
    vocab = base.config.get_text_config().vocab_size
    if kind == "self":
        return base
    if kind in ("near", "far"):
        return noisy_copy(base, {"near": 0.02, "far": 0.15}[kind])
    if kind == "other":
        return build(tf.GPT2LMHeadModel, _gpt2(vocab=vocab, layers=1, hidden=16), DTYPES[dtype], seed + 100, "sdpa")
    wide = vocab + 7 if kind == "padded-vocab" else vocab
    config = _config(tf.LlamaConfig, vocab=wide, layers=1, hidden=16, num_key_value_heads=2)
    return build(tf.LlamaForCausalLM, config, DTYPES[dtype], seed + 100, "sdpa")


def noisy_copy(model: PreTrainedModel, scale: float, seed: int = 7) -> PreTrainedModel:
    """A copy whose weights are off by `scale` of their own spread: agrees often, not always."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in noisy.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            spread = weight.double().std() if weight.numel() > 1 else weight.double().abs()
            weight.add_((scale * spread * noise).to(weight.dtype))
    return noisy


def prompts(lengths: tuple[int, ...], vocab: int, seed: int, period: int = 0) -> tuple[Tensor, Tensor]:
    """Left-padded random prompts; returns `(input_ids, attention_mask)`, int64 `[rows, max(lengths)]`.

    Args:
        period: repeat each prompt's first `period` tokens (0: no repetition), for prompt lookup.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        text = torch.randint(EOS + 1, vocab, (length,), generator=generator)
        if period:
            text = text[torch.arange(length) % period]
        ids[row, width - length :] = text
        mask[row, width - length :] = 1
    return ids, mask
