"""Sampled laws under processors with state, decided in plain order: enumeration, planted bugs, and refused rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from law_checks import must_be_caught
from plain_callbacks import SecondWind
from stats import g_test, g_test_strata, judge
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteriaList

from specdec import ModelDrafter, Speculator, UnsupportedArgumentError
from specdec.decision import read_verdict
from specdec.engine import Engine
from specdec.plain_order import PlainBatch, PlainOrder
from specdec.stopping import StopRules
from specdec.verify import DraftTree, NoiseStream, Rows, Topology, make_rule

TINY = tiny_llama(0)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])


def law_of_two() -> Tensor:
    """The joint law of two tokens under SecondWind, by enumeration: float64 `[vocab, vocab]`."""
    vocab = TINY.config.vocab_size
    with torch.no_grad():
        first = TINY(PROMPT).logits[0, -1].double().softmax(-1)
        tails = torch.arange(vocab)[:, None]
        second = (-TINY(torch.cat([PROMPT.expand(vocab, -1), tails], 1)).logits[:, -1]).double().softmax(-1)
    return first[:, None] * second


def judged(tokens: Tensor) -> None:
    vocab = TINY.config.vocab_size
    counts = torch.bincount(tokens[:, 0] * vocab + tokens[:, 1], minlength=vocab**2).numpy()
    judge(g_test(counts, law_of_two().numpy().ravel()), "law of two tokens under a processor with state")


def test_sampled_law_of_a_processor_with_state() -> None:
    """Rows of a call keep step, so one processor serves thousands; a run is cut at the first row that leaves it."""
    spec = Speculator(TINY, noisy_copy(TINY, 1), k=2)
    processors: Any = [SecondWind()]
    out: Any = spec.generate(
        PROMPT, do_sample=True, top_k=0, max_new_tokens=2, num_return_sequences=12_000, seed=1,
        attention_mask=torch.ones_like(PROMPT), logits_processor=processors,
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.rule == "rejection"
    assert spec.report.num_accepted_tokens > 3_000
    judged(out[:, PROMPT.shape[1] :])


@pytest.mark.parametrize(("shape", "rule"), [({"k": 2}, "rejection"), ({"tree": (2, 1)}, "recursive_rejection")])
def test_trees_of_no_declared_kind_are_judged_from_the_root_down(shape: dict[str, Any], rule: str) -> None:
    class Undeclared(ModelDrafter):
        @property
        def kind(self) -> Any:
            return None

    spec: Any = Speculator(TINY, Undeclared(noisy_copy(TINY, 1), children="sampled", **shape))
    spec.generate(
        PROMPT, do_sample=True, max_new_tokens=8, seed=1, attention_mask=torch.ones_like(PROMPT),
        logits_processor=[SecondWind()],
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.num_draft_tokens > 0
    assert spec.report.rule == rule


ROWS, IDS = 4_000, 6


def one_step(rule: str, bug: bool = False) -> tuple[list[np.ndarray], list[Tensor], int]:
    """Walks one drafted step of many rows, each a batch of its own: counts and laws of the first token, then of the
    second one after each kept first one; and how many runs had three tokens.

    Rows read logits from a table by their last token; SecondWind turns the second law upside down.
    """
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(IDS, IDS, generator=generator)
    q = torch.softmax(0.8 * table + 0.3 * torch.randn(IDS, IDS, generator=generator), -1)
    roots = torch.zeros(ROWS, 1, dtype=torch.int64)
    if rule == "recursive_rejection":
        pair = torch.multinomial(q[0].expand(ROWS, -1), 2, generator=generator)
        tree = DraftTree.build(Topology((-1, 0, 0)), torch.cat([roots, pair], 1), q[roots])
    else:
        first = torch.multinomial(q[0].expand(ROWS, -1), 1, generator=generator)
        second = torch.multinomial(q[first[:, 0]], 1, generator=generator)
        law = None if rule == "naive" else torch.stack([q[0].expand(ROWS, -1), q[first[:, 0]]], 1)
        tree = DraftTree.build(Topology.chain(2), torch.cat([roots, first, second], 1), law)
    rows = Rows(roots, None, 8)
    order = PlainOrder(rows, True, isolates=True)
    stop = StopRules(StoppingCriteriaList(), rows)
    for row in range(ROWS):
        order.join(PlainBatch([LogitsProcessor() if bug else SecondWind()], stop, [row], rows.ids[row : row + 1, :1]))
    noise = NoiseStream(list(range(ROWS)), [0] * ROWS, rows.device).accept(range(ROWS), 0, tree.tokens.shape[1])
    judge_tree = make_rule(rule)
    walk = order.walk(
        tree, table[tree.tokens], torch.zeros_like(tree.sampled), lambda law: judge_tree(tree, law, noise)
    )
    decision = read_verdict(tree, torch.zeros_like(tree.sampled), walk.verdict, walk.kept_end)
    laws = [table.double().softmax(-1)[0], *(-table).double().softmax(-1)]
    counts = [np.zeros(IDS, dtype=np.int64) for _ in laws]
    for run in decision.runs:
        counts[0][run[0]] += 1
        if len(run) > 1:
            counts[1 + run[0]][run[1]] += 1
    return counts, laws, sum(len(run) > 2 for run in decision.runs)


@pytest.mark.parametrize("rule", ["rejection", "naive", "recursive_rejection"])
def test_laws_within_a_step_are_those_of_the_state_at_each_token(rule: str) -> None:
    counts, laws, long = one_step(rule)
    assert sum(int(each.sum()) for each in counts[1:]) > ROWS / 8, "second tokens were judged"
    assert rule == "recursive_rejection" or long > 20
    judge(g_test_strata(counts, [law.numpy() for law in laws]), f"laws within a step under {rule}")


def test_a_step_that_forgets_the_state_is_caught() -> None:
    counts, laws, _ = one_step("rejection", bug=True)
    with must_be_caught():
        judge(g_test_strata(counts, [law.numpy() for law in laws]), "a processor without state")


def test_drafts_of_single_rows_are_kept_when_sampling() -> None:
    """Coupled texts do not depend on the draft: plain order with drafts gives the text of plain order without."""
    texts = []
    accepted = 0
    for draft in (None, TINY, noisy_copy(TINY, 1)):
        options: dict[str, Any] = {} if draft is None else {"k": 4}
        spec = Speculator(TINY, draft, rule="coupled", **options)
        for seed in range(12):
            counting = SecondWind()
            processors: Any = [counting]
            out: Any = spec.generate(
                PROMPT, do_sample=True, top_k=0, max_new_tokens=12, seed=seed, attention_mask=torch.ones_like(PROMPT),
                logits_processor=processors,
            )  # fmt: skip
            assert counting.calls == 12
            texts.append((seed, out.tolist()))
            accepted += spec.report.num_accepted_tokens if spec.report else 0
    assert accepted > 40
    assert len({str(text) for text in texts}) == len({seed for seed, _ in texts})


@pytest.mark.parametrize("rule", ["block", "traversal", "budget_flow"])
def test_rules_that_need_whole_drafts_are_refused_by_name(rule: str) -> None:
    arguments: dict[str, Any] = {"do_sample": True, "max_new_tokens": 3, "logits_processor": [SecondWind()]}
    tree: dict[str, Any] = {"k": 3} if rule == "block" else {"tree": (2, 2)}
    spec = Speculator(TINY, TINY, rule=rule, **tree)
    with pytest.raises(UnsupportedArgumentError, match=f"{rule}.*SecondWind.*specdec.pure"):
        spec.generate(PROMPT, **arguments)
    with Engine(TINY, TINY, k=3) as engine, pytest.raises(UnsupportedArgumentError, match="SecondWind"):
        engine.submit(PROMPT[0], rule=rule, **arguments)
    arguments["do_sample"] = False  # greedy matching judges token by token, whatever the rule's name
    assert spec.generate(PROMPT, **arguments) is not None
