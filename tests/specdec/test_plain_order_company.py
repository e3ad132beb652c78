"""Objects that know each other, wrap each other, compute in float64 or are interrupted: called as plain calls them."""

from __future__ import annotations

import copy
import functools
from typing import Any
from unittest.mock import MagicMock

import models
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import specdec
from specdec import Speculator
from specdec.engine import Engine, RequestFaultError
from specdec.engine.handle import Handle
from specdec.kv import UnsupportedModelError

IDS, MASK = models.prompts((5,), models.VOCAB, 3, period=3)
ARGUMENTS: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def both(make: Any) -> tuple[Tensor, Tensor]:
    """Plain `generate`'s text and ours, each with objects of its own."""
    target: Any = models.target("llama-gqa")
    spec: Any = Speculator(target, target, k=4)
    return tuple(one.generate(IDS, attention_mask=MASK, **ARGUMENTS, **make()) for one in (target, spec))


def test_a_wrapper_of_something_pure_promises_nothing() -> None:
    """`functools.wraps` copies attributes."""

    @specdec.pure
    def allowed(row: int, prefix: Tensor) -> list[int]:
        return list(range(3, 41))

    def make() -> dict[str, Any]:
        calls = 0

        @functools.wraps(allowed)
        def counting(row: int, prefix: Tensor) -> list[int]:
            nonlocal calls
            calls += 1
            return [token for token in range(3, 41) if token % 3 == calls % 3]

        return {"prefix_allowed_tokens_fn": counting}

    plain, ours = both(make)
    assert torch.equal(plain, ours)


def test_scores_in_float64_keep_their_order() -> None:
    class Fine(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            steps = torch.arange(scores.shape[1], dtype=torch.float64).roll(int(input_ids[0, -1]))
            return (1e9 + 1e-3 * steps).expand_as(scores)

    plain, ours = both(lambda: {"logits_processor": [Fine()]})
    assert torch.equal(plain, ours)


@pytest.mark.parametrize("stateful", [False, True])
def test_a_criterion_may_look_at_the_streamer(stateful: bool) -> None:
    logs: list[list[tuple[str, int]]] = []

    class Passing(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            logs[-1].append(("process", input_ids.shape[1]))
            return scores

    class Counting:
        def __init__(self) -> None:
            self.count = 0

        def put(self, tokens: Tensor) -> None:
            self.count += tokens.numel()
            logs[-1].append(("put", self.count))

        def end(self) -> None:
            logs[-1].append(("end", self.count))

    class Full(StoppingCriteria):
        def __init__(self, streamer: Counting):
            self.streamer = streamer

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            logs[-1].append(("ask", input_ids.shape[1]))
            return torch.full((len(input_ids),), self.streamer.count >= 11)

    def make() -> dict[str, Any]:
        logs.append([])
        streamer = Counting()
        processors = {"logits_processor": [Passing()]} if stateful else {}
        return {"streamer": streamer, "stopping_criteria": [Full(streamer)], **processors}

    plain, ours = both(make)
    assert torch.equal(plain, ours)
    assert logs[0] == logs[1]


class Tenth(StoppingCriteria):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch.full((len(input_ids),), self.calls >= 10)


def test_an_interrupted_step_asks_a_lone_criterion_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = models.target("llama-gqa")
    wanted = target.generate(IDS, attention_mask=MASK, stopping_criteria=[Tenth()], **ARGUMENTS)
    push, left = Handle.push, [2]

    def interrupted(self: Handle, tokens: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        push(self, tokens)

    monkeypatch.setattr(Handle, "push", interrupted)
    engine = Engine(target, target, k=4)
    handle = engine.submit(IDS, stopping_criteria=[Tenth()], **ARGUMENTS)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert handle.result().token_ids == wanted[0, 5:].tolist()
    engine.close()


class Late(LogitsProcessor):
    """Is interrupted in its sixth call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == 6:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("pure", [False, True])
def test_who_was_interrupted_in_a_call_is_not_called_again(pure: bool) -> None:
    target: Any = models.target("llama-gqa")
    wanted = target.generate(IDS, attention_mask=MASK, **ARGUMENTS)

    class Passing(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            seen.append(input_ids.shape[1])
            return scores

    seen: list[int] = []
    engine = Engine(target, target, k=4)
    late = specdec.pure(Late()) if pure else Late()
    handle = engine.submit(IDS, logits_processor=[Passing(), late], **ARGUMENTS)
    other = engine.submit(IDS, **ARGUMENTS)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.run()
    assert other.result().token_ids == wanted[0, 5:].tolist()
    assert seen == sorted(set(seen)), "asked once about every text"
    if pure:
        assert handle.result().token_ids == wanted[0, 5:].tolist()
    else:
        with pytest.raises(RequestFaultError, match=r"interrupted \(Ctrl-C\) while or after Late was called"):
            handle.result()
    engine.close()


def test_an_output_layer_wider_than_the_configuration_says_is_refused() -> None:
    wide: Any = models.llama(num_key_value_heads=2)
    wide.set_output_embeddings(torch.nn.Linear(32, models.VOCAB + 9, bias=False))
    with pytest.raises(UnsupportedModelError, match="output layer of 50 tokens"):
        Speculator(wide, "ngram")


@pytest.mark.parametrize("criterion", [False, True])
def test_writes_to_input_ids_are_refused(criterion: bool) -> None:
    """In plain `generate` they end up in the text."""

    class Writing(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            input_ids[:, -1] = input_ids[:, -1] % 7 + 3
            return torch.zeros(len(input_ids), dtype=torch.bool) if criterion else scores

    target: Any = models.target("llama-gqa")
    ids = IDS.expand(2, -1).clone()
    given = {"stopping_criteria" if criterion else "logits_processor": [Writing()]}
    with pytest.raises(specdec.UnsupportedArgumentError, match="changed input_ids in place"):
        Speculator(target, target, k=3).generate(ids, attention_mask=torch.ones_like(ids), **ARGUMENTS, **given)  # type: ignore[arg-type]


def test_a_streamer_owns_what_it_is_given() -> None:
    class Writing:
        def put(self, tokens: Tensor) -> None:
            if len(tokens) == 1 and tokens.dim() == 1:
                tokens.fill_(7)

        def end(self) -> None: ...

    class Never(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    target: Any = models.target("llama-gqa")
    wanted = target.generate(IDS, attention_mask=MASK, **ARGUMENTS)
    spec: Any = Speculator(target, target, k=3)
    for processors in ([], [Plain()]):
        given = {"streamer": Writing(), "stopping_criteria": [Never()], "logits_processor": processors}
        assert torch.equal(spec.generate(IDS.clone(), attention_mask=MASK, **ARGUMENTS, **given), wanted)


class Plain(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores


def test_a_buffer_written_past_torchs_counts_is_noticed() -> None:
    target: Any = copy.deepcopy(models.target("llama-gqa"))
    ids = torch.arange(70)[None] % 38 + 3
    with Engine(target, "ngram") as engine:
        engine.submit(ids, **ARGUMENTS).result()
        target.model.rotary_emb.inv_freq.data.mul_(0.3)
        wanted = target.generate(ids, attention_mask=torch.ones_like(ids), **ARGUMENTS)
        result = engine.submit(ids, **ARGUMENTS).result()
    assert result.num_cached_tokens == 0
    assert result.token_ids == wanted[0, 70:].tolist()


@pytest.mark.timeout(20)
def test_an_object_that_claims_every_attribute_is_no_model() -> None:
    for role in ("target", "draft"):
        anything = MagicMock()
        with pytest.raises(specdec.SpecdecError, match="got MagicMock"):
            Speculator(*((anything, "ngram") if role == "target" else (models.target("llama-gqa"), anything)))


@pytest.mark.parametrize("seed", [1.5, "7", [1.5], float("nan"), b"7"])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    spec: Any = Speculator(models.target("llama-gqa"), "ngram", k=2)
    with pytest.raises(specdec.UnsupportedArgumentError, match="seed: expected an int"):
        spec.generate(IDS, attention_mask=MASK, do_sample=True, max_new_tokens=2, pad_token_id=0, seed=seed)
