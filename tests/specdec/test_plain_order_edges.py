"""What the user's stateful objects are shown at the edges: behind the end of a row, of a whole batch, and of a law."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import models
import plain_callbacks as callbacks
import pytest
import torch
from exact_law import tiny_llama
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from specdec import Speculator, TargetFaultError

TARGET: Any = models.target("llama-gqa")


def logs(lengths: Sequence[int], criterion: bool, **arguments: Any) -> tuple[callbacks.Log, callbacks.Log]:
    """All calls of a stateful processor (and criterion) under our decoding and under plain `generate`."""
    ids, mask = models.prompts(tuple(lengths), models.VOCAB, 0)
    both: list[callbacks.Log] = []
    for generate in (Speculator(TARGET, TARGET, k=5).generate, TARGET.generate):
        log: callbacks.Log = []
        stops = [callbacks.EveryNth(log)] if criterion else []
        generate(
            ids, attention_mask=mask, do_sample=False, logits_processor=LogitsProcessorList([Listening(log)]),
            stopping_criteria=StoppingCriteriaList(stops), **arguments,
        )  # fmt: skip
        both.append(log)
    return both[0], both[1]


class Listening(LogitsProcessor):
    """Writes down what it is shown and leaves it as it is: a perfect draft is kept as far as it goes."""

    def __init__(self, log: callbacks.Log):
        self.log = log

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log.append(("Listening", input_ids.tolist()))
        return scores


@pytest.mark.parametrize("pad", [0, 7])
def test_behind_its_end_a_row_is_shown_with_the_callers_pads(pad: int) -> None:
    plain: Any = TARGET.generate(*models.prompts((5, 3, 4), models.VOCAB, 0)[:1], do_sample=False, max_new_tokens=3)
    ours, wanted = logs((5, 3, 4), False, max_new_tokens=12, eos_token_id=int(plain[0, -1]), pad_token_id=pad)
    assert any(row[-2:] == [pad, pad] for _, rows in wanted for row in rows), "no row ended before the others"
    assert ours == wanted


@pytest.mark.parametrize("lengths", [(6,), (5, 3)])
def test_nothing_is_asked_behind_the_stop_of_the_last_row(lengths: tuple[int, ...]) -> None:
    """Without an end-of-sequence token finished rows go on, but not beyond the last one's stop, kept draft or not."""
    ours, wanted = logs(lengths, True, max_new_tokens=14, eos_token_id=None, pad_token_id=0)
    assert len(wanted) < 2 * 14, "the criterion never stopped all rows"
    assert ours == wanted


def test_a_criterion_of_two_rows_is_shown_both_at_once() -> None:
    """Also where it is all there is to be called in plain order."""
    ids, mask = models.prompts((5, 3), models.VOCAB, 0)
    both: list[callbacks.Log] = []
    for generate in (Speculator(TARGET, TARGET, k=5).generate, TARGET.generate):
        both.append([])
        criteria = StoppingCriteriaList([callbacks.EveryNth(both[-1])])
        generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=14, stopping_criteria=criteria, eos_token_id=None
        )
    assert all(len(rows) == 2 for _, rows, _ in both[1])
    assert both[0] == both[1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_nan_of_the_target_is_shown_to_nobody(do_sample: bool) -> None:
    poison = 3
    target: Any = copy.deepcopy(tiny_llama(0))
    with torch.no_grad():
        target.model.embed_tokens.weight[poison] = float("nan")
    shown: list[bool] = []

    class Forcing(LogitsProcessor):
        """The third token is the one that the target cannot read."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            shown.append(bool(scores.isnan().any()))
            wanted = torch.arange(scores.shape[1]) == poison
            return scores.masked_fill(~wanted if len(shown) == 3 else wanted, float("-inf"))

    with pytest.raises(TargetFaultError, match="NaN in its logits"):
        Speculator(target, tiny_llama(0), k=3).generate(
            torch.tensor([[5, 2, 6]]), do_sample=do_sample, max_new_tokens=8, eos_token_id=None,
            logits_processor=LogitsProcessorList([Forcing()]), seed=1,
        )  # fmt: skip
    assert shown == [False] * 3
