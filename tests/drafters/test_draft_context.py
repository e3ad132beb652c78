"""Rows longer than a draft model can read: they alone go without its drafts, with every tree, cache and engine."""

from __future__ import annotations

import warnings
from typing import Any

import models
import pytest
import torch
import transformers as tf
from context_cases import NEAR, POSITIONS, SAME, TARGET, one_note
from law_checks import check_joint_law, must_be_caught
from torch import Tensor

from specdec import Engine, ModelDrafter, Speculator, StepTrace
from specdec.drafters import BestFirst, Budget, DrafterNoteWarning, DySpec
from specdec.drafters.base import levels_within
from specdec.drafters.reading import Context
from specdec.experiments.laws.false_drafters import DropsUnlikelyTokens
from specdec.verify.positions import usable_positions

SHAPES: dict[str, Any] = {
    "chain": {"k": 4},
    "tree": {"tree": (2, 2, 1)},
    "sampled tree": {"tree": (2, 2), "children": "sampled"},
    "best first": {"tree": BestFirst(depth=4, top_k=3, num_nodes=7)},
    "dyspec": {"tree": DySpec(depth=4, num_nodes=8, max_children=2, threshold=0.05)},
}
MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {"do_sample": False}),
    "sampled": ({}, {"do_sample": True, "top_k": 0}),
    "coupled": ({"rule": "coupled"}, {"do_sample": True, "top_k": 0}),
}
LENGTHS = (40, 5, 20, 7)
"""Beyond the positions, far below them, and about to outgrow them."""
NEW = 14


def run(
    spec: Speculator, ids: Tensor, mask: Tensor, rows: list[int], **arguments: Any
) -> tuple[Tensor, dict[int, Any]]:
    """The text, and by row what each of its steps drafted, kept and emitted."""
    traces: list[StepTrace] = []
    out: Any = spec.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None, pad_token_id=models.PAD, seed=rows,
        on_step=traces.append, **arguments,
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    seen: dict[int, Any] = {row: [] for row in rows}
    for trace in traces:
        for row, *step in zip(trace.rows, trace.drafted, trace.accepted, trace.emitted, strict=True):
            seen[rows[row]].append(step)
    return out[:, ids.shape[1] :], seen


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_draft_beside_a_long_one_as_they_do_alone(name: str, mode: str, layout: str) -> None:
    options, arguments = MODES[mode]
    ids, mask = models.prompts(LENGTHS, models.VOCAB, 3)
    spec = Speculator(
        TARGET, ModelDrafter(NEAR, **SHAPES[name]), cache=layout, page_size=4 if layout == "paged" else None, **options
    )
    with one_note():
        text, steps = run(spec, ids, mask, [0, 1, 2, 3], **arguments)
    assert spec.report is not None
    assert [note for note in spec.report.notes if "24 positions" in note and "40 tokens" in note]
    assert all(drafted == 0 for drafted, *_ in steps[0])
    assert len(steps[0]) == NEW
    for row in (1, 2, 3):
        length = LENGTHS[row]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DrafterNoteWarning)
            alone, own = run(spec, ids[row : row + 1, -length:], mask[row : row + 1, -length:], [row], **arguments)
        assert torch.equal(alone[0], text[row])
        assert own[row] == steps[row]
    assert sum(accepted for row in (1, 3) for _, accepted, _ in steps[row]) > 0, (
        "nothing is accepted: this says nothing"
    )
    if mode != "sampled":  # the text itself is that of plain decoding
        plain, _ = run(Speculator(TARGET, **options), ids, mask, [0, 1, 2, 3], **arguments)
        assert torch.equal(plain, text)


def test_a_row_drafts_up_to_the_last_position_and_then_no_more() -> None:
    """Every draft is accepted, so how deep each one is says exactly what was allowed."""
    ids, mask = models.prompts((16, 21), models.VOCAB, 5)
    with one_note():
        _, steps = run(Speculator(TARGET, SAME, k=4), ids, mask, [0, 1], do_sample=False)
    for row, length in ((0, 16), (1, 21)):
        held = length
        for drafted, accepted, emitted in steps[row]:
            expected = max(0, min(4, POSITIONS + 1 - held, length + NEW - held - 1))
            assert (drafted, accepted) == (expected, expected), f"row {row} holding {held} tokens"
            held += len(emitted)
        assert held == length + NEW


@pytest.mark.parametrize("name", SHAPES)
def test_trees_end_where_the_positions_do(name: str) -> None:
    """The last tree is one level deep: its parents are the last tokens that can be read."""
    ids, mask = models.prompts((POSITIONS - 1,), models.VOCAB, 2)
    seen: list[tuple[int, int]] = []

    class Watched(ModelDrafter):
        def propose(self, budget: Budget, uniforms: Tensor) -> Any:
            tree = super().propose(budget, uniforms)
            assert self._session is not None
            [held] = self._session.rows.lengths()
            seen.append((held, tree.max_depth))
            return tree

    with one_note():
        run(Speculator(TARGET, Watched(NEAR, **SHAPES[name])), ids, mask, [0], do_sample=False)
    assert seen[0] == (POSITIONS - 1, 2)
    assert all((depth > 0) == (held <= POSITIONS) for held, depth in seen)
    assert all(depth <= levels_within(POSITIONS, 4, held) for held, depth in seen)


def test_rotary_drafts_whose_frequencies_depend_on_the_length_have_such_positions_too() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    sizes: dict[str, Any] = dict(num_key_value_heads=2, max_position_embeddings=POSITIONS, rope_parameters=rope)
    target, draft = models.target("llama-gqa", "fp32"), models.llama(4, layers=1, **sizes)
    positions = usable_positions(draft.config)
    assert positions is not None
    assert LENGTHS[2] < positions < LENGTHS[0]
    ids, mask = models.prompts(LENGTHS, models.VOCAB, 3)
    spec = Speculator(target, draft, k=3)
    with one_note():
        _, steps = run(spec, ids, mask, [0, 1, 2, 3], do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrafterNoteWarning)
        assert run(spec, ids[1:, -20:], mask[1:, -20:], [1, 2, 3], do_sample=False)[1] == {
            r: steps[r] for r in (1, 2, 3)
        }
    assert not any(drafted for drafted, *_ in steps[0])


def small_gpt2(seed: int, positions: int = 16) -> Any:
    config = tf.GPT2Config(vocab_size=4, n_embd=16, n_layer=1, n_head=2, n_positions=positions, initializer_range=0.5,
                           pad_token_id=0, bos_token_id=1, eos_token_id=None)  # fmt: skip
    return models.build(tf.GPT2LMHeadModel, config, torch.float64, seed, "sdpa")


@pytest.mark.filterwarnings("ignore::specdec.drafters.DrafterNoteWarning")
def test_the_law_is_exact_across_the_end_of_the_positions() -> None:
    """Judged tokens 1 to 3 begin with a draft that may be two deep, then one, then none."""
    target, draft = small_gpt2(0), small_gpt2(1, positions=4)
    prompt = torch.tensor([[3, 1, 2]])
    check_joint_law(Speculator(target, ModelDrafter(draft, k=3)), prompt, samples=8_000, top_k=0)
    with must_be_caught():
        liar = DropsUnlikelyTokens(draft, k=3, temperature=1.0)
        check_joint_law(Speculator(target, liar), prompt, samples=8_000, top_k=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_engine_drafts_for_the_others(adaptive: bool) -> None:
    ids, _ = models.prompts(LENGTHS, models.VOCAB, 3)
    prompts = [row[-length:].tolist() for row, length in zip(ids, LENGTHS, strict=True)]
    options: dict[str, Any] = dict(do_sample=True, top_k=0, seed=5, max_new_tokens=NEW, eos_token_id=None)

    def results(which: list[int]) -> dict[int, Any]:
        with Engine(TARGET, ModelDrafter(SAME, k=3), num_pages=64, page_size=4, adaptive=adaptive) as engine:
            handles = {row: engine.submit(prompts[row], **options) for row in which}
            out = {row: handle.result(60) for row, handle in handles.items()}
            assert engine.metrics().num_drafter_faults == 0
        return {row: (one.token_ids, one.num_steps, one.num_draft_tokens) for row, one in out.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrafterNoteWarning)
        beside, alone = results([0, 1, 2, 3]), results([1, 3])
    assert {row: beside[row] for row in (1, 3)} == alone, "seeded requests: how much is drafted shows in the text"
    assert beside[0][1:] == (NEW, 0)
    assert all(drafted > 0 for _, _, drafted in alone.values())


def test_what_cannot_be_drafted_says_nothing_about_acceptance() -> None:
    """An engine plans nothing for such rows: they would look like rows whose drafts are all rejected. It says so."""
    ids, _ = models.prompts((40,), models.VOCAB, 3)
    engine = Engine(TARGET, ModelDrafter(SAME, k=3), num_pages=64, page_size=4)
    with one_note():
        handle = engine.submit(ids[0].tolist(), do_sample=False, max_new_tokens=6)
        assert len(handle.result(60).token_ids) == 6
    [lane] = engine._stepping._lanes._lanes.values()
    fresh = type(lane.acceptance)(3)
    assert lane.acceptance.survival() == fresh.survival()
    engine.close()


@pytest.mark.parametrize(
    ("positions", "deepest", "held", "levels"),
    [(8, 4, 5, 4), (8, 4, 6, 3), (8, 4, 8, 1), (8, 4, 9, 0), (8, 4, 30, 0), (8, 2, 5, 2), (None, 4, 30, 4)],
)
def test_levels_below_a_text(positions: int | None, deepest: int, held: int, levels: int) -> None:
    assert levels_within(positions, deepest, held) == levels


def test_a_context_by_hand() -> None:
    context = Context("Tiny", 8)
    assert context.outgrown([8, 3]) == [False, False]
    assert context.notes == []
    assert context.outgrown([8, 9]) == [False, True]
    assert context.cut(Budget((3, 3, 3), 9), [9, 7, 2]) == Budget((0, 2, 3), 9)
    [note] = context.notes
    assert "Tiny" in note
    assert "shorten" not in note
    assert context.outgrown([90]) == [True]
    assert len(context.notes) == 1
    assert context.afresh().notes == []
    assert Context("Any", None).outgrown([10**6]) == [False]
    assert [option.positions for option in Speculator(TARGET, [SAME, "ngram"]).planners.options.options] == [24, None]  # type: ignore[union-attr]
