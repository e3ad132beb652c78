"""Planned passes: the whole decode loop on tree attention by a plan writes the text that masked passes write.

On a CPU this way is taken when the environment names an attention backend; on a GPU it is the ordinary one.
"""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch import Tensor

import specdec
from specdec.drafters import BestFirst
from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention import choose
from specdec.verify.attention.choose import VARIABLE
from specdec.verify.attention.layout import TreeLayout
from specdec.verify.passes.choose import GRAPHS, runners_for

DRAFTINGS: dict[str, dict[str, Any]] = {
    "chain": {"k": 3},
    "tree": {"tree": (2, 2, 1)},
    "best first": {"tree": BestFirst(3, 2, 5)},
}


def text(family: str, lengths: tuple[int, ...], sampling: bool, **settings: Any) -> torch.Tensor:
    target, draft = models.target(family), models.draft("near", family)
    ids, mask = models.prompts(lengths, models.VOCAB, 0)
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=16, do_sample=sampling, pad_token_id=0)
    if sampling:
        arguments["seed"] = 3
    out = specdec.Speculator(target, draft, **settings).generate(ids, **arguments)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("cache", ["contiguous", "paged"])
@pytest.mark.parametrize("drafting", list(DRAFTINGS))
@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_the_same_text(drafting: str, sampling: bool, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`split` knows block tables: with the paged cache no page is gathered for it."""
    settings: dict[str, Any] = {**DRAFTINGS[drafting], "cache": cache}
    if cache == "paged":
        settings["page_size"] = 7
    expected = text("llama-gqa", (7, 3, 5), sampling, **settings)
    used: list[str] = []
    attend = choose.BACKENDS["split"].attend

    def counting(*args: Any) -> torch.Tensor:
        used.append("paged" if args[3].table is not None else "contiguous")
        return attend(*args)

    table = {**choose.BACKENDS, "split": choose.BACKENDS["split"]._replace(attend=counting)}
    monkeypatch.setattr(choose.attend, "_backends", table)
    monkeypatch.setenv(VARIABLE, "split")
    assert torch.equal(text("llama-gqa", (7, 3, 5), sampling, **settings), expected)
    assert set(used) == {cache}
    assert len(used) > 10


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-mixed-window", "gpt2", "llama-mha", "llama-rope-yarn"])
def test_other_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them windows, in all layers or in some: every layer must get its own."""
    expected = text(family, (9, 4), False, tree=(2, 1, 1))
    monkeypatch.setenv(VARIABLE, "fold")
    assert torch.equal(text(family, (9, 4), False, tree=(2, 1, 1)), expected)


def test_a_window_forgotten_would_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    expected = text("mistral-window", (9, 4), False, tree=(2, 1, 1))
    monkeypatch.setenv(VARIABLE, "fold")
    fold = choose.BACKENDS["fold"]

    def blind(
        query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None
    ) -> Tensor:
        return fold.attend(query, key, value, layout, scale, None)

    monkeypatch.setattr(choose.attend, "_backends", {**choose.BACKENDS, "fold": fold._replace(attend=blind)})
    assert not torch.equal(text("mistral-window", (9, 4), False, tree=(2, 1, 1)), expected)


def test_eager_models_run_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may soft-cap or add sinks, which no backend computes."""
    monkeypatch.setenv(VARIABLE, "split")
    monkeypatch.setattr(choose.attend, "_backends", {})
    target = models.target("llama-gqa", attention="eager")
    ids, mask = models.prompts((5,), models.VOCAB, 0)
    arguments: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    out = specdec.Speculator(target, "ngram").generate(ids, **arguments)
    assert torch.equal(torch.as_tensor(out), target.generate(ids, **arguments))  # type: ignore[operator]


def ways() -> list[str]:
    return [runner.name for runner in runners_for(models.target("llama-gqa"))]


class TestTheWayToRunAModel:
    def test_a_cpu_is_left_alone(self) -> None:
        assert ways() == ["native", "direct", "modules"]

    def test_a_named_backend_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "fold")
        assert ways() == ["modules"]

    def test_graphs_need_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(GRAPHS, "1")
        assert ways() == ["native", "direct", "modules"]

    def test_an_unknown_wish_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(GRAPHS, "yes")
        with pytest.raises(UnsupportedArgumentError, match="expected SPECDEC_GRAPHS to be 0 or 1, got 'yes'"):
            ways()
