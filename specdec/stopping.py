"""Where plain decoding would have stopped, token by token, for every row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from specdec.verify.rows import Rows

FROM_CONFIG = object()
"""Stands for stop strings that were not given, where None means none."""


class StopRules:
    """Applies the caller's criteria after each single token of an accepted run.

    End-of-sequence and length are decided on host integers; every other criterion is called with the row's own
    prefix `[1, columns]`, as plain decoding of that row would.

    Without an end-of-sequence rule plain `generate` keeps extending finished rows until the last row stops; so do
    we (`finish_line`), because those tokens are part of its output.
    """

    def __init__(self, criteria: StoppingCriteriaList, rows: Rows):
        self._rows = rows
        self._eos: set[int] = set()
        self.max_columns: int | None = None
        self._others = StoppingCriteriaList()
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self._eos |= {int(token) for token in criterion.eos_token_id.flatten().tolist()}
            elif type(criterion) is MaxLengthCriteria:
                limit = int(criterion.max_length)
                self.max_columns = limit if self.max_columns is None else min(limit, self.max_columns)
            else:
                self._others.append(criterion)
        self.pads_finished = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._stopped_at: dict[int, int] = {}

    def scan(self, row: int, tokens: list[int], scores: list[tuple[torch.Tensor, ...]] | None) -> None:
        """Look for the first stop among the last `len(tokens)` tokens of `row`, which are already appended.

        Args:
            scores: per token, the tuple of `[1, vocab]` scores so far that criteria are given; None if not kept.
        """
        if row in self._stopped_at:
            return
        first = self._rows.ends[row] - len(tokens)
        for j, token in enumerate(tokens):
            if self._stops(row, token, first + j + 1, None if scores is None else scores[j]):
                self._stopped_at[row] = first + j + 1
                return

    def final_columns(self, row: int) -> int | None:
        """Columns of `ids` that plain decoding keeps of a row, or None while the row must go on."""
        stopped = self._stopped_at.get(row)
        if self.pads_finished or self._rows.batch_size == 1 or stopped is None:
            return stopped
        if self.max_columns is not None and self._rows.ends[row] >= self.max_columns:
            return self.max_columns  # it cannot grow further; `finish_line` may still cut it in the end
        line = self.finish_line()
        return None if line is None or self._rows.ends[row] < line else line

    def finish_line(self) -> int | None:
        """Columns of the final sequences, once known, where finished rows are extended instead of padded."""
        if self.pads_finished or len(self._stopped_at) < self._rows.batch_size:
            return None
        return max(self._stopped_at.values())

    @property
    def ends(self) -> frozenset[int]:
        """End-of-sequence ids."""
        return frozenset(self._eos)

    def remaining(self, row: int) -> int | None:
        """Tokens the row may still emit before its length limit."""
        return None if self.max_columns is None else max(0, self.max_columns - self._rows.ends[row])

    def _stops(self, row: int, token: int, columns: int, scores: tuple[torch.Tensor, ...] | None) -> bool:
        if token in self._eos or (self.max_columns is not None and columns >= self.max_columns):
            return True
        if not self._others:
            return False
        prefix = self._rows.ids[row : row + 1, :columns]
        return bool(self._others(prefix, scores).all())


@contextmanager
def own_stop_strings(
    target: PreTrainedModel, config: GenerationConfig | None, strings: Any
) -> Iterator[tuple[GenerationConfig | None, Any]]:
    """Take `stop_strings` out of whatever configuration holds them: `transformers` loses the tokenizer on the way to
    a custom method and would refuse. Yields (config, strings); the target's own config is restored afterwards.
    An explicit None means no stop strings, as in plain `generate`.
    """
    own = target.generation_config.stop_strings
    if config is not None and config.stop_strings is not None:
        strings = config.stop_strings if strings is FROM_CONFIG else strings
        config = copy.deepcopy(config)
        config.stop_strings = None
    strings = own if strings is FROM_CONFIG else strings
    target.generation_config.stop_strings = None
    try:
        yield config, strings
    finally:
        target.generation_config.stop_strings = own
