"""Why a request ended, and how long it waited: as plain decoding would have it, as its user would count it."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from engine_cases import FAMILY, assert_clean, engine
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

import specdec
from specdec.engine import Engine
from specdec.engine import stepping as stepping_module

PROMPT = [5, 6, 7, 8]
DRAFTS = ["none", "chain", "tree", "ngram"]


def text(count: int) -> list[int]:
    ids = torch.tensor([PROMPT])
    target: Any = models.target(FAMILY)
    out: Any = target.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None
    )
    return out[0, len(PROMPT) :].tolist()


@specdec.pure
class Until(StoppingCriteria):
    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] == self.token


class Length(StoppingCriteria):
    """The user's own limit, which is a stop rule to us."""

    def __init__(self, columns: int):
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] >= self.columns])


def stops(kind: str, tokens: list[int], place: int) -> dict[str, Any]:
    """Arguments that stop a request at its token `place`."""
    if kind == "eos":
        return {"eos_token_id": tokens[place]}
    if kind == "several eos":
        return {"eos_token_id": [models.VOCAB - 1, tokens[place]]}
    criterion = Length(len(PROMPT) + place + 1) if kind == "own limit" else Until(tokens[place])
    return {"stopping_criteria": StoppingCriteriaList([criterion]), "eos_token_id": None}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("kind", ["eos", "several eos", "criterion", "own limit"])
def test_a_stop_is_a_stop_also_at_the_last_allowed_token(kind: str, draft: str) -> None:
    tokens = text(12)
    place = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
    served = engine()
    for limit in range(place - 1, place + 4):
        options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": limit, **stops(kind, tokens, place)}
        result = served.submit(PROMPT, draft=draft, **options).result()
        assert result.token_ids == tokens[: min(limit, place + 1)]
        assert result.finish_reason == ("length" if limit <= place else "stop"), limit
    assert served.metrics().num_finished == {"length": 2, "stop": 3}
    served.close()
    assert_clean(served)


def test_a_stop_string_at_the_last_allowed_token(tiny_pair: Any) -> None:
    target, draft, settings = specdec.pairing.loading.open_pair(tiny_pair, None, None, {})
    tokenizer = settings["tokenizer"]
    served = Engine(target, draft, k=4, tokenizer=tokenizer, num_pages=60, page_size=4)
    prompt = tokenizer("def", add_special_tokens=False).input_ids
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = served.submit(prompt, max_new_tokens=8, **options).result().token_ids
    place = next(i for i in range(1, 8) if tokens[i] not in tokens[:i] and tokenizer.decode([tokens[i]]).isascii())
    for limit in (place, place + 1, place + 2):
        string = tokenizer.decode([tokens[place]])
        result = served.submit(prompt, max_new_tokens=limit, stop_strings=string, **options).result()
        assert result.finish_reason == ("length" if limit <= place else "stop"), limit
    served.close()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_in_the_queue_ends_when_a_request_is_first_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting again after it had to give way is part of its life, not of its queue time; who never ran has none."""
    clock = Clock()
    monkeypatch.setattr(stepping_module, "monotonic", clock)
    monkeypatch.setattr("specdec.engine.intake.monotonic", clock)
    served = engine(max_rows=1)
    slow = served.submit(PROMPT, max_new_tokens=8, eos_token_id=None, priority=5, draft="none")
    clock.now += 3.0
    served.step()  # admitted after three seconds
    clock.now += 1.0
    urgent = served.submit(PROMPT, max_new_tokens=2, eos_token_id=None, priority=0, draft="none")
    never = served.submit(PROMPT, max_new_tokens=2, eos_token_id=None, priority=9, draft="none")
    while not urgent.done:
        clock.now += 1.0
        served.step()
    assert slow.num_tokens < 8
    never.cancel()
    while served.step():
        clock.now += 10.0
    assert slow.result().num_preemptions == 1
    queued = served.metrics().request_queue_time
    assert queued.count == 2
    assert queued.mean == pytest.approx((3.0 + 1.0) / 2)
    assert never.result().finish_reason == "cancelled"
    assert served.metrics().e2e_request_latency.count == 3
    served.close()
    assert_clean(served)
