"""Every causal LM class of transformers in miniature: its own configuration class with all sizes made small."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as tf

from specdec.kv.families import TESTED

VOCAB = 64
SMALL: dict[str, Any] = dict(
    # ids, widths, depths
    vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    hidden_size=32, n_embd=32, d_model=32, intermediate_size=48, n_inner=48, ffn_dim=48, ffn_hidden_size=48,
    num_hidden_layers=2, n_layer=2, num_layers=2, n_layers=2, decoder_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_head=4, num_heads=4, n_heads=4, decoder_attention_heads=4,
    head_dim=8, global_head_dim=8, rotary_dim=4, max_position_embeddings=256, n_positions=256, sliding_window=6,
    keep_window_size=4, embedding_size=32, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB,
    encoder_layers=2,
    # experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, moe_shared_intermediate_size=16,
    expert_ffn_hidden_size=16, n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1, n_group=1,
    topk_group=1, first_k_dense_replace=1, zero_expert_num=1, moe_layer_start_index=0, moe_layer_end_index=-1,
    num_dense_layers=1,
    # latent attention
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, qk_head_dim=16, v_head_dim=8,
    # towers of models that could see
    patch_size=8, image_size=32,
)  # fmt: skip


def small_config(kind: type, extra: dict[str, Any]) -> Any:
    """The configuration class `kind` with every size it knows made small; `extra` goes into the text's part."""
    try:
        base: Any = kind()
    except Exception:
        base = None
    known = {*inspect.signature(kind).parameters, *getattr(kind, "attribute_map", {})}
    known |= set(vars(base)) if base is not None else set()
    known |= set(getattr(kind, "__dataclass_fields__", {}))
    sizes = dict(SMALL, **({} if "Vision" in kind.__name__ else extra))
    fields = {
        name: value for name, value in sizes.items() if name in known and name not in ("patch_size", "image_size")
    }
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        held = getattr(base, name, None)
        part = part if held is None else type(held)
        if isinstance(part, type) and part is not tf.AutoConfig:
            fields[name] = small_config(part, extra)
    return kind(**fields)


def small_model(name: str) -> Any:
    """A random float64 model of class `name` in eval mode."""
    cls: Any = getattr(tf, name)
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = small_config(cls.config_class, {"rope_parameters": sections} if name in PLACED_ON_AXES else {})
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and len(kinds) != text.num_hidden_layers:
        text.layer_types = list(kinds)[: text.num_hidden_layers]
    if name in ENCODERS:
        config.is_decoder = True
    options = {"experts_implementation": "eager"} if any("expert" in field for field in vars(text)) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config, dtype=torch.float64, **options)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.add_(0.2 * torch.randn_like(weight))
                elif weight.numel() and not (weight.isfinite().all() and weight.std() > 0.2):
                    weight.copy_(0.3 * torch.randn_like(weight))
            model.get_input_embeddings().weight *= 0.3
    model = model.double().eval()
    model.generation_config.eos_token_id = None
    return model


ENCODERS = ("BertLMHeadModel", "BertGenerationDecoder", "ElectraForCausalLM", "MegatronBertForCausalLM",
            "RemBertForCausalLM", "RobertaForCausalLM", "RobertaPreLayerNormForCausalLM", "CamembertForCausalLM",
            "ErnieForCausalLM", "XLMRobertaForCausalLM", "XLMRobertaXLForCausalLM", "Data2VecTextForCausalLM",
            "RoCBertForCausalLM", "BigBirdForCausalLM", "BlipTextLMHeadModel")  # fmt: skip
PLACED_ON_AXES = ("Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration",
                  "Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration", "Qwen2VLForConditionalGeneration",
                  "Qwen3VLMoeForConditionalGeneration", "Glm46VForConditionalGeneration",
                  "PaddleOCRVLForConditionalGeneration", "HunYuanVLForConditionalGeneration")  # fmt: skip
NAMES = tuple(sorted(TESTED))
"""Classes whose text was found to be plain `generate`'s."""
