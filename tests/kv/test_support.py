"""What cannot be honoured is refused by name before any forward pass, and the target is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
import transformers as tf
from checker import Case, Drafting

import specdec
from specdec import UnsupportedArgumentError, UnsupportedModelError
from specdec.kv.versions import CACHE_KEYWORD

SMALL: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2)


@pytest.fixture
def target() -> Iterator[Any]:
    """A target that must not run: every forward pass of it fails the test."""
    model = models.target("llama-gqa")

    def ran(*args: object) -> None:
        raise AssertionError("a forward pass ran before the refusal")

    handle = model.register_forward_pre_hook(ran)
    yield model
    handle.remove()


IDS = torch.tensor([[4, 5, 6], [7, 8, 9]])


def filled(cache: Any, tokens: int = 2) -> Any:
    for layer in range(2):
        cache.update(torch.zeros(2, 2, tokens, 8).double(), torch.zeros(2, 2, tokens, 8).double(), layer)
    return cache


def static_cache(tokens: int) -> Any:
    cache = tf.StaticCache(config=models.target("llama-gqa").config, max_cache_len=16)
    return filled(cache, tokens) if tokens else cache


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    "num_beams": lambda: {"num_beams": 3},
    "num_beams=0": lambda: {"num_beams": 0},
    "num_beams=-1": lambda: {"num_beams": -1},
    "prefill_chunk_size=0": lambda: {"prefill_chunk_size": 0},
    "use_cache": lambda: {"use_cache": False},
    "assistant_model": lambda: {"assistant_model": models.target("llama-mha")},
    "prompt_lookup_num_tokens": lambda: {"prompt_lookup_num_tokens": 3},
    "output_attentions": lambda: {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": lambda: {"output_hidden_states": [1], "return_dict_in_generate": True},
    "synced_gpus": lambda: {"synced_gpus": True},
    "DynamicCache, got StaticCache": lambda: {CACHE_KEYWORD: static_cache(2)},
    f"{CACHE_KEYWORD}: expected a transformers DynamicCache": lambda: {CACHE_KEYWORD: static_cache(0)},
    "holds 3 tokens but input_ids only 3": lambda: {CACHE_KEYWORD: filled(tf.DynamicCache(), 3)},
    "Pad on the left": lambda: {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])},
    "seed or generator": lambda: {"seed": 1, "generator": torch.Generator()},
    "one seed per row": lambda: {"seed": [1, 2, 3], "do_sample": True},
    "consecutive positions": lambda: {"position_ids": torch.tensor([[0, 2, 4], [0, 1, 2]])},
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_arguments_are_refused_by_name(name: str, target: Any) -> None:
    for draft in (None, "ngram", models.draft("near", "llama-gqa")):
        speculator = specdec.Speculator(target, draft)
        with pytest.raises(UnsupportedArgumentError, match=name):
            speculator.generate(IDS, **{"max_new_tokens": 4, "do_sample": False, **REFUSED[name]()})


def test_inputs_embeds_are_refused(target: Any) -> None:
    embeds = torch.zeros(1, 3, 32, dtype=torch.float64)
    prompts: list[dict[str, Any]] = [{}, {"input_ids": IDS[:1]}]
    for inputs in prompts:
        with pytest.raises((UnsupportedArgumentError, ValueError), match="inputs_embeds"):
            specdec.Speculator(target, "ngram").generate(**inputs, inputs_embeds=embeds, max_new_tokens=4)


def test_unknown_arguments_are_refused_as_transformers_does(target: Any) -> None:
    messages = []
    for generate in (target.generate, specdec.Speculator(target, "ngram").generate):
        with pytest.raises(ValueError, match="max_new_tokenz") as caught:
            generate(IDS, max_new_tokenz=4)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("config", [{"num_beams": 2}, {"use_cache": False}])
def test_a_generation_config_is_refused_like_arguments(config: dict[str, Any], target: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match=next(iter(config))):
        specdec.Speculator(target, "ngram").generate(IDS, tf.GenerationConfig(max_new_tokens=4, **config))


def encoder_decoder() -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    )


def recurrent() -> Any:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))


def hybrid() -> Any:
    return tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(**SMALL, num_attention_heads=2, lru_width=16, attention_window_size=8)
    )


def without_head() -> Any:
    return tf.LlamaModel(tf.LlamaConfig(**SMALL, num_attention_heads=2))


def without_positions() -> Any:
    return tf.BloomForCausalLM(tf.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2))


MODELS = {
    "encoder-decoder": encoder_decoder,
    "MambaForCausalLM": recurrent,
    "RecurrentGemmaForCausalLM": hybrid,
    "LlamaModel": without_head,
    "position_ids": without_positions,
    "PreTrainedModel": lambda: torch.nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_models_are_refused_when_the_speculator_is_built(name: str) -> None:
    model = MODELS[name]()
    good = models.target("llama-gqa")
    with pytest.raises(UnsupportedModelError, match=name) as caught:
        specdec.Speculator(model, "ngram")
    assert str(caught.value).startswith("target:")
    with pytest.raises((UnsupportedModelError, UnsupportedArgumentError), match=r"draft: .*"):
        specdec.Speculator(good, model)


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        ("model", {"k": 3, "tree": (2, 2)}, "k or tree"),
        ("model", {"k": 0}, "k >= 1"),
        ("model", {"tree": ()}, "widths >= 1"),
        ("model", {"tree": (2, 0)}, "widths >= 1"),
        ("ngram", {"tree": (2, 2)}, "tree"),
        ("ngram", {"k": 0}, "k >= 1"),
        (None, {"k": 3}, "draft is None"),
        (specdec.NgramDrafter(), {"k": 3}, "set them there"),
        (17, {}, "draft: expected"),
    ],
)
def test_contradictory_drafts_are_refused(draft: Any, options: dict[str, Any], message: str) -> None:
    drafter = models.draft("near", "llama-gqa") if draft == "model" else draft
    with pytest.raises(UnsupportedArgumentError, match=message):
        specdec.Speculator(models.target("llama-gqa"), drafter, **options)


def state(model: Any) -> tuple[Any, ...]:
    return (
        model.config._attn_implementation,
        model.generation_config.to_dict(),
        sorted(model.__dict__),
        model.training,
        {name: weight.clone() for name, weight in model.state_dict().items()}.keys(),
    )


def test_the_target_is_unchanged_after_success_and_failure() -> None:
    case = Case("llama-gqa", "fp64", (4, 2), Drafting("tree", "near", widths=(2, 2)), 6)
    before = state(case.target)
    weights = [weight.clone() for weight in case.target.parameters()]
    speculator = case.speculator()
    speculator.generate(**case.inputs(), stop_strings=None, repetition_penalty=1.3)
    assert state(case.target) == before
    with pytest.raises(UnsupportedArgumentError):
        speculator.generate(**case.inputs(), num_beams=2)

    def boom(*args: object) -> None:
        raise RuntimeError("boom")

    handle = case.target.register_forward_hook(boom)
    try:
        with pytest.raises(specdec.TargetFaultError, match="boom"):
            speculator.generate(**case.inputs())
    finally:
        handle.remove()
    assert state(case.target) == before
    assert all(torch.equal(old, new) for old, new in zip(weights, case.target.parameters(), strict=True))


def test_patch_replaces_generate_only_inside_the_block() -> None:
    case = Case("llama-gqa", "fp64", (4, 2), Drafting("none"), 6)
    target: Any = case.target
    before, expected = state(target), target.generate(**case.inputs())
    with specdec.patch(target, "ngram", k=3) as speculator:
        assert torch.equal(target.generate(**case.inputs()), expected)
        assert speculator.report is not None
        assert speculator.report.drafter == "ngram"
    assert state(target) == before
    with pytest.raises(RuntimeError, match="boom"), specdec.patch(target, "ngram"):
        raise RuntimeError("boom")
    assert state(target) == before
    assert "generate" not in target.__dict__


def test_learned_positions_end_with_an_error_that_names_them() -> None:
    """GPT-2 has a table of 128 positions; nothing is emitted from a wrapped or clamped one."""
    model = models.target("gpt2")
    ids = models.prompts((120,), models.VOCAB, 1)[0]
    with pytest.raises(specdec.TargetFaultError, match="128 positions") as caught:
        specdec.Speculator(model, "ngram", k=4).generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    plain: Any = model
    expected = plain.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert caught.value.emitted[0] == expected[0, 120:].tolist()
