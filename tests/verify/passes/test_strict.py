"""exactness="strict": the same tokens, logits and K/V to the bit, whatever drafts, tree, k or batch."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import NgramDrafter
from specdec.kv import CacheStateError, SharedKVCache
from specdec.kv.versions import CACHE_KEYWORD, cache_of

LENGTHS = (7, 30, 3, 58)
"""With 12 tokens each: texts that end before, at and after a border of blocks."""


def ways(family: str, dtype: str) -> dict[str, dict[str, Any]]:
    """Drafters, trees and lengths that must make no difference; `self` shares its layers with the target."""
    near = models.draft("near", family, dtype)
    return {
        "k1": dict(draft=near, k=1),
        "k4": dict(draft=near, k=4),
        "k20-cut": dict(draft=near, k=20),
        "tree": dict(draft=near, tree=(3, 2, 1)),
        "ngram": dict(draft=NgramDrafter(k=5, branches=2)),
        "junk": dict(draft=models.draft("random", family, dtype), k=8),
        "self": dict(draft=models.target(family, dtype), k=5),
    }


def decode(target: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> tuple[Any, Any]:
    """(output with logits and K/V, report) of greedy decoding."""
    new_tokens = options.pop("new_tokens", 12)
    draft = options.pop("draft", None)
    spec = specdec.Speculator(target, draft, **options)
    out = spec.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=models.PAD,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    return out, spec.report


def apart(one: Any, other: Any) -> tuple[int, int, int]:
    """How many rows of tokens, logits of tokens, and layers of K/V differ."""
    rows = int((one.sequences != other.sequences).any(1).sum())
    logits = int((torch.stack(one.logits) != torch.stack(other.logits)).any(-1).sum())
    layers = 0
    for a, b in zip(cache_of(one).layers, cache_of(other).layers, strict=True):
        layers += not (torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values))
    return rows, logits, layers


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2-mixed-window", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_drafts_change_no_bit(family: str, dtype: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)
    target = models.target(family, dtype)
    ids, mask = models.prompts(LENGTHS, target.config.get_text_config().vocab_size, seed=0, period=3)
    plain, _ = decode(target, ids, mask, exactness="strict")
    own = target.config._attn_implementation
    accepted = 0
    for name, way in ways(family, dtype).items():
        out, report = decode(target, ids, mask, exactness="strict", **way)
        assert apart(plain, out) == (0, 0, 0), name
        accepted += report.num_accepted_tokens
    assert accepted > 0
    assert target.config._attn_implementation == own


def test_ordinary_passes_fail_the_same_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the comparison sees the bits that strict mode is there to keep."""
    monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)  # whose bits are the same anyway
    for dtype in ("bf16", "fp32"):
        target = models.target("llama-gqa", dtype)
        ids, mask = models.prompts(LENGTHS, target.config.vocab_size, seed=0, period=3)
        plain, _ = decode(target, ids, mask)
        out, _ = decode(target, ids, mask, draft=models.draft("near", "llama-gqa", dtype), tree=(3, 2, 1))
        _, logits, layers = apart(plain, out)
        assert logits > 0
        assert layers > 0


def flat_model() -> PreTrainedModel:
    """A bfloat16 model of so many, so similar tokens that its best two often tie within rounding."""
    config = tf.LlamaConfig(
        vocab_size=3000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return models.build(tf.LlamaForCausalLM, config, torch.bfloat16, seed=3, attention="sdpa")


def differing_rows(exactness: str) -> int:
    target = flat_model()
    near = models.noisy_copy(target, 0.02)
    ids, mask = models.prompts((20,) * 16, 3000, seed=1)
    plain, _ = decode(target, ids, mask, exactness=exactness, new_tokens=40)
    count = 0
    for way in (dict(k=4), dict(tree=(3, 2, 1))):
        out, _ = decode(target, ids, mask, exactness=exactness, new_tokens=40, draft=near, **way)
        count += apart(plain, out)[0]
    return count


def test_texts_in_bfloat16_differ_between_drafters_unless_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)  # whose bits are the same anyway
    assert differing_rows("distribution") > 0
    assert differing_rows("strict") == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_neighbours_change_no_bit(dtype: str) -> None:
    """Alone, in another batch, with neighbours that finish at other times: a row's bits are its own."""
    target = models.target("llama-gqa", dtype)
    near = models.draft("near", "llama-gqa", dtype)
    ids, mask = models.prompts(LENGTHS, target.config.vocab_size, seed=0)
    together, _ = decode(target, ids, mask, exactness="strict", draft=near, k=4)
    for row, length in enumerate(LENGTHS):
        alone, _ = decode(target, ids[row : row + 1, -length:], mask[row : row + 1, -length:], exactness="strict")
        assert torch.equal(alone.sequences[0, length:], together.sequences[row, ids.shape[1] :])
        assert torch.equal(torch.stack(alone.logits)[:, 0], torch.stack(together.logits)[:, row])
    text = together.sequences[:, ids.shape[1] :]
    stop = int(text[1, 3])  # one row ends early, the others as they may
    spec = specdec.Speculator(target, near, tree=(2, 2), exactness="strict")
    ended: Any = spec.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0
    )
    for row in range(len(LENGTHS)):
        ends = (text[row] == stop).nonzero()
        count = int(ends[0]) + 1 if len(ends) else 12
        assert torch.equal(ended[row, ids.shape[1] :][:count], text[row, :count])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_coupled_texts_change_no_token(dtype: str) -> None:
    """Sampling with rule "coupled": the text is decided by position and seed, so it inherits strict mode's promise."""
    target = models.target("llama-gqa", dtype)
    ids, mask = models.prompts(LENGTHS, target.config.vocab_size, seed=0, period=3)
    texts: dict[str, Any] = {}
    for name, way in {"none": dict(draft=None), **ways("llama-gqa", dtype)}.items():
        spec = specdec.Speculator(target, rule="coupled", exactness="strict", **way)
        texts[name] = spec.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=1.3, top_p=0.95, seed=3,
            pad_token_id=models.PAD, eos_token_id=None, num_return_sequences=2,
        )  # fmt: skip
        assert torch.equal(texts[name], texts["none"]), name
    assert len({tuple(row.tolist()) for row in texts["none"][:, ids.shape[1] :]}) > 1


def test_a_reused_cache_changes_no_bit() -> None:
    """Two turns: what the first left in the cache, and its prefill of the second, do not depend on the drafts."""
    target = models.target("llama-gqa", "bf16")
    ids, _ = models.prompts((9, 9), target.config.vocab_size, seed=4)
    turns = []
    for way in (dict(draft=None), *ways("llama-gqa", "bf16").values()):
        spec = specdec.Speculator(target, exactness="strict", **way)
        options: dict[str, Any] = dict(
            max_new_tokens=30, do_sample=False, pad_token_id=models.PAD, eos_token_id=None,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        first: Any = spec.generate(input_ids=ids, **options)
        longer = torch.cat([first.sequences, ids], 1)
        turns.append(spec.generate(input_ids=longer, **{CACHE_KEYWORD: cache_of(first)}, **options))
    for turn in turns[1:]:
        assert apart(turns[0], turn) == (0, 0, 0)


def test_a_pass_of_one_row_writes_to_no_other() -> None:
    cache = SharedKVCache({"m": 1}, 3, 8)
    states = torch.ones(1, 2, 2, 4)
    for row in range(3):
        with cache.row(row).writing("m", [0], 2, [2]) as write:
            keys, values = write.update(0, (row + 1) * states, -(row + 1) * states)
        assert write.read == 2
        assert torch.equal(keys, (row + 1) * states)
        assert torch.equal(values, -(row + 1) * states)
    assert cache.filled("m") == [2, 2, 2]
    stored = cache.store("m").keys[0]
    assert stored is not None
    assert stored[:, 0, 0, 0].tolist() == [1, 2, 3]
    with pytest.raises(CacheStateError, match="row 1"), cache.row(1).writing("m", [3], 1):
        pass


def test_other_widths_and_the_report() -> None:
    target = models.target("llama-gqa", "bf16")
    near = models.draft("near", "llama-gqa", "bf16")
    ids, mask = models.prompts(LENGTHS, target.config.vocab_size, seed=0)
    plain, report = decode(target, ids, mask, exactness="strict", strict_width=8)
    assert (report.exactness, report.strict_width) == ("strict", 8)
    assert report.ms_strict_pass > 0
    assert "8 nodes wide" in report.summary()
    out, report = decode(target, ids, mask, exactness="strict", strict_width=8, draft=near, tree=(3, 2, 1))
    assert apart(plain, out) == (0, 0, 0)
    assert 0 < report.num_draft_tokens <= 7 * report.num_drafts
    _, report = decode(target, ids, mask)
    assert (report.exactness, report.strict_width) == ("distribution", None)
