"""A drafter's fault costs speed, never the output."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_law import joint_law, noisy_copy, tiny_llama
from fault_cases import (
    DRAFT,
    GREEDY,
    MODEL,
    NEW,
    PROMPT,
    REAL,
    SAMPLED,
    SPOILS,
    VOCAB,
    Faulty,
    assert_same_cache,
    one_warning,
    plain,
    plain_greedy,
)  # fmt: skip
from law_checks import counts_of
from stats import g_test, judge
from torch import Tensor

from specdec import ModelDrafter, NgramDrafter, Speculator, StepTrace
from specdec.drafters import DrafterFaultWarning, Session
from specdec.drafters.guard import normalised
from specdec.kv.versions import cache_of
from specdec.verify import DraftTree, Topology, Verdict


def test_a_finished_call_keeps_nothing_alive() -> None:
    """The drafters let go of the session, and with it of the call's K/V."""
    for drafter in (ModelDrafter(DRAFT, k=3), NgramDrafter(k=3)):
        caches: list[weakref.ref[Any]] = []
        start = drafter.start

        def kept(session: Session, start: Any = start, caches: list[Any] = caches) -> None:
            caches.append(weakref.ref(session.cache))
            start(session)

        drafter.start = kept  # type: ignore[method-assign]
        spec = Speculator(MODEL, drafter)
        spec.generate(PROMPT, **GREEDY)
        gc.collect()
        assert caches
        assert caches[0]() is None


@pytest.mark.parametrize("name", SPOILS)
def test_greedy_output_survives_and_the_fault_is_counted(name: str) -> None:
    spec = Speculator(MODEL, Faulty(SPOILS[name], {0, 2}))
    with one_warning():
        out: Any = spec.generate(PROMPT, **GREEDY)
    assert isinstance(out, Tensor)
    assert torch.equal(out, plain_greedy())
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 2
    assert spec.report.last_drafter_fault
    assert spec.report.num_accepted_tokens > 0


@pytest.mark.parametrize("name", SPOILS)
def test_sampling_with_a_drafter_that_always_fails_is_plain_sampling(name: str) -> None:
    """Same seed, same noise, no draft survives: not only the law but every token is that of plain decoding."""
    spec = Speculator(MODEL, Faulty(SPOILS[name], None))
    with one_warning():
        out: Any = spec.generate(PROMPT, **SAMPLED)
    assert torch.equal(out, plain(SAMPLED))
    assert spec.report is not None
    assert spec.report.num_draft_tokens == 0


@pytest.mark.parametrize("name", ["exception", "q is NaN"])
def test_sampled_law_stays_exact_between_faults(name: str) -> None:
    target = tiny_llama(3, vocab=4)
    spec = Speculator(target, Faulty(SPOILS[name], {1}, noisy_copy(target, 4, 0.3)), rule="rejection")
    prompt = torch.tensor([[3, 1, 2]])
    law = joint_law(target, prompt, torch.ones_like(prompt), 3, top_k=0)
    with one_warning():
        out: Any = spec.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=3, top_k=0, seed=1,
            num_return_sequences=6000,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    judge(g_test(counts_of(out[:, 3:], 4), law.numpy()), f"law around a fault ({name})")


@pytest.mark.parametrize("shape", [{"k": 3}, {"tree": (2, 2)}], ids=["chain", "tree"])
def test_the_drafter_recovers_and_the_targets_cache_is_intact(shape: dict[str, Any]) -> None:
    """A perfect drafter: every proposal after the fault is accepted whole, so its refilled K/V must be right."""
    traces: list[StepTrace] = []
    spec = Speculator(MODEL, Faulty(SPOILS["exception"], {1}, copy.deepcopy(MODEL), **shape))
    with one_warning():
        out: Any = spec.generate(PROMPT, **GREEDY, return_dict_in_generate=True, on_step=traces.append)
    assert not isinstance(out, Tensor)
    expected = plain_greedy(return_dict_in_generate=True)
    assert torch.equal(out.sequences, expected.sequences)
    depth = len(shape.get("tree", (1, 1, 1)))
    assert traces[1].drafted == [0, 0]
    assert traces[2].accepted == [depth, depth]
    single = PROMPT[:1]
    with one_warning():
        ours = spec.generate(
            single, attention_mask=REAL[:1], do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True
        )
    assert not isinstance(ours, Tensor)
    theirs = plain_greedy(single, attention_mask=REAL[:1], return_dict_in_generate=True)
    assert_same_cache(cache_of(ours), cache_of(theirs))


def test_a_fault_in_observe_only() -> None:
    class Blind(ModelDrafter):
        def observe(self, verdict: Verdict, logits: Tensor) -> None:
            raise ValueError("cannot look")

    spec = Speculator(MODEL, Blind(DRAFT, k=3))
    with one_warning():
        out: Any = spec.generate(PROMPT, **GREEDY)
    assert torch.equal(out, plain_greedy())
    assert spec.report is not None
    assert spec.report.num_drafter_faults == spec.report.num_steps
    assert spec.report.num_accepted_tokens > 0


def test_a_fault_in_start_or_stop() -> None:
    class Late(ModelDrafter):
        def start(self, session: Session) -> None:
            raise ValueError("not today")

        def stop(self, rows: Any) -> None:
            raise ValueError("never")

    spec = Speculator(MODEL, Late(DRAFT, k=3))
    with one_warning():
        out: Any = spec.generate(PROMPT, **GREEDY)
    assert torch.equal(out, plain_greedy())


@pytest.mark.parametrize("shape", [{"k": 3}, {"tree": (2, 2)}], ids=["chain", "tree"])
@pytest.mark.parametrize("arguments", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_draft_model_full_of_nan(shape: dict[str, Any], arguments: dict[str, Any]) -> None:
    sick = noisy_copy(MODEL, 1)
    with torch.no_grad():
        sick.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    spec = Speculator(MODEL, sick, **shape)
    with one_warning():
        out: Any = spec.generate(PROMPT, **arguments)
    assert torch.equal(out, plain(arguments))
    assert spec.report is not None
    assert spec.report.num_draft_tokens == 0
    assert spec.report.num_drafter_faults > 0


def test_a_hopeless_drafter_is_left_alone_and_tried_again_in_the_next_call() -> None:
    drafter = Faulty(SPOILS["exception"], None)
    spec = Speculator(MODEL, drafter)
    for _ in range(2):
        with one_warning():
            spec.generate(PROMPT, **{**GREEDY, "max_new_tokens": 20})
        assert spec.report is not None
        assert spec.report.num_drafter_faults == drafter.num_calls == 8
    drafter.calls = set()
    spec.generate(PROMPT, **GREEDY)
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0
    assert spec.report.num_accepted_tokens > 0


def test_an_interrupt_is_not_swallowed() -> None:
    def interrupt(tree: DraftTree) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Speculator(MODEL, Faulty(interrupt, {1})).generate(PROMPT, **GREEDY)


def test_a_law_lost_later_in_a_chain_does_not_withdraw_the_tokens_before_it() -> None:
    """One poisoned embedding row: the second law is NaN only after that token was drafted. Dropping the draft then
    would be a decision about a sampled token, which biases the output."""
    sick = noisy_copy(MODEL, 1)
    with torch.no_grad():
        sick.model.embed_tokens.weight[1] = float("nan")
    prompt = torch.tensor([[3, 5, 2, 6, 3, 5]])
    drafted: dict[int, int] = {}
    for seed in range(25):
        traces: list[StepTrace] = []
        spec = Speculator(MODEL, sick, k=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DrafterFaultWarning)
            spec.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=4, temperature=3.0,
                top_k=0, seed=seed, on_step=traces.append,
            )  # fmt: skip
        drafted[traces[0].drafted[0]] = seed
    assert drafted.keys() == {1, 2, 3}, "the chain must end right after the poisoned token, wherever that fell"


def test_laws_a_little_off_one_are_the_laws_sampled_from() -> None:
    """Within the tolerance for wide float32 sums a row's proportions are what counts, not its total."""
    tree = DraftTree.build(Topology.chain(2), torch.tensor([[1, 2, 3]]), torch.full((1, 2, VOCAB), 1 / VOCAB))
    assert normalised(tree) is tree
    assert tree.q is not None
    heavy = replace(tree, q=tree.q * 1.0009)
    heavy.validate(VOCAB, heavy.tokens[:, 0])
    torch.testing.assert_close(normalised(heavy).q, tree.q)
