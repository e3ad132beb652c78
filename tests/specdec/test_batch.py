"""The verbs of a step, without a target: what is judged, who cannot go on, and what every row gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from specdec.batch import Batch
from specdec.decision import Decided
from specdec.kv import SharedKVCache
from specdec.stopping import StopRules
from specdec.verify import DraftTree, Rows, SamplingLaw, Topology

VOCAB, EOS = 8, 7
PROMPTS = torch.tensor([[1, 2], [3, 4], [5, 6]])
NAN = float("nan")


def batch(sampling: bool = False, processors: Any = (), criteria: Any = (), isolates: bool = False) -> Batch:
    """Three rows whose K/V nobody keeps."""
    rows, cache = Rows(PROMPTS, None, 32), SharedKVCache({}, 3, 32)
    for row in range(3):
        cache.set_length(row, 1)
    law = SamplingLaw(processors)
    made = Batch(rows, cache, law, None, "auto", sampling, VOCAB, [0] * 3, [0, 1, 2], in_order=False, isolates=isolates)
    stop = [EosTokenCriteria(EOS), MaxLengthCriteria(5), *criteria]
    made.stops = {row: StopRules(StoppingCriteriaList(stop), rows) for row in range(3)}
    return made


def never(tree: DraftTree, logits: Tensor, rows: list[int]) -> tuple[DraftTree, Tensor]:
    raise AssertionError("nothing to run again")


def chain(*drafts: int) -> DraftTree:
    """The same draft for all rows."""
    return DraftTree.build(Topology.chain(len(drafts)), torch.cat([PROMPTS[:, 1:], torch.tensor([drafts] * 3)], dim=1))


def saying(*tokens: int) -> Tensor:
    """Logits of a target that says `tokens`, whatever the row."""
    return torch.nn.functional.one_hot(torch.tensor([tokens] * 3), VOCAB).float()


def test_a_step_emits_what_was_kept_and_ends_who_is_finished() -> None:
    made = batch()
    decided = made.decide(chain(1, EOS), saying(1, EOS, 2), 0, never)
    assert (decided.faulty, decided.failed) == ({}, {})
    advanced = made.advance(decided, left_out=[1])
    assert advanced == ({0: 4, 2: 4}, {})  # the end of the text is behind the second kept token
    assert decided.decision.runs == [[1, EOS], [], [1, EOS]]
    assert decided.decision.kinds[0] == ["accepted", "accepted"]
    assert made.rows.ends == [4, 2, 4]
    assert made.cache.lengths == [3, 1, 3]
    assert made.rows.live == [0, 1, 2], "who takes rows out is their owner"


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampled"])
def test_rows_with_nan_are_run_again_and_only_they_are_told(sampling: bool) -> None:
    logits, asked = saying(1, 2), []
    logits[1] = NAN

    def rerun(tree: DraftTree, logits: Tensor, rows: list[int]) -> tuple[DraftTree, Tensor]:
        asked.append(rows)
        return DraftTree.root_only(tree.tokens[:, 0]), logits[:, :1]

    decided = batch(sampling).decide(chain(1), logits, 0, rerun)
    assert asked == [[1]]
    assert decided.tree.tokens.shape == (3, 1)
    assert decided.faulty == {1: True}


def test_nan_that_is_gone_the_second_time_is_nobodys_fault() -> None:
    logits = saying(1, 2)
    logits[2, 1] = NAN
    decided = batch().decide(chain(1), logits, 0, lambda tree, _, rows: (tree, saying(1, 2)))
    assert decided.faulty == {}
    assert decided.decision.runs == [[1, 2]] * 3


def test_what_processors_leave_nothing_of_is_not_run_again() -> None:
    def nothing_for_row_0(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(len(scores))[:, None] == 0, float("-inf"))

    made = batch(sampling=True)
    made.law = lambda logits, *_: nothing_for_row_0(logits, logits[:, 0])[:, None]  # type: ignore[assignment]
    decided = made.decide(DraftTree.root_only(PROMPTS[:, 1]), saying(1)[:, :1], 0, never)
    assert decided.faulty == {0: False}


@pytest.mark.parametrize("isolates", [False, True])
def test_what_stop_rules_raise_is_told_or_raised(isolates: bool) -> None:
    def spoilt(ids: Tensor, scores: Any) -> Tensor:
        if int(ids[0, 0]) == 3:
            raise KeyError("of the second row")
        return torch.zeros(len(ids), dtype=torch.bool)

    made = batch(criteria=[spoilt], isolates=isolates)
    decided = made.decide(chain(1), saying(1, 2), 0, never)
    if not isolates:
        with pytest.raises(KeyError, match="second"):
            made.advance(decided)
        return
    advanced = made.advance(decided)
    assert list(advanced.raised) == [1]
    assert decided.decision.runs[0] == decided.decision.runs[2] == [1, 2]


def test_criteria_are_shown_what_is_recorded() -> None:
    made, seen = batch(), []

    def record(row: int, place: int, decided: Decided) -> None:
        path = decided.decision.paths[place]
        seen.append((row, decided.scores[place, path].argmax(-1).tolist()))

    made.record = record
    made.advance(made.decide(chain(1, 3), saying(1, 2, 4), 0, never))
    assert seen == [(row, [1, 2]) for row in range(3)]
