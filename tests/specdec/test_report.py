"""What a call says it did: counts by position and step, by hand and of real calls that end at their length limit."""

from __future__ import annotations

import json
import math
from typing import Any

import models
import pytest
import torch
from exact_law import noisy_copy, tiny_llama

from specdec import ModelDrafter, Speculator, StepTrace
from specdec.drafters import BestFirst
from specdec.loop import timed
from specdec.monitor import AcceptanceMonitor
from specdec.planner.summary import PlanReport
from specdec.report import SpecReport
from specdec.verify import DraftTree, Topology, Verdict
from specdec.verify.rules.base import Expected

MODEL: Any = models.target("llama-gqa")


def step(drafted: list[int], accepted: list[int], refused: list[bool], number: int = 0, ms: float = 1.0) -> StepTrace:
    kinds = [["accepted"] * n + ["recovered" if no else "bonus"] for n, no in zip(accepted, refused, strict=True)]
    emitted = [[7] * len(kind) for kind in kinds]
    return StepTrace(number, list(range(len(drafted))), drafted, accepted, emitted, kinds, ms, 2 * ms, 4 * ms)


def test_counts_of_two_steps_by_hand() -> None:
    report = SpecReport()
    # Row 0 keeps two of three and meets a refusal, row 1 keeps all of one, row 2 drafts nothing.
    report.add(step([3, 1, 0], [2, 1, 0], [True, False, False]), [3, 1, 0])
    report.add(step([4, 2, 1], [0, 2, 0], [True, False, True], 1), [1, 2, 1])
    assert (report.num_steps, report.num_row_steps, report.num_drafts, report.num_draft_tokens) == (2, 6, 5, 11)
    assert (report.num_accepted_tokens, report.num_recovered_tokens, report.num_bonus_tokens) == (5, 3, 3)
    assert report.num_emitted_tokens == 11
    assert report.num_accepted_tokens_per_pos == [3, 2, 0]
    assert report.num_reached_per_pos == [5, 2, 1]
    assert report.per_position_acceptance == pytest.approx([3 / 5, 1.0, 0.0])
    assert report.acceptance_histogram == [2, 1, 2]  # row 2's first step was none
    assert report.mean_acceptance_length == pytest.approx(1 + 5 / 5)
    assert report.draft_acceptance_rate == pytest.approx(5 / 11)
    assert (report.ms_draft, report.ms_verify, report.ms_rest) == (2.0, 4.0, 8.0)
    assert report.tokens_per_step == pytest.approx(11 / 6)
    report.ms_total = 500.0
    assert report.tokens_per_second == pytest.approx(22.0)
    written = json.loads(json.dumps(report.to_dict()))
    assert written["per_position_acceptance"] == pytest.approx([3 / 5, 1.0, 0.0])
    assert written["speculative_decoding"] == {
        "mean_acceptance_length": 2.0, "draft_acceptance_rate": 5 / 11, "acceptance_histogram": [2, 1, 2],
        "num_spec_steps": 5, "num_accepted_draft_tokens": 5, "num_draft_tokens": 11,
    }  # fmt: skip


def test_a_report_of_nothing() -> None:
    report = SpecReport()
    assert (report.mean_acceptance_length, report.draft_acceptance_rate, report.tokens_per_second) == (1.0, 0.0, 0.0)
    assert (report.per_position_acceptance, report.tokens_per_step) == ([], 0.0)


def test_the_summary_shows_the_counts() -> None:
    report = SpecReport(drafter="model", rule="block", num_rows=2, num_prompt_tokens=9, ms_prefill=3.0)
    report.add(step([3, 1], [2, 1], [True, False]), [3, 1])
    assert report.num_row_steps == 2
    report.num_drafter_faults, report.last_drafter_fault = 2, "boom"
    report.notes.append("remember")
    said = dict(line.split("  ", 1) for line in report.summary().splitlines())
    said = {name.strip(): value.strip() for name, value in said.items()}
    assert said["drafter / rule"] == "model / block"
    assert said["emitted tokens"] == "5 in 1 steps (2 rows)"
    assert said["acceptance rate"] == "0.75 of 4 drafted tokens"
    assert said["acceptance by position"] == "1.00 1.00 0.00"
    assert said["emitted as"] == "3 accepted, 1 recovered, 1 bonus"
    assert said["ms per step"] == "draft 1.00, verify 2.00, rest 4.00"
    assert said["prefill"] == (
        "9 prompt tokens: 3.0 ms before the first step, 1.0 of drafting and 2.0 of verifying in it"
    )
    report.num_cached_tokens = 7
    assert "9 prompt tokens, 7 of them reused from the cache: 3.0 ms" in report.summary()
    assert said["tokens per target pass"] == "2.50 of a row"
    assert said["drafts"] == "2, 0 steps decoded plainly"
    assert said["mean acceptance length"] == "2.50 tokens per draft"
    assert "both models" not in said["KV cache"]
    assert said["drafter faults"] == "2, last: boom"
    assert said["note"] == "remember"
    assert "LOSSY" in SpecReport(lossless=False).summary()
    assert "LOSSY" not in report.summary()


def test_the_summary_of_plain_decoding_speaks_of_no_drafts() -> None:
    report = SpecReport(kv_models=2, num_rows=1)
    report.add(step([0], [0], [False], 0, 9.0), [0])
    report.add(step([0], [0], [False], 1, 1.0), [0])
    said = dict(line.split("  ", 1) for line in report.summary().splitlines())
    said = {name.strip(): value.strip() for name, value in said.items()}
    assert said["drafts"] == "0, 2 steps decoded plainly"
    assert not {"mean acceptance length", "acceptance rate", "acceptance by position"} & said.keys()
    assert said["ms per step"] == "draft 1.00, verify 2.00, rest 20.00 (after the first step)"
    assert said["prefill"].endswith("9.0 of drafting and 18.0 of verifying in it")
    assert said["KV cache"].endswith(", both models")


def test_phases_add_up_until_they_are_taken() -> None:
    class Busy:
        def __init__(self) -> None:
            self.ms: dict[str, float] = {}

        @timed("draft")
        def work(self, how_much: int) -> int:
            return sum(range(how_much))

        @timed("fault")
        def fail(self) -> None:
            raise KeyError

    busy = Busy()
    assert busy.work(2000) == sum(range(2000))
    first = busy.ms["draft"]
    busy.work(how_much=2000)
    assert busy.ms["draft"] > first > 0
    with pytest.raises(KeyError):
        busy.fail()
    assert busy.ms.keys() == {"draft", "fault"}


def run(draft: Any, new: int, lengths: tuple[int, ...] = (5,), **options: Any) -> tuple[SpecReport, list[StepTrace]]:
    ids, mask = models.prompts(lengths, models.VOCAB, 4)
    traces: list[StepTrace] = []
    spec = Speculator(MODEL, draft, **options)
    out: Any = spec.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=models.PAD,
        on_step=traces.append,
    )  # fmt: skip
    assert out.shape[1] == ids.shape[1] + new
    assert spec.report is not None
    return spec.report, traces


@pytest.mark.parametrize(
    ("new", "k", "drafted", "positions"),
    [
        (1, 4, [0], []),  # the last token needs no draft
        (2, 4, [1], [1]),
        (5, 4, [4], [1, 1, 1, 1]),
        (6, 4, [4, 0], [1, 1, 1, 1]),
        (7, 4, [4, 1], [2, 1, 1, 1]),
        (12, 3, [3, 3, 3], [3, 3, 3]),
        (11, 3, [3, 3, 2], [3, 3, 2]),
    ],
)
def test_a_perfect_drafter_drafts_no_deeper_than_the_limit(
    new: int, k: int, drafted: list[int], positions: list[int]
) -> None:
    report, traces = run(MODEL, new, k=k)
    assert [trace.drafted for trace in traces] == [[count] for count in drafted]
    assert [trace.accepted for trace in traces] == [[count] for count in drafted]
    assert report.num_steps == report.num_row_steps == report.num_bonus_tokens == len(drafted)
    assert report.num_drafts == sum(count > 0 for count in drafted)
    assert report.num_draft_tokens == report.num_accepted_tokens == sum(drafted)
    assert report.num_accepted_tokens_per_pos == report.num_reached_per_pos == positions
    assert report.per_position_acceptance == [1.0] * len(positions)
    assert report.num_emitted_tokens == new
    real = [count for count in drafted if count]
    assert report.acceptance_histogram == [real.count(n) for n in range(max(real, default=-1) + 1)]


def test_rows_of_one_batch_end_at_their_own_limits() -> None:
    """A perfect drafter beside a padded row: all are as long as the longest, none drafts beyond its own end."""
    report, traces = run(MODEL, 8, lengths=(5, 2, 4), k=4)
    for trace in traces:
        assert set(trace.drafted) == {[4, 2][trace.step]}
    assert report.kv_models == 2
    assert run("ngram", 2, k=2)[0].kv_models == 1
    assert report.num_draft_tokens == 3 * 6
    assert report.num_emitted_tokens == 3 * 8


@pytest.mark.parametrize("tree", [(2, 2, 1), BestFirst(depth=3, top_k=2, num_nodes=5)])
def test_trees_are_cut_at_the_limit_and_their_positions_counted(tree: Any) -> None:
    report, traces = run(ModelDrafter(models.draft("near", "llama-gqa"), tree=tree), 9)
    deep, reached, kept = 9, [0] * 3, [0] * 3
    for trace in traces:
        limit = min(3, deep - 1)
        assert (trace.drafted[0] > 0) == (limit > 0)
        assert trace.drafted[0] <= [0, 2, 6, 10][limit]
        assert trace.accepted[0] <= limit
        for depth in range(trace.accepted[0]):
            kept[depth] += 1
            reached[depth] += 1
        if trace.kinds[0][-1] == "recovered":
            reached[trace.accepted[0]] += 1
        deep -= len(trace.emitted[0])
    longest = len(report.num_reached_per_pos)
    assert report.num_reached_per_pos == reached[:longest]
    assert report.num_accepted_tokens_per_pos == kept[:longest]
    assert not any(reached[longest:])
    assert 0 < report.per_position_acceptance[0] <= 1
    assert report.num_emitted_tokens == 9


def test_an_imperfect_chain_is_counted_by_position() -> None:
    target = tiny_llama(0)
    spec = Speculator(target, noisy_copy(target, 1, 0.1), k=3)
    traces: list[StepTrace] = []
    ids = torch.tensor([[3, 5, 2, 6]])
    spec.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, eos_token_id=None,
                  pad_token_id=0, on_step=traces.append)  # fmt: skip
    assert spec.report is not None
    reached = [sum(t.drafted[0] > d and t.accepted[0] >= d for t in traces) for d in range(3)]
    kept = [sum(t.accepted[0] > d for t in traces) for d in range(3)]
    assert 0 < sum(kept) < sum(reached), "nothing or everything is accepted: this says nothing"
    assert reached[2] > kept[2] > 0 or reached[1] > kept[1] > 0
    while not reached[-1]:
        reached, kept = reached[:-1], kept[:-1]
    assert spec.report.num_reached_per_pos == reached
    assert spec.report.num_accepted_tokens_per_pos == kept
    assert spec.report.per_position_acceptance == [k / r if r else 0.0 for k, r in zip(kept, reached, strict=True)]


def test_a_plan_report_by_hand() -> None:
    """The first step counts by name only; forecasts are scaled by how the steps before it went."""
    plan = PlanReport()
    plan.add("plain", 100.0, 1.0, step([0], [0], [False], ms=50.0), 1)
    assert (plan.steps, plan.predicted_ms, plan.realised_tokens) == ({"plain": 1}, 0.0, 0)
    plan.add("model k=4", 10.0, 3.0, step([4], [3], [True], 1, ms=2.0), 4)
    assert (plan.table_ms, plan.predicted_ms, plan.realised_ms) == (10.0, 10.0, 14.0)
    assert (plan.predicted_tokens, plan.realised_tokens) == (3.0, 4)
    plan.add("model k=4", 10.0, 3.0, step([4], [1], [True], 2, ms=1.0), 2)
    assert plan.steps == {"plain": 1, "model k=4": 2}
    assert plan.predicted_ms == pytest.approx(10.0 + 10.0 * 14 / 10)
    assert plan.predicted_tokens == pytest.approx(3.0 + 1 + 2 * (3 + 2) / (2 + 2))
    assert plan.realised_ms == pytest.approx(21.0)
    assert plan.realised_tokens_per_second == pytest.approx(1e3 * 6 / 21)
    assert plan.predicted_tokens_per_second == pytest.approx(1e3 * plan.predicted_tokens / plan.predicted_ms)
    assert PlanReport().realised_tokens_per_second == PlanReport().predicted_tokens_per_second == 0.0
    assert "decoding speed" in dict(plan.lines())
    only = PlanReport()
    only.add("plain", 2.0, 1.0, step([0], [0], [False]), 1)
    assert dict(only.lines()) == {"steps by plan": "plain 1"}  # nothing was timed and nothing foretold
    lines = dict(plan.lines())
    assert lines["steps by plan"] == "model k=4 2, plain 1"


class Fixed:
    """A rule whose steps exceed theory by given means and variances."""

    def __init__(self, mean: float, variance: float):
        self._excess = Expected(torch.tensor([mean] * 2), torch.tensor([variance] * 2))

    def excess(self, tree: DraftTree, p: Any, verdict: Any) -> Expected:
        return self._excess


def test_a_monitor_adds_up_all_rows_and_steps() -> None:
    tree = DraftTree.build(Topology.chain(1), torch.tensor([[1, 2], [1, 2]]))
    nothing: Any = None
    verdict: Verdict = nothing
    monitor = AcceptanceMonitor()
    assert monitor.z is None
    for rule in (Fixed(0.5, 2.0), Fixed(1.0, 0.25)):
        honest: Any = rule
        monitor.decided(honest, tree, nothing, verdict)
    honest = Fixed(9.0, 9.0)
    monitor.decided(honest, DraftTree.root_only(torch.tensor([1, 1])), nothing, verdict)  # nothing was drafted
    assert monitor.z == pytest.approx(3.0 / math.sqrt(4.5))
    for mean, z in ((0.0, 0.0), (0.5, math.inf), (-0.5, -math.inf)):
        certain: Any = Fixed(mean, 0.0)
        monitor = AcceptanceMonitor()
        monitor.decided(certain, tree, nothing, verdict)
        assert monitor.z == z


@pytest.mark.parametrize(
    ("draft", "options", "said"),
    [
        (None, {}, "draft: none (plain decoding); rule: auto; exactness: distribution)"),
        ("ngram", {"k": 6}, "draft: ngram, up to 6 tokens a step; "),
        ([MODEL, "ngram"], {}, "draft: model+ngram, planned step by step; "),
        (MODEL, {"tree": (2, 1), "cache": "paged", "page_size": 8}, "up to 4 tokens a step in 2 levels; rule: auto; "),
    ],
)
def test_a_speculator_says_what_it_is(draft: Any, options: dict[str, Any], said: str) -> None:
    shown = repr(Speculator(MODEL, draft, **options))
    count = sum(parameter.numel() for parameter in MODEL.parameters())
    assert shown.startswith("Speculator(target: LlamaForCausalLM of ")
    assert f"{count} parameters" in shown or f"{count / 1e6:.1f}M parameters" in shown
    assert said in shown
    assert shown.endswith(", pages of 8)" if "cache" in options else ")")
