"""`output_hidden_states=True`: what plain `generate` returns, of the prompt and of every emitted token."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch

import specdec
from specdec.kv import UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD, cache_of
from specdec.target import TargetModel

DRAFTS: dict[str, dict[str, Any]] = {
    "none": {},
    "chain": {"draft": "near", "k": 3},
    "tree": {"draft": "near", "tree": (3, 2, 1)},
    "n-gram": {"draft": "ngram", "k": 3},
    "paged": {"draft": "near", "k": 2, "cache": "paged", "page_size": 4},
    "strict": {"draft": "near", "tree": (2, 1), "exactness": "strict"},
}


def both(family: str, drafting: str, ids: Any, mask: Any, **arguments: Any) -> tuple[Any, Any, Any]:
    """Plain's and ours, and the report."""
    target: Any = models.target(family)
    settings = dict(DRAFTS[drafting])
    if settings.get("draft") == "near":
        settings["draft"] = models.draft("near", family)
    spec = specdec.Speculator(target, **settings)
    arguments = dict(
        attention_mask=mask, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_hidden_states=True,
        **{"max_new_tokens": 9, **arguments},
    )  # fmt: skip
    return target.generate(ids, **arguments), spec.generate(ids, **arguments), spec.report


def same(plain: Any, ours: Any, real: torch.Tensor) -> None:
    """`real`: bool `[rows, columns]`, where the prompt is not padding."""
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert len(ours.hidden_states) == len(plain.hidden_states)
    for token, (found, wanted) in enumerate(zip(ours.hidden_states, plain.hidden_states, strict=True)):
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.shape == theirs.shape
            assert mine.dtype == theirs.dtype
            keep = real if token == 0 else torch.ones_like(mine[..., 0], dtype=torch.bool)
            torch.testing.assert_close(mine[keep], theirs[keep], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("drafting", DRAFTS)
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "qwen2-mixed-window"])
@pytest.mark.parametrize("lengths", [(6,), (7, 3, 5)])
def test_they_are_plain_generates(family: str, drafting: str, lengths: tuple[int, ...]) -> None:
    ids, mask = models.prompts(lengths, models.VOCAB, 2, 0)
    plain, ours, report = both(family, drafting, ids, mask)
    same(plain, ours, mask.bool())
    assert drafting == "none" or report.num_draft_tokens > 0
    moved = (*ours.hidden_states[:1], *ours.hidden_states[2:], ours.hidden_states[1])
    with pytest.raises(AssertionError, match="not close"):  # the control
        same(plain, type(ours)(sequences=ours.sequences, hidden_states=moved), mask.bool())


def test_rows_that_end_early_show_what_plain_decoding_feeds_them() -> None:
    ids, mask = models.prompts((7, 3, 5), models.VOCAB, 2, 0)
    text = models.target("llama-gqa").generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)  # type: ignore[operator]
    eos = [int(text[0, ids.shape[1] + 2]), int(text[1, ids.shape[1] + 5])]
    plain, ours, _ = both("llama-gqa", "tree", ids, mask, eos_token_id=eos)
    assert (plain.sequences[:, -1] == 0).any()
    same(plain, ours, mask.bool())


def test_copies_of_a_prompt_share_its_states() -> None:
    ids, mask = models.prompts((6, 4), models.VOCAB, 2, 0)
    arguments: dict[str, Any] = dict(num_return_sequences=3, max_new_tokens=5)
    target: Any = models.target("llama-gqa")
    spec = specdec.Speculator(target, models.draft("near", "llama-gqa"), k=2)
    ours: Any = spec.generate(
        ids, attention_mask=mask, do_sample=True, seed=4, pad_token_id=0, return_dict_in_generate=True,
        output_hidden_states=True, **arguments,
    )  # fmt: skip
    for row in range(6):
        real = torch.cat([mask[row // 3].bool(), torch.ones(5, dtype=torch.bool)])
        with torch.no_grad():
            wanted = target(ours.sequences[row][real][None], output_hidden_states=True).hidden_states
        found = [torch.cat(layer, dim=1)[row] for layer in zip(*ours.hidden_states, strict=True)]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine[real[:-1]], theirs[0, :-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("drafting", ["none", "chain", "tree"])
def test_a_continued_cache_shows_the_new_tokens_alone(drafting: str) -> None:
    target: Any = models.target("llama-gqa")
    ids, mask = models.prompts((8, 8), models.VOCAB, 2, 0)
    with torch.no_grad():
        pasts = [cache_of(target(ids[:, :5], use_cache=True)) for _ in range(2)]
    plain = target.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_hidden_states=True, **{CACHE_KEYWORD: pasts[0]},
    )  # fmt: skip
    settings = dict(DRAFTS[drafting])
    if settings.get("draft") == "near":
        settings["draft"] = models.draft("near", "llama-gqa")
    ours: Any = specdec.Speculator(target, **settings).generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_hidden_states=True, **{CACHE_KEYWORD: pasts[1]},
    )  # fmt: skip
    assert plain.hidden_states[0][0].shape[1] == 3
    same(plain, ours, torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("drafting", ["none", "chain", "tree", "strict"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 20])
def test_a_prompt_read_in_chunks_shows_the_last_one(drafting: str, chunk: int) -> None:
    ids, mask = models.prompts((7, 3), models.VOCAB, 2, 0)
    plain, ours, _ = both("llama-gqa", drafting, ids, mask, max_new_tokens=4, prefill_chunk_size=chunk)
    columns = plain.hidden_states[0][0].shape[1]
    assert columns == {1: 1, 3: 1, 7: 7, 20: 7}[chunk]
    same(plain, ours, mask.bool()[:, -columns:])


@pytest.mark.parametrize("drafting", ["none", "n-gram"])
@pytest.mark.parametrize("family", ["llama-mqa", "gpt2"])
def test_a_model_with_fewer_layers_than_it_says_shows_those(
    family: str, drafting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = copy.deepcopy(models.target(family))
    holder, name = (model.transformer, "h") if family == "gpt2" else (model.model, "layers")
    setattr(holder, name, getattr(holder, name)[:1])
    monkeypatch.setattr(models, "target", lambda *_: model)
    ids, mask = models.prompts((7, 3, 5), models.VOCAB, 2, 0)
    plain, ours, _ = both(family, drafting, ids, mask)
    assert len(plain.hidden_states[0]) == 2 < model.config.num_hidden_layers + 1
    same(plain, ours, mask.bool())


def test_after_nan_in_a_branch_they_are_those_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree is decoded again by levels: states and logits must come from the same passes."""
    ids, mask = models.prompts((7, 3), models.VOCAB, 2, 0)
    plain, _, _ = both("llama-gqa", "none", ids, mask)
    own, calls = TargetModel.tree, []

    def sick(self: Any, cache: Any, tree: Any, *rest: Any, **more: Any) -> Any:
        output = own(self, cache, tree, *rest, **more)
        if tree.tokens.shape[1] > 4:
            calls.append(1)
            column = torch.arange(tree.tokens.shape[1])[:, None]
            return output._replace(logits=output.logits.masked_fill(column >= 4, float("nan")))
        return output

    monkeypatch.setattr(TargetModel, "tree", sick)
    _, ours, _ = both("llama-gqa", "tree", ids, mask)
    assert calls
    monkeypatch.undo()
    same(plain, ours, mask.bool())


def test_what_is_not_given_is_refused_by_name() -> None:
    ids, _ = models.prompts((5,), models.VOCAB, 2)
    spec = specdec.Speculator(models.target("llama-gqa"), "ngram")
    refused: list[dict[str, Any]] = [{"output_attentions": True}, {"output_hidden_states": [1]}]
    for options in refused:
        with pytest.raises(UnsupportedArgumentError, match=next(iter(options))):
            spec.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **options)
