"""Lengths and masks that a target would decode differently with drafts: refused by name before any pass, else equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
import transformers as tf
from torch import Tensor

from specdec import Engine, Speculator, UnsupportedArgumentError
from specdec.fitting import has_holes
from specdec.verify.positions import length_dependent_positions, usable_positions

ORIGINAL = 24


def scaled(kind: str) -> Any:
    """A float64 model whose rotary frequencies change beyond 24 positions."""
    sizes: dict[str, Any] = dict(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "dynamic":
        config: Any = tf.LlamaConfig(**sizes, max_position_embeddings=ORIGINAL + 1, rope_parameters=rope)
        return models.build(tf.LlamaForCausalLM, config, torch.float64, 0, "sdpa")
    rope |= {
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    if kind == "longrope":
        config = tf.LlamaConfig(**sizes, max_position_embeddings=96, rope_parameters=rope)
        return models.build(tf.LlamaForCausalLM, config, torch.float64, 0, "sdpa")
    rope |= {"rope_type": "longrope", "partial_rotary_factor": 1.0}
    config = tf.Phi3Config(
        **sizes, max_position_embeddings=96, original_max_position_embeddings=ORIGINAL, rope_parameters=rope
    )
    return models.build(tf.Phi3ForCausalLM, config, torch.float64, 0, "sdpa")


def drafted(model: Any, draft: Any, ids: Tensor, options: dict[str, Any]) -> Any:
    return Speculator(model, draft, k=None if draft is None else 3).generate(ids, **options)


KINDS = ("longrope", "phi3", "dynamic")


@pytest.fixture
def still() -> Iterator[Any]:
    """Forbids passes of a model until the test is over."""
    handles = []

    def forbid(model: Any) -> None:
        def ran(*args: object) -> None:
            raise AssertionError("a pass ran before the refusal")

        handles.append(model.register_forward_pre_hook(ran))

    yield forbid
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_the_last_position_the_text_is_plain_generates(kind: str) -> None:
    model = scaled(kind)
    assert length_dependent_positions(model.config) == ORIGINAL
    for count, rows in ((1, 1), (5, 2), (ORIGINAL - 1, 1), (ORIGINAL, 1)):
        ids = models.prompts((count,) * rows, 41, count, 3)[0]
        options: dict[str, Any] = dict(
            attention_mask=torch.ones_like(ids), max_new_tokens=ORIGINAL + 1 - count, do_sample=False
        )
        plain = model.generate(ids, **options)
        for draft in (models.noisy_copy(model, 0.02), "ngram"):
            assert torch.equal(drafted(model, draft, ids, options), plain)


def test_frequencies_that_have_grown_are_not_met() -> None:
    """A dynamic module keeps the frequencies of a longer text; within the limit both ways begin by resetting them."""
    model = scaled("dynamic")
    ids = models.prompts((ORIGINAL,), 41, 4, 3)[0]
    options: dict[str, Any] = dict(attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    fresh = model.generate(ids, **options)
    calls: tuple[Any, ...] = (Speculator(model, None).generate, model.generate)
    for call in calls:
        model.generate(models.prompts((60,), 41, 4)[0], max_new_tokens=2, do_sample=False)
        assert torch.equal(call(ids, **options), fresh)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "new"), [(ORIGINAL + 1, 1), (ORIGINAL, 2), (5, ORIGINAL), (60, 8)])
def test_longer_texts_are_refused_before_any_pass(kind: str, count: int, new: int, still: Any) -> None:
    model = scaled(kind)
    ids = models.prompts((count,), 41, 1)[0]
    speculators = [Speculator(model, draft) for draft in (None, "ngram")]
    engine = Engine(model, "ngram", num_pages=16)
    still(model)
    for speculator in speculators:
        with pytest.raises(UnsupportedArgumentError, match=f"beyond {ORIGINAL} tokens"):
            speculator.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    with pytest.raises(UnsupportedArgumentError, match=f"beyond {ORIGINAL} tokens"):
        engine.submit(ids[0].tolist(), max_new_tokens=new)
    engine.close()


def test_the_longest_row_counts_and_the_way_out_is_named() -> None:
    model = scaled("longrope")
    ids, mask = models.prompts((4, 20), 41, 1)
    with pytest.raises(UnsupportedArgumentError, match="max_new_tokens=5 fits"):
        Speculator(model, None).generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    Speculator(model, None).generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)


def test_other_scalings_have_no_limit() -> None:
    for family in ("llama-gqa", "llama-rope-linear", "llama-rope-llama3", "llama-rope-yarn"):
        assert usable_positions(models.target(family).config) is None
    assert usable_positions(models.target("gpt2").config) == 128


def masks(rows: int, width: int, seed: int) -> Iterator[Tensor]:
    """Left padding with holes of several sizes, other ones in every row; the last token is real."""
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(rows, width, dtype=torch.int64)
    for first, last in ((1, 2), (3, 6), (width - 3, width - 1)):
        mask = ones.clone()
        mask[0, first:last] = 0
        yield mask
    for share in (0.2, 0.6):
        mask = (torch.rand(rows, width, generator=generator) > share).long()
        mask[:, -1] = 1
        yield mask
    mask = ones.clone()
    for row in range(rows):
        mask[row, : 2 * row] = 0
        mask[row, 3 * row + 1 : 3 * row + 3] = 0
    mask[:, -1] = 1
    yield mask


FULL = ("llama-gqa", "gpt2", "qwen3", "gpt-neox", "mistral")
WINDOWED = ("mistral-window", "qwen2-mixed-window", "gemma3")


@pytest.mark.parametrize("family", FULL)
def test_masks_with_holes_on_full_attention(family: str) -> None:
    model: Any = models.target(family)
    for i, mask in enumerate(masks(3, 11, 1)):
        ids = models.prompts((11,) * 3, models.VOCAB, i, 4)[0]
        options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
        plain = model.generate(ids, **options)
        for draft in (models.draft("near", family), "ngram"):
            assert torch.equal(drafted(model, draft, ids, options), plain), (family, i)


@pytest.mark.parametrize("family", WINDOWED)
def test_masks_with_holes_where_a_window_closes_are_refused(family: str, still: Any) -> None:
    model: Any = models.target(family)
    still(model)
    refused = 0
    for i, mask in enumerate(masks(3, 11, 1)):
        ids = models.prompts((11,) * 3, models.VOCAB, i, 4)[0]
        assert has_holes(mask.bool())
        with pytest.raises(UnsupportedArgumentError, match="expected a mask without zeros between"):
            Speculator(model, "ngram").generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
        refused += 1
    assert refused == 6
    ids, hole = torch.arange(3, 8)[None], torch.tensor([[1, 0, 1, 1, 1]])  # windows of six: eight columns are too many
    with pytest.raises(UnsupportedArgumentError, match="see a window of 6 columns"):
        Speculator(model, "ngram").generate(ids, attention_mask=hole, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("family", WINDOWED)
def test_other_masks_on_windowed_models(family: str) -> None:
    """Left padding alone, and holes in texts that stay within the window."""
    model: Any = models.target(family)
    window = 6
    hole = torch.tensor([[1, 0, 1], [0, 1, 1]])
    cases = [models.prompts((9, 4), models.VOCAB, 3, 3), (models.prompts((3, 3), models.VOCAB, 4)[0], hole)]
    for (ids, mask), new in zip(cases, (12, window - 3), strict=True):
        options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
        plain = model.generate(ids, **options)
        assert torch.equal(drafted(model, "ngram", ids, options), plain)


def test_such_holes_really_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the refusal other tokens come out."""
    from specdec import preparation

    monkeypatch.setattr(preparation, "refuse_unfit", lambda *call: None)
    model: Any = models.target("mistral-window")
    different = 0
    for i, mask in enumerate(masks(3, 11, 1)):
        ids = models.prompts((11,) * 3, models.VOCAB, i, 4)[0]
        options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=None)
        plain = model.generate(ids, **options)
        different += not torch.equal(drafted(model, None, ids, options), plain)
    assert different >= 2
