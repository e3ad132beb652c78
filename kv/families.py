"""The classes whose text the tests hold against plain `generate`'s; all others are tried before their first use."""

from __future__ import annotations

from transformers import PreTrainedModel

_CAUSAL = """
Afmoe Apertus Arcee AriaText BioGpt BitNet CodeGen Cohere Cohere2 Cohere2Moe Cwm DeepseekV2 DeepseekV3 DiffLlama Dots1
Electra Emu3 Ernie4_5 Ernie4_5_Moe Exaone4 ExaoneMoe Falcon FlexOlmo Fuyu GPTBigCode GPTJ GPTNeoX GPTNeoXJapanese Gemma
Gemma3 Gemma4 Glm Glm4 Glm4Moe Glm4MoeLite GptOss Granite GraniteMoe GraniteMoeShared Helium HunYuanDenseV1
HunYuanMoEV1 Jais2 JetMoe Llama LongcatFlash MegatronBert MiniCPM3 MiniMaxM2 Ministral Ministral3 Mistral Mixtral
ModernBertDecoder NanoChat Nemotron OPT Olmo Olmo2 Olmo3 Olmoe Persimmon Phi Phi3 Phi4Multimodal Phimoe Qwen2 Qwen2Moe
Qwen3 RemBert Roberta RobertaPreLayerNorm SeedOss SmolLM3 StableLm Starcoder2
""".split()
_SEEING = """
Gemma3 Gemma4 Glm4v GlmOcr GotOcr2 Qwen2_5_VL Qwen3VL VideoLlava VipLlava
""".split()

TESTED = frozenset(
    (
        *(f"{name}ForCausalLM" for name in _CAUSAL),
        *(f"{name}ForConditionalGeneration" for name in _SEEING),
        *("BertGenerationDecoder", "BertLMHeadModel", "GPT2LMHeadModel"),
    )
)
"""Class names, all of `transformers.models`; docs/models.md lists them, `tests/test_families.py` tests each."""


_ENCODERS = ("Bert", "Electra", "MegatronBert", "RemBert", "Roberta")
"""Classes that attend both ways unless their configuration says `is_decoder`."""


def is_tested(model: PreTrainedModel) -> bool:
    """Whether the class is one of `TESTED` itself (a subclass, or a class of the same name elsewhere, is not), and its
    configuration does not turn it into a model that attends both ways."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if name not in TESTED or not type(model).__module__.startswith("transformers.models."):
        return False
    if name.startswith(_ENCODERS) and not config.is_decoder:
        return False
    both_ways = getattr(config, "use_bidirectional_attention", None)  # "vision": images only
    return getattr(config, "is_causal", True) is not False and both_ways in (None, False, "vision")
