"""What each step emitted, where its tokens came from, and their log-probabilities: those of plain forward passes."""

from __future__ import annotations

import asyncio
from typing import Any

import models
import pytest
import torch
from engine_cases import DRAFTERS, FAMILY, Ask, alone, asks, assert_clean, engine, submit
from engine_plants import PLANTS
from torch import Tensor

from specdec.drafters import Budget, Drafter, Session
from specdec.engine import Engine, Handle, RequestFaultError, Result, StepOutput, lane
from specdec.engine.step_output import step_output
from specdec.kv import UnsupportedArgumentError
from specdec.verify import DraftTree, Topology

PROMPT = (5, 6, 7, 8)
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
DEPTH = 3
RIGHT = (3, 0, None, 1, 2, 3, 3, None, 0, 2, 1)
"""By tokens emitted so far: how many drafted tokens are right; None: nothing is drafted."""


class Planted(Drafter):
    """Drafts a text it was told, right for as many tokens as `RIGHT` says and wrong from there on."""

    name, max_depth, max_nodes = "planted", DEPTH, DEPTH

    def __init__(self, text: list[int]):
        self.text = text

    def start(self, session: Session) -> None:
        self.session = session

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        rows = self.session.rows
        (row,) = rows.live
        done = rows.num_tokens[row] - len(PROMPT)
        right, depth = RIGHT[done % len(RIGHT)], min(DEPTH, budget.max_depth)
        if right is None or depth == 0:
            return DraftTree.root_only(rows.roots())
        drafted = [(token + (i >= right)) % models.VOCAB for i, token in enumerate(self.text[done : done + depth])]
        return DraftTree.build(Topology.chain(depth), torch.tensor([[int(rows.roots()[0]), *drafted]]))


def expected(total: int) -> list[tuple[tuple[str, ...], int]]:
    """Origins and drafted tokens of every step."""
    steps: list[tuple[tuple[str, ...], int]] = []
    done = 0
    while done < total:
        right, depth = RIGHT[done % len(RIGHT)], min(DEPTH, total - done - 1)
        if right is None or depth == 0:
            steps.append((("plain",), 0))
        elif right >= depth:
            steps.append((("drafted",) * depth + ("bonus",), depth))
        else:
            steps.append((("drafted",) * right + ("recovered",), depth))
        done += len(steps[-1][0])
    return steps


def test_origins_are_those_of_drafts_known_to_be_right_or_wrong() -> None:
    text = alone(Ask(PROMPT, "none", 0, 40, 0, extra=GREEDY))[0]
    served = Engine(models.target(FAMILY), Planted(text), num_pages=40, page_size=4, adaptive=False)
    handle = served.submit(PROMPT, max_new_tokens=40, **GREEDY)
    steps = list(handle.steps())
    assert [(step.origins, step.num_draft_tokens) for step in steps] == expected(40)
    assert [token for step in steps for token in step.token_ids] == text == handle.token_ids
    assert [step.start for step in steps] == [0, *(step.stop for step in steps[:-1])]
    assert {origin for step in steps for origin in step.origins} == {"drafted", "recovered", "bonus", "plain"}
    assert list(handle.steps()) == steps, "from the first one, as often as one likes"
    result = handle.result()
    assert result.num_accepted_tokens == sum(step.origins.count("drafted") for step in steps)
    assert result.num_draft_tokens == sum(step.num_draft_tokens for step in steps)


def cut_alike(handle: Handle) -> list[StepOutput]:
    """The steps, checked to be whole: every token has its origin and, where asked for, its log-probability."""
    steps = handle._steps
    for step in steps:
        assert len(step.token_ids) == len(step.origins) > 0
        assert step.logprobs is None or len(step.logprobs) == len(step.token_ids)
        assert "plain" not in step.origins or step.num_draft_tokens == 0
        assert set(step.origins[:-1]) <= {"drafted"}, "only the last token of a step may be the target's own"
    return steps


def plain_logprobs(ask: Ask, tokens: list[int]) -> Tensor:
    """`[tokens, vocab]`, of one plain forward pass."""
    with torch.no_grad():
        logits = models.target(ask.family)(torch.tensor([[*ask.prompt, *tokens]])).logits[0]
    return logits[len(ask.prompt) - 1 : -1].float().log_softmax(-1)


def check_logprobs(ask: Ask, handle: Handle, count: int) -> None:
    tokens = handle.token_ids
    wanted = plain_logprobs(ask, tokens)
    steps = cut_alike(handle)
    found = [entry for step in steps for entry in step.logprobs or ()]
    assert len(found) == len(tokens)
    own = torch.tensor([entry.logprob for entry in found])
    assert torch.allclose(own, wanted.gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=2e-4), ask
    top = torch.tensor([entry.top_logprobs for entry in found])
    assert top.shape == (len(tokens), count)
    ids = torch.tensor([entry.top_ids for entry in found], dtype=torch.int64)
    assert torch.allclose(top, wanted.gather(1, ids), atol=2e-4), ask
    assert torch.allclose(top, wanted.topk(count).values, atol=2e-4), ask


@pytest.mark.parametrize("draft", [*DRAFTERS])
def test_log_probabilities_are_those_of_plain_passes(draft: str) -> None:
    """Drafted or not, sampled or not, raw under every processor, beside others who ask for none, with pages short."""
    served = engine(num_pages=14)
    crowd = [Ask(PROMPT[: 1 + i % 4], draft, 77 + i, 14, i % 7) for i in range(14)]
    handles = [submit(served, ask, **({} if i % 3 == 2 else {"logprobs": i % 3 * 5})) for i, ask in enumerate(crowd)]
    served.run()
    for i, (ask, handle) in enumerate(zip(crowd, handles, strict=True)):
        assert handle.token_ids == alone(ask)[0]
        if i % 3 < 2:
            check_logprobs(ask, handle, i % 3 * 5)
        else:
            assert all(step.logprobs is None for step in cut_alike(handle))
    assert served.metrics().num_preemptions > 0
    assert_clean(served)


def test_laws_after_processors_would_have_been_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: log-probabilities of what was sampled from, at temperature 0.7, are others."""
    served, ask = engine(), Ask(PROMPT, "chain", 3, 14, 2)
    monkeypatch.setattr(
        lane, "step_output", lambda decided, *rest: step_output(decided._replace(logits=decided.scores), *rest)
    )
    handle = submit(served, ask, logprobs=5)
    served.run()
    with pytest.raises(AssertionError):
        check_logprobs(ask, handle, 5)


def test_steps_from_asyncio_and_from_a_thread() -> None:
    crowd = asks(4, seed=31)

    async def main() -> list[list[StepOutput]]:
        async def one(handle: Handle) -> list[StepOutput]:
            return [step async for step in handle.steps()]

        async with engine() as served:
            return await asyncio.gather(*(one(submit(served, ask)) for ask in crowd))

    for ask, steps in zip(crowd, asyncio.run(main()), strict=True):
        assert [token for step in steps for token in step.token_ids] == alone(ask)[0]


def test_a_last_step_between_two_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's thread emits and finishes at the very moment somebody asks whether the request is done."""
    handle = engine().submit(PROMPT, max_new_tokens=1)

    def just_now(self: Handle) -> bool:
        if not self._steps:
            self.push(StepOutput(0, (5,), ("plain",), 0))
            self.finish(Result([5], list(PROMPT), "length"))
        return True

    monkeypatch.setattr(Handle, "done", property(just_now))
    assert list(handle) == [5]


def test_a_failed_request_has_the_steps_up_to_its_error() -> None:
    served = engine()
    plant = PLANTS["processor raises error"](len(PROMPT) + 5)
    handle = served.submit(PROMPT, draft="chain", max_new_tokens=20, logprobs=1, **GREEDY, **plant)
    with pytest.raises(RequestFaultError) as raised:
        list(handle.steps())
    steps = cut_alike(handle)
    assert raised.value.emitted == [token for step in steps for token in step.token_ids] != []


@pytest.mark.parametrize("wrong", [-1, 21, True, 1.5, "3"])
def test_other_numbers_of_alternatives_are_refused(wrong: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match="logprobs: expected 0 to 20"):
        engine().submit(PROMPT, logprobs=wrong)
