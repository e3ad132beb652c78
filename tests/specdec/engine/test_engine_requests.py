"""What an engine takes and refuses, whom it serves first, what it shares."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from engine_cases import Ask, alone, asks, assert_clean, engine, submit
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec.engine import Engine, EngineClosedError, Params, QueueFullError
from specdec.engine.passes import EnginePasses
from specdec.kv import UnsupportedArgumentError

PROMPT = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "at least one token"),
        ([3, 41], {}, r"ids in 0..40 .* got \[41\]"),
        ([3, -1], {}, "ids in 0..40"),
        ([3, 2.5], {}, "token ids"),
        ("text", {}, "tokenize it first"),
        (torch.tensor([[1, 2], [3, 4]]), {}, r"got torch.int64 \(2, 2\)"),
        (torch.tensor([1.0]), {}, "float32"),
        (PROMPT * 10, {"max_new_tokens": 300}, "the pool holds 240 tokens"),
        (PROMPT, {"draft": "gpt"}, "expected one of .*'chain'.* got 'gpt'"),
        (PROMPT, {"rule": "best"}, "rule: expected one of"),
        (PROMPT, {"rule": "typical"}, "lossy"),
        (PROMPT, {"rule": "block", "draft": "tree"}, "block"),
        (PROMPT, {"rule": "greedy", "do_sample": True}, "do_sample"),
        (PROMPT, {"num_beams": 3}, "num_beams"),
        (PROMPT, {"num_return_sequences": 2}, "submit the prompt once for each"),
        (PROMPT, {"streamer": object()}, "iterate over the handle"),
        (PROMPT, {"timeout": 0}, "seconds > 0"),
        (PROMPT, {"priority": "high"}, "an int"),
        (PROMPT, {"seed": "7"}, "seed"),
        (PROMPT, {"temprature": 0.5}, "temprature"),
        (PROMPT, {"stop_strings": "a"}, "tokenizer"),
        (PROMPT, {"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_bad_requests_are_refused_and_the_others_go_on(prompt: Any, options: dict[str, Any], message: str) -> None:
    served = engine()
    ask = asks(1, seed=0)[0]
    before = submit(served, ask)
    with pytest.raises(ValueError, match=message):
        served.submit(prompt, **{"max_new_tokens": 8, **options})
    after = submit(served, ask)
    served.run()
    assert before.result().token_ids == after.result().token_ids == alone(ask)[0]
    assert_clean(served)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bytes": 1 << 20, "num_pages": 4}, "got both"),
        ({"max_rows": 0}, "max_rows"),
        ({"max_rows": 40, "max_step_tokens": 64}, "max_step_tokens"),
        ({"page_size": 0}, "page_size"),
        ({"k": 4}, "draft is None"),
    ],
)
def test_impossible_engines_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=message):
        engine(**options)


def test_a_request_too_large_for_a_step_is_refused() -> None:
    target = models.target("llama-gqa")
    served = Engine(target, models.draft("near", "llama-gqa"), k=30, num_pages=64, max_rows=2, max_step_tokens=32)
    with pytest.raises(UnsupportedArgumentError, match="max_step_tokens"):
        served.submit(PROMPT, max_new_tokens=4, do_sample=True, seed=1)
    served.submit(PROMPT, max_new_tokens=4, do_sample=True)  # without a seed the draft may be cut
    served.run()
    assert_clean(served)


def test_parameters_as_an_object_and_as_arguments() -> None:
    served = engine()
    params = Params(seed=3, draft="chain", arguments={"max_new_tokens": 6, "do_sample": True, "pad_token_id": 0})
    one = served.submit(PROMPT, params)
    two = served.submit(torch.tensor([PROMPT]), params, max_new_tokens=9)
    served.run()
    assert len(one.result().token_ids) <= 6
    assert two.result().token_ids[:6] == one.result().token_ids


def test_a_prompt_shared_by_64_requests_is_prefilled_once() -> None:
    served = engine(num_pages=400, max_rows=64, max_step_tokens=600, page_size=8)
    prompt = [3 + i % 37 for i in range(101)]
    handles = [
        served.submit(prompt, max_new_tokens=16, eos_token_id=None, do_sample=True, seed=i, draft="chain")
        for i in range(64)
    ]
    served.step()
    for _ in range(30):
        served.step()
        if len(served._stepping.scheduler.running) == 64:
            held = served.pool.num_held_pages
            assert held <= 100 // 8 + 64 * 4  # the shared pages once, and everybody's own last ones
            break
    else:
        pytest.fail("not all requests came to run at once")
    served.run()
    metrics = served.metrics()
    assert metrics.num_prefilled_tokens <= 100 + 63 * 8  # everybody else reads its own last page only
    assert metrics.num_prefix_hit_tokens == 63 * 96
    assert all(len(handle.result().token_ids) == 16 for handle in handles)
    assert_clean(served)


def test_no_step_exceeds_the_token_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft nodes and chunks of prefill together, whatever is asked for at once."""
    used: list[list[int]] = []
    step, prefill = EnginePasses.step, EnginePasses.prefill

    def count_step(self: Any, lanes: Any, trees: Any, chunks: Any) -> Any:
        used.append([int(sum(tree.num_nodes.sum() for tree in trees)), sum(chunk.num_tokens for chunk in chunks)])
        return step(self, lanes, trees, chunks)

    def count_prefill(self: Any, chunks: Any) -> Any:
        used.append([0, sum(chunk.num_tokens for chunk in chunks)])
        return prefill(self, chunks)

    monkeypatch.setattr(EnginePasses, "step", count_step)
    monkeypatch.setattr(EnginePasses, "prefill", count_prefill)
    served = engine(max_step_tokens=40, num_pages=300, page_size=4)
    for ask in asks(20, seed=9, longest=60):
        submit(served, ask)
    served.run()
    totals = [trees + chunks for trees, chunks in used]
    assert max(totals) <= 40
    assert sum(trees > 0 and chunks > 0 for trees, chunks in used) > 5  # prefill does not stop decoding


def test_urgent_requests_go_first_and_nobody_starves() -> None:
    served = engine(max_rows=1)
    order: list[str] = []

    def finished(name: str, handle: Any) -> None:
        if handle.done and name not in order:
            order.append(name)

    handles = {"slow": served.submit(PROMPT, max_new_tokens=8, eos_token_id=None, priority=2)}
    for i in range(3):
        handles[f"late {i}"] = served.submit(PROMPT, max_new_tokens=8, eos_token_id=None, priority=1)
    handles["urgent"] = served.submit(PROMPT, max_new_tokens=8, eos_token_id=None, priority=0)
    while served.step():
        for name, handle in handles.items():
            finished(name, handle)
    for name, handle in handles.items():
        finished(name, handle)
    assert order == ["urgent", "late 0", "late 1", "late 2", "slow"]
    # Aging: whoever waits long enough goes before a stream of urgent ones.
    patient = served.submit(PROMPT, max_new_tokens=4, eos_token_id=None, priority=1)
    for _ in range(2000):
        if patient.done:
            break
        if len(served._stepping.scheduler.waiting) < 3:
            served.submit(PROMPT, max_new_tokens=8, eos_token_id=None, priority=0)
        served.step()
    assert patient.done
    served.run()


def test_nobody_gives_way_to_an_equal() -> None:
    served = engine(max_rows=1)
    equals = [served.submit(PROMPT, max_new_tokens=8, eos_token_id=None, priority=1) for _ in range(3)]
    served.run()
    assert [handle.result().num_preemptions for handle in equals] == [0, 0, 0]


def test_the_least_urgent_gives_way_where_pages_are_few() -> None:
    served = engine(num_pages=14, page_size=4)
    prompts = [range(3, 13), range(13, 23), range(23, 33)]
    handles = [
        served.submit(list(prompt), max_new_tokens=30, eos_token_id=None, priority=priority, draft="none")
        for prompt, priority in zip(prompts, (2, 0, 1), strict=True)
    ]
    served.run()
    slow, urgent, _ = (handle.result().num_preemptions for handle in handles)
    assert urgent == 0 < slow
    assert_clean(served)


def test_what_may_outgrow_the_pool_by_one_token_is_refused() -> None:
    """A pool of 32 tokens; four drafted ones and their root may stand behind the text."""
    served = engine(num_pages=8, page_size=4)
    handle = served.submit(PROMPT, max_new_tokens=27 - len(PROMPT), eos_token_id=None, draft="chain")
    with pytest.raises(UnsupportedArgumentError, match=r"the pool holds 32 tokens .* may need 33"):
        served.submit(PROMPT, max_new_tokens=28 - len(PROMPT), eos_token_id=None, draft="chain")
    served.run()
    assert (len(handle.result().token_ids), handle.result().num_preemptions) == (27 - len(PROMPT), 0)
    assert_clean(served)


def test_timeouts_and_cancelling() -> None:
    served = engine()
    quick = served.submit(PROMPT, max_new_tokens=200, eos_token_id=None, timeout=1e-6)
    gone = served.submit(PROMPT, max_new_tokens=200, eos_token_id=None)
    kept = served.submit(PROMPT, max_new_tokens=30, eos_token_id=None)
    for _ in range(6):
        served.step()
    gone.cancel()
    assert quick.result().finish_reason == "timeout"
    assert gone.result().finish_reason == "cancelled"
    assert 0 < len(gone.result().token_ids) < 200
    assert len(kept.result().token_ids) == 30
    gone.cancel()
    assert served.metrics().num_finished == {"timeout": 1, "cancelled": 1, "length": 1}
    assert_clean(served)


def test_a_full_queue_refuses() -> None:
    served = engine(max_waiting=2)
    handles = [served.submit(PROMPT, max_new_tokens=3) for _ in range(2)]
    with pytest.raises(QueueFullError, match="max_waiting"):
        served.submit(PROMPT, max_new_tokens=3)
    served.run()
    assert all(handle.done for handle in handles)
    served.submit(PROMPT, max_new_tokens=3)
    served.close()
    with pytest.raises(EngineClosedError):
        served.submit(PROMPT, max_new_tokens=3)
    assert_clean(served)


def test_own_processors_and_criteria_see_a_batch_of_one() -> None:
    """A processor that knows rows by their place is shown its request's text as row 0, as it would be alone."""

    class NoRepeat(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            assert input_ids.shape[0] == 1
            assert input_ids[0, : len(prompt)].tolist() == list(prompt)
            return scores.index_fill(1, input_ids[0, -1:], -9.0)

    served = engine()
    crowd = [submit(served, ask) for ask in asks(10, seed=11)]
    (first,) = asks(1, seed=12)
    prompt = first.prompt
    mine = Ask(prompt, "chain", 5, 12, 1, extra={"logits_processor": LogitsProcessorList([NoRepeat()])})
    handle = submit(served, mine)
    served.run()
    assert handle.result().token_ids == alone(mine)[0]
    assert all(other.done for other in crowd)


@pytest.mark.parametrize("draft", ["chain", "none"])
def test_each_request_has_its_own_forbidden_tokens(draft: str) -> None:
    """Requests of one lane whose processors are of the same kind, and differ in a tensor alone."""
    prompt = (5, 6, 7, 8)
    (first, second), _, _ = alone(Ask(prompt, draft, 1, 2, 0, extra={"eos_token_id": None}))
    lists = ([first, 30], [second, 30], [30, first], [31, 30])
    crowd = [Ask(prompt, draft, 1, 9, 0, extra={"suppress_tokens": own, "eos_token_id": None}) for own in lists]
    served = engine()
    handles = [submit(served, ask) for ask in crowd]
    served.run()
    texts = [handle.result().token_ids for handle in handles]
    target: Any = models.target("llama-gqa")
    for ask, got in zip(crowd, texts, strict=True):
        options = {name: value for name, value in ask.options.items() if name != "seed"}
        wanted = target.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 4, dtype=torch.int64), **options)
        assert got == wanted[0, 4:].tolist()
    assert texts[0] == texts[2] != texts[3] != texts[1]


def test_the_models_are_as_before_when_the_engine_rests() -> None:
    target: Any = models.target("llama-gqa")
    own = target.config._attn_implementation
    served = specdec.Engine(target, models.draft("near", "llama-gqa"), num_pages=32)
    handle = served.submit(PROMPT, max_new_tokens=12, eos_token_id=None)
    served.step()
    served.step()
    assert not handle.done
    served.run()
    assert target.config._attn_implementation == own
    assert not any("forward" in module.__dict__ for module in target.modules())
